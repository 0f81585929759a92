"""A client somebody else could have written: from protocol/SPEC.md alone, on bare msgpack.

Nothing of this repository is imported. That is the point: whoever reads the page can run a container.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import msgpack
import pytest

TIMEOUT = 30.0


class Agent(Protocol):
    socket_path: str


class Failed(Exception):
    """The error map of a response."""


class Client:
    """One connection: hello, then calls one at a time. Events that come in between are kept."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(path)
        self.unpacker = msgpack.Unpacker(raw=False)
        self.early = b""
        self.msgid = 0
        self.events: list[dict[str, Any]] = []
        self.hello = self.call("agent.hello", protocol_min=1, protocol_max=1, client="foreign")

    def call(self, method: str, **params: Any) -> Any:
        self.msgid += 1
        self.sock.sendall(msgpack.packb([0, self.msgid, method, [params]]))
        while True:
            message = self.next_message()
            if message[0] == 2:
                self.events.append(message[2][0])
                continue
            assert message[:2] == [1, self.msgid]
            if message[2] is not None:
                raise Failed(message[2])
            return message[3]

    def next_message(self) -> list[Any]:
        for message in self.unpacker:
            return list(message)
        data = self.sock.recv(65536)
        assert data, "the agent closed"
        self.unpacker.feed(data)
        return self.next_message()

    def wait_event(self, kind: str, **data: Any) -> dict[str, Any]:
        seen = 0
        while True:
            for event in self.events[seen:]:
                if event["type"] == kind and data.items() <= event["data"].items():
                    return event
            seen = len(self.events)
            message = self.next_message()
            assert message[:2] == [2, "event"]
            self.events.append(message[2][0])

    def attach(self, container: str, stream: str, process: str = "init") -> int:
        """Afterwards the connection is the stream; returns how much of it went before."""
        reply = self.call("stream.attach", container=container, process=process, stream=stream)
        self.early = self.unpacker.read_bytes(65536)  # stream bytes that came with the response
        return int(reply["offset"])

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes of the stream."""
        data, self.early = self.early[:count], self.early[count:]
        while len(data) < count:
            chunk = self.sock.recv(count - len(data))
            assert chunk, "the stream was closed early"
            data += chunk
        return data

    def close(self) -> None:
        self.sock.close()


STREAM = {"mode": "stream"}


def spec(rootfs: str, *args: str) -> dict[str, Any]:
    """The least an OCI runtime spec can say."""
    kinds = ("pid", "ipc", "uts", "mount")
    return {
        "ociVersion": "1.0.2",
        "process": {
            "args": list(args),
            "cwd": "/",
            "env": ["PATH=/usr/bin:/bin"],
            "user": {"uid": 0, "gid": 0},
        },
        "root": {"path": str(rootfs), "readonly": True},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": kind} for kind in kinds]},
    }


@pytest.fixture
def connect(agent: Agent) -> Iterator[Any]:
    with ExitStack() as stack:

        def make() -> Client:
            client = Client(str(agent.socket_path))
            stack.callback(client.close)
            return client

        yield make


def test_runs_a_container(connect: Any, rootfs: str) -> None:
    control, stdin, stdout = connect(), connect(), connect()
    control.call("events.subscribe")
    created = control.call(
        "container.create",
        container="foreign-run",
        spec=spec(rootfs, "sh", "-c", "cat; echo done; exit 7"),
        stdio={"stdin": STREAM, "stdout": STREAM},
        request_id="create",
        deadline_ms=20_000,
    )
    assert created["pid"] > 0
    assert stdin.attach("foreign-run", "stdin") == 0
    assert stdout.attach("foreign-run", "stdout") == 0
    control.call("container.start", container="foreign-run")

    stdin.sock.sendall(b"over to you\n")
    control.call("process.close_stdin", container="foreign-run", offset=12)
    record = control.call("container.wait", container="foreign-run")
    assert (record["exit_code"], record["signal"], record["reason"]) == (7, 0, "exited")

    assert stdout.read(record["streams"]["stdout"]) == b"over to you\ndone\n"
    end = control.wait_event("stream.end", stream="stdout")
    assert (end["container"], end["process"], end["data"]["bytes"]) == ("foreign-run", "init", 17)
    stdout.close()

    assert control.call("container.delete", container="foreign-run")["exit"]["exit_code"] == 7
    control.wait_event("container.deleted")
    kinds = [event["type"] for event in control.events if event["container"] == "foreign-run"]
    for earlier, later in [
        ("container.created", "process.started"),
        ("process.started", "process.exited"),
        ("process.exited", "container.stopped"),
        ("container.stopped", "container.deleted"),
    ]:
        assert kinds.index(earlier) < kinds.index(later)
    numbers = [event["seq"] for event in control.events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    with pytest.raises(Failed, match="NOT_FOUND"):
        control.call("container.state", container="foreign-run")


def test_execs_beside_it_and_kills(connect: Any, rootfs: str) -> None:
    control, output = connect(), connect()
    control.call("container.create", container="foreign-exec", spec=spec(rootfs, "sleep", "1000"))
    control.call("container.start", container="foreign-exec")
    control.call(
        "process.exec",
        container="foreign-exec",
        process="hello",
        spec={"args": ["sh", "-c", "echo to stdout; echo to stderr >&2"], "cwd": "/"},
        stdio={"stdout": STREAM, "stderr": STREAM},
    )
    ended = control.call("process.wait", container="foreign-exec", process="hello")
    assert ended["exit_code"] == 0
    output.attach("foreign-exec", "stderr", process="hello")
    assert output.read(ended["streams"]["stderr"]) == b"to stderr\n"

    with pytest.raises(Failed, match="not_found"):
        control.call(
            "process.exec", container="foreign-exec", process="no", spec={"args": ["no-such"], "cwd": "/"}
        )
    with pytest.raises(Failed, match="FAILED_PRECONDITION"):
        control.call("container.delete", container="foreign-exec")
    control.call("container.kill", container="foreign-exec", signal="KILL")
    record = control.call("container.wait", container="foreign-exec")
    assert (record["exit_code"], record["signal"], record["reason"]) == (137, 9, "signalled")
    control.call("container.delete", container="foreign-exec")
    listed = control.call("container.list").get("containers", [])
    assert "foreign-exec" not in [container["container"] for container in listed]


def test_the_same_request_twice_is_one(connect: Any, rootfs: str) -> None:
    first, second = connect(), connect()
    request = {"container": "foreign-twice", "spec": spec(rootfs, "true"), "request_id": "twice"}
    created = first.call("container.create", **request)
    assert second.call("container.create", **request, deadline_ms=5_000) == created
    with pytest.raises(Failed, match="ALREADY_EXISTS"):
        second.call("container.create", **{**request, "overlay": True})
    with pytest.raises(Failed, match="ALREADY_EXISTS"):
        second.call("container.create", **{**request, "request_id": "other"})
    second.call("container.delete", container="foreign-twice")
