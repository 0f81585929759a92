"""One host connection, over a socket pair: what is answered, what is refused, who is disconnected."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from gcsagent.agent import methods, services, wire
from gcsagent.agent.attachable import Keeper
from gcsagent.agent.bounds import ALWAYS, Bounds
from gcsagent.agent.calls import Caller
from gcsagent.agent.cgroups import CgroupMounts
from gcsagent.agent.container import Container
from gcsagent.agent.counters import CounterSlots
from gcsagent.agent.dispatch import Dispatcher
from gcsagent.agent.events import EventLog
from gcsagent.agent.info import AgentService
from gcsagent.agent.kernfs import KernelFiles
from gcsagent.agent.kmsg import KernelLog
from gcsagent.agent.oom import OomWatch
from gcsagent.agent.process import Process
from gcsagent.agent.registry import Registry
from gcsagent.agent.room import MAX_ROOM
from gcsagent.agent.runc import Runc
from gcsagent.agent.runtimes import Runtimes
from gcsagent.agent.session import Session
from gcsagent.agent.streams import OutputStream
from gcsagent.common.config import Settings
from protocol.errors import Code, RpcError
from protocol.limits import MAX_FRAME, MAX_IN_FLIGHT, Limits
from protocol.types import Status, Stdio, StreamMode, StreamSpec
from tests.fakes import watched_loop
from tests.fakes.fake_supervisor import FakeSupervisor, pair


class Host:
    """A bare client on its end of the pair, and the agent's parts behind the other end."""

    def __init__(self, tmp_path: Path, **limits: int) -> None:
        self.supervisor = FakeSupervisor()
        bounds = Bounds(Limits(**limits))
        mounts = tmp_path / "mounts"
        mounts.touch()
        caller = Caller(self.supervisor.client, {}, "g1")
        runtime = Runc(caller, "runc", str(tmp_path), str(tmp_path / "console"))
        keeper = Keeper(self.supervisor.client, CounterSlots())
        cgroups, events = CgroupMounts(str(mounts)), EventLog(size=bounds.limits.max_event_bytes)
        oom = OomWatch(events, KernelLog(str(tmp_path / "no log")), KernelFiles())
        runtimes = Runtimes(lambda _: runtime, ["runc"])
        self.registry = Registry(str(tmp_path), False, runtimes, caller, keeper, events, cgroups, oom, bounds)
        self.registry.storage = services.storage(self.registry, str(tmp_path), guest=False)
        self.registry.snapshots = services.snapshots(self.registry, str(tmp_path))
        self.registry.checkpoints = services.checkpoints(self.registry)
        self.registry.pressure = services.pressure(self.registry)
        self.agent = AgentService(Settings(("unix:x",), str(tmp_path)), self.registry, 1, os.getpid())
        forwards = services.forwards(self.registry, "g7")
        table = methods.build(self.registry, self.agent, forwards)
        self.dispatcher = Dispatcher(table, self.registry.journal, lambda: False, methods.openers(forwards))
        self.closed: list[Session] = []
        self.welcomed: list[Session] = []
        self.crowded: RpcError | None = None
        self.session, self.sock = self.connect()
        self._unpacker = msgpack.Unpacker(raw=False, max_buffer_size=1 << 26)

    def connect(self) -> tuple[Session, socket.socket]:
        ours, theirs = pair()
        return (
            Session(ours, "test", self.dispatcher, self.registry, self.agent, self),
            theirs,
        )

    def admit(self, session: Session) -> None:
        if self.crowded is not None:
            raise self.crowded
        self.welcomed.append(session)

    def gone(self, session: Session) -> None:
        self.closed.append(session)

    def send(self, *frames: Any) -> None:
        self.sock.sendall(b"".join(msgpack.packb(frame) for frame in frames))

    async def receive(self) -> Any:
        """The next message; None at the end of the connection."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            while True:
                for message in self._unpacker:
                    return message
                data = await loop.sock_recv(self.sock, 1 << 20)
                if not data:
                    return None
                self._unpacker.feed(data)

    async def ask(self, msgid: int, method: str, **params: Any) -> Any:
        """The answer: its error map or its result."""
        self.send([0, msgid, method, [params]])
        kind, ident, error, result = await self.receive()
        assert (kind, ident) == (1, msgid)
        return result if error is None else error

    async def greet(self) -> None:
        welcome = await self.ask(0, "agent.hello", protocol_min=1, protocol_max=1)
        assert welcome["generation"] == 1

    async def ended(self) -> None:
        """The session has ended; the client sees the connection close."""
        async with asyncio.timeout(10):
            while not self.closed:  # noqa: ASYNC110 - the session runs in this loop
                await asyncio.sleep(0)

    def process(self) -> tuple[OutputStream, int]:
        """A container ``c`` whose init has a stdout; the process's end of that."""
        container: Container = self.registry.new("c", self.registry.runtimes.default, False, {})
        container.status = Status.RUNNING
        process = Process("c", "init", ("x",), Stdio(stdout=StreamSpec(StreamMode.STREAM)), False)
        process.pid, process.status = 1, Status.RUNNING
        read_end, write_end = os.pipe()
        keeper = self.registry.keeper
        slot = keeper.counters.allocate()
        stream = OutputStream(keeper, "fd/c/init/stdout", read_end, slot, lambda count: None)
        process.streams["stdout"] = stream
        container.processes["init"] = process
        return stream, write_end

    async def close(self) -> None:
        self.sock.close()
        await self.ended()
        self.supervisor.close()


def as_host(tmp_path: Path, body: Callable[[Host], Awaitable[None]], **limits: int) -> None:
    async def scenario() -> None:
        host = Host(tmp_path, **limits)
        await body(host)
        await host.close()

    watched_loop.run(scenario())


# -- requests ---------------------------------------------------------------------------------------


def test_nothing_is_answered_before_hello_and_everything_after(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        refusal = await host.ask(1, "agent.hello", protocol_min=7, protocol_max=9)
        assert refusal["code"] == "FAILED_PRECONDITION"
        assert "must be updated" in refusal["message"]
        await host.greet()
        assert (await host.ask(1, "agent.ping"))["generation"] == 1
        assert (await host.ask(2, "container.list"))["containers"] == []

    as_host(tmp_path, body)


@pytest.mark.parametrize(
    "method, params, code, says",
    [
        ("agent.explode", {}, "UNIMPLEMENTED", "no method"),
        ("__init__", {}, "UNIMPLEMENTED", "no method"),
        ("container.state", {}, "INVALID_ARGUMENT", "'container' is missing"),
        ("container.state", {"container": "../x"}, "INVALID_ARGUMENT", "'container'"),
        ("container.state", {"container": "unknown"}, "NOT_FOUND", "no container unknown"),
        ("container.state", {"container": "x", "deadline_ms": 0}, "INVALID_ARGUMENT", "'deadline_ms'"),
        ("container.state", {"container": "x", "request_id": ""}, "INVALID_ARGUMENT", "'request_id'"),
        ("events.subscribe", {"after": -1}, "INVALID_ARGUMENT", "'after'"),
        ("stream.attach", {"container": "unknown"}, "NOT_FOUND", "no container unknown"),
    ],
)
def test_a_request_that_cannot_be_is_one_typed_error_and_the_connection_goes_on(
    tmp_path: Path, method: str, params: dict[str, Any], code: str, says: str
) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        error = await host.ask(1, method, **params)
        assert error["code"] == code
        assert says in error["message"]
        assert "generation" in await host.ask(2, "agent.ping")

    as_host(tmp_path, body)


def test_requests_are_answered_out_of_order_and_cancelled_one_by_one(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        host.process()
        host.send(
            [0, 1, "container.wait", [{"container": "c"}]], [0, 2, "process.wait", [{"container": "c"}]]
        )
        assert "generation" in await host.ask(3, "agent.ping")
        host.send([2, "rpc.cancel", [{"msgid": 1}]], [2, "rpc.cancel", [{"msgid": 77}]], [2, "rpc.new", [{}]])
        _, msgid, error, _ = await host.receive()
        assert (msgid, error["code"]) == (1, "CANCELLED")
        host.send([0, 4, "container.wait", [{"container": "c", "deadline_ms": 20}]])
        _, msgid, error, _ = await host.receive()
        assert (msgid, error["code"]) == (4, "DEADLINE_EXCEEDED")

    as_host(tmp_path, body)


def test_more_requests_in_flight_than_allowed_are_refused_one_by_one(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        host.process()
        for number in range(MAX_IN_FLIGHT):
            host.send([0, number, "container.wait", [{"container": "c"}]])
        error = await host.ask(MAX_IN_FLIGHT, "agent.ping")
        assert error["code"] == "RESOURCE_EXHAUSTED"
        host.send([2, "rpc.cancel", [{"msgid": 0}]])
        await host.receive()
        assert "generation" in await host.ask(MAX_IN_FLIGHT + 1, "agent.ping")

    as_host(tmp_path, body)


def test_with_too_many_in_flight_in_all_a_connection_still_has_a_few_of_its_own(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        host.process()
        limit = host.registry.bounds.limits.max_in_flight_total
        for number in range(limit + 1):
            host.send([0, number, "container.wait", [{"container": "c"}]])
        _, msgid, error, _ = await host.receive()
        assert (msgid, error["code"]) == (limit, "RESOURCE_EXHAUSTED")
        assert error["details"] == {"limit": "max_in_flight_total", "value": limit}
        other, its_sock = host.connect()
        mine, host.sock, host.session = host.sock, its_sock, other
        await host.greet()
        for number in range(ALWAYS - 1):
            host.send([0, number, "container.wait", [{"container": "c"}]])
        assert "generation" in await host.ask(ALWAYS, "agent.ping")
        host.send([0, ALWAYS, "container.wait", [{"container": "c"}]])
        assert (await host.ask(ALWAYS + 1, "agent.ping"))["details"]["limit"] == "max_in_flight_total"
        mine.close()
        await host.ended()
        async with asyncio.timeout(10):
            while host.registry.bounds.in_flight > ALWAYS:  # noqa: ASYNC110 - they end in this loop
                await asyncio.sleep(0)
        host.closed.clear()
        assert "generation" in await host.ask(ALWAYS + 1, "agent.ping")

    as_host(tmp_path, body, max_in_flight_total=20)


# -- hosts that are late, crowded out, or flood -----------------------------------------------------


def test_who_is_not_let_in_is_told_at_hello_and_may_ask_again(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        host.crowded = RpcError(Code.RESOURCE_EXHAUSTED, "full", limit="max_connections", value=3)
        refusal = await host.ask(0, "agent.hello", protocol_min=1, protocol_max=1)
        assert (refusal["code"], refusal["details"]["value"]) == ("RESOURCE_EXHAUSTED", 3)
        host.crowded = None
        await host.greet()
        assert host.welcomed == [host.session]

    as_host(tmp_path, body)


def hello_refused(host: Host) -> bytes:
    host.crowded = RpcError(Code.RESOURCE_EXHAUSTED, "full")
    return hello_with(b"")


@pytest.mark.parametrize(
    "sends, says",
    [
        (lambda _host: b"", "hello did not come"),
        (lambda _host: b"\x94\x00", "hello did not come"),
        (hello_refused, "hello did not come"),
    ],
)
def test_who_does_not_say_hello_is_not_waited_for(
    tmp_path: Path, sends: Callable[[Host], bytes], says: str
) -> None:
    async def body(host: Host) -> None:
        host.sock.sendall(sends(host))
        message = await host.receive()
        if message[0] == 1:
            message = await host.receive()
        assert (message[1], message[2][0]["kind"]) == ("rpc.error", "late")
        assert says in message[2][0]["message"]
        assert await host.receive() is None

    as_host(tmp_path, body, max_stall_ms=100)


def test_half_a_message_is_not_waited_for_and_none_at_all_is(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        await asyncio.sleep(0.3)  # three times as long: an idle host is no late one
        assert "generation" in await host.ask(1, "agent.ping")
        host.sock.sendall(msgpack.packb([0, 2, "agent.ping", [{}]])[:-1])
        message = await host.receive()
        assert (message[1], message[2][0]["kind"]) == ("rpc.error", "late")
        assert "the rest of a message" in message[2][0]["message"]
        assert await host.receive() is None
        assert host.registry.bounds.unfinished == 0

    as_host(tmp_path, body, max_stall_ms=100)


def test_who_takes_none_of_its_answers_is_dropped(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        host.process()
        host.sock.setblocking(False)
        asked = msgpack.packb([0, 1, "container.list", [{}]])
        number = 0
        async with asyncio.timeout(20):
            while not host.closed:
                try:
                    host.sock.send(asked[:2] + bytes([number % 100]) + asked[3:])
                    number += 1
                except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                    await asyncio.sleep(0.01)
        assert host.session._wire.unread < wire.MAX_UNREAD + wire.TURN * 2000

    as_host(tmp_path, body, max_stall_ms=200)


def test_unfinished_messages_have_a_bound_in_all(tmp_path: Path) -> None:
    """Half a message each: whoever passes the bound goes, unless what it has sent is small."""

    async def body(host: Host) -> None:
        await host.greet()
        half = b"\x94\x00\x01\xda\xff\xff" + b"x" * 65000
        large = b"\x94\x00\x01\xdb\x00\x0f\x00\x00" + b"x" * 500_000
        _, its_sock = host.connect()
        its_sock.sendall(half[:1000])
        await asyncio.get_running_loop().sock_sendall(host.sock, large)
        async with asyncio.timeout(10):
            while host.registry.bounds.unfinished < 500_000:  # noqa: ASYNC110 - read in this loop
                await asyncio.sleep(0)
        second, other_sock = host.connect()
        mine, host.sock = host.sock, other_sock
        with contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(other_sock, large)
        message = await host.receive()
        assert (message[1], message[2][0]["kind"]) == ("rpc.error", "exhausted")
        assert "max_unfinished" in message[2][0]["message"]
        assert host.closed == [second]
        for sock in (its_sock, other_sock):
            sock.close()
        host.sock = mine
        host.closed.clear()

    as_host(tmp_path, body, max_unfinished=600_000)


def test_a_flood_has_one_turn_among_others(tmp_path: Path) -> None:
    """A thousand requests are there before the bystander's one; it is answered long before the last."""

    async def body(host: Host) -> None:
        await host.greet()
        host.process()
        flood = b"".join(
            msgpack.packb([0, number, "container.state", [{"container": "c"}]]) for number in range(1000)
        )
        host.sock.sendall(flood)
        other, its_sock = host.connect()
        flooder, host.sock = host.sock, its_sock
        await host.greet()
        await host.ask(1, "agent.ping")
        assert len(flood) - other._wire.unread > 0
        assert host.session._wire.connection.unfinished > len(flood) // 2
        host.sock = flooder
        its_sock.close()
        await host.ended()
        host.closed.clear()
        answered = [(await host.receive())[1] for _ in range(1000)]
        assert answered == list(range(1000))

    as_host(tmp_path, body)


# -- broken contracts -------------------------------------------------------------------------------


def hello_with(more: bytes) -> bytes:
    frame: bytes = msgpack.packb([0, 0, "agent.hello", [{"protocol_min": 1, "protocol_max": 1}]])
    return frame + more


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"\xc1", "malformed"),
        (b"GET / HTTP/1.1\r\n\r\n", "malformed"),
        (msgpack.packb([0, 1, "agent.ping", [{}]]), "state"),
        (msgpack.packb([1, 1, None, {}]), "direction"),
        (b"\xdb" + (MAX_FRAME + 1).to_bytes(4, "big"), "oversized"),
        (msgpack.packb([2, "rpc.cancel", [{}]]), "state"),
        (hello_with(msgpack.packb([0, 1, "agent.ping", [{}]])), "state"),
        (hello_with(b"\xc1"), "malformed"),
    ],
)
def test_a_breach_is_one_rpc_error_and_then_the_end(tmp_path: Path, data: bytes, kind: str) -> None:
    async def body(host: Host) -> None:
        host.sock.sendall(data)
        message = await host.receive()
        assert message[:2] == [2, "rpc.error"]
        assert message[2][0]["kind"] == kind or kind == "malformed"
        assert message[2][0]["message"]
        assert await host.receive() is None
        assert len(host.closed) == 1

    as_host(tmp_path, body)


def test_a_malformed_cancel_is_a_breach(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        host.send([2, "rpc.cancel", [{"msgid": "1"}]])
        message = await host.receive()
        assert (message[1], message[2][0]["kind"]) == ("rpc.error", "malformed")
        assert await host.receive() is None

    as_host(tmp_path, body)


def test_a_host_that_leaves_ends_its_waits_and_nothing_else(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        host.process()
        host.send([0, 1, "container.wait", [{"container": "c"}]])
        await host.ask(2, "agent.ping")
        host.sock.close()
        await host.ended()
        async with asyncio.timeout(10):
            while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110 - the wait runs in this loop
                await asyncio.sleep(0)
        assert list(host.registry.containers) == ["c"]

    as_host(tmp_path, body)


# -- hosts that do not read -------------------------------------------------------------------------


def test_a_host_that_never_reads_is_not_read_either(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        host.process()
        sent = stalled = 0
        rest = b""
        while stalled < 50:
            frame = rest or msgpack.packb([0, sent + 10, "container.state", [{"container": "c"}]])
            try:
                rest = frame[host.sock.send(frame) :]
                sent, stalled = sent + (not rest), 0
            except BlockingIOError:
                rest, stalled = frame, stalled + 1
                await asyncio.sleep(0)
        assert host.session._wire.unread < wire.MAX_UNREAD + wire.TURN * 2000
        for number in range(sent):
            assert (await host.receive())[1] == number + 10
        host.sock.sendall(rest)
        assert (await host.receive())[1] == sent + 10
        assert "generation" in await host.ask(2, "agent.ping")

    as_host(tmp_path, body)


def test_a_subscriber_that_does_not_read_is_disconnected_and_nobody_else(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        mine, (lazy, its_sock) = host.sock, host.connect()
        host.sock = its_sock
        await host.greet()
        await host.ask(1, "events.subscribe")
        host.sock = mine
        await host.greet()
        await host.ask(1, "events.subscribe")
        number = 0
        async with asyncio.timeout(20):
            while not host.closed:
                number += 1
                host.registry.events.publish("test", payload="x" * 1000)
                assert lazy._wire.unread < wire.MAX_UNREAD + 2000
                message = await host.receive()
                assert message[2][0]["seq"] == number
        assert host.closed == [lazy]
        host.closed.clear()
        its_sock.close()
        host.registry.events.publish("after")
        assert (await host.receive())[2][0]["type"] == "after"

    as_host(tmp_path, body, max_event_bytes=65536)


def test_a_slow_subscriber_that_the_ring_still_covers_misses_nothing(tmp_path: Path) -> None:
    """More than fits its buffers is published while it does not read; then it reads."""

    async def body(host: Host) -> None:
        await host.greet()
        await host.ask(1, "events.subscribe", after=0)
        for _ in range(800):
            host.registry.events.publish("test", payload="x" * 1000)
        assert host.session._wire.unread < wire.MAX_UNREAD + wire.TURN * 2000
        assert [(await host.receive())[2][0]["seq"] for _ in range(800)] == list(range(1, 801))
        host.registry.events.publish("after")
        assert (await host.receive())[2][0]["type"] == "after"

    as_host(tmp_path, body, max_event_bytes=1 << 21)


def test_a_subscription_replays_what_was_missed_and_says_what_is_lost(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        for container in ("c", "d", "c"):
            host.registry.events.publish("test", container)
        assert await host.ask(1, "events.subscribe", after=1, container="c") == {"last": 3, "dropped": 0}
        assert (await host.receive())[2][0]["seq"] == 3
        host.registry.events.publish("test", "d")
        host.registry.events.publish("test", "c")
        assert (await host.receive())[2][0]["seq"] == 5
        host.process()
        error = await host.ask(2, "stream.attach", container="c")
        assert error["code"] == "FAILED_PRECONDITION"
        assert "carries events" in error["message"]

    as_host(tmp_path, body)


# -- attach -----------------------------------------------------------------------------------------


def test_the_connection_becomes_the_streams_right_behind_the_reply(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        stream, process = host.process()
        os.write(process, b"output")
        assert await host.ask(1, "stream.attach", container="c", stream="stdout") == {"offset": 0}
        assert len(host.closed) == 1
        rest = b"".join(bytes([item]) for item in host._unpacker)  # what came with the reply, byte by byte
        async with asyncio.timeout(10):
            while len(rest) < 6:
                rest += await asyncio.get_running_loop().sock_recv(host.sock, 100)
        assert rest == b"output"
        assert stream.attached
        host.sock.close()
        os.close(process)
        stream.close()

    as_host(tmp_path, body)


@pytest.mark.parametrize(
    "params, says",
    [
        ({"offset": 5}, "it is at 0"),
        ({"stream": "stderr"}, "no stream stderr"),
        ({"process": "p"}, "no process p"),
    ],
)
def test_an_attach_that_is_refused_leaves_the_connection_as_it_was(
    tmp_path: Path, params: dict[str, Any], says: str
) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        stream, process = host.process()
        assert says in (await host.ask(1, "stream.attach", **{"container": "c", **params}))["message"]
        assert "generation" in await host.ask(2, "agent.ping")
        stream.close()
        os.close(process)

    as_host(tmp_path, body)


def test_bytes_sent_before_the_reply_are_a_breach(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        stream, process = host.process()
        attach = msgpack.packb([0, 1, "stream.attach", [{"container": "c"}]])
        host.sock.sendall(attach + b"early")
        message = await host.receive()
        assert (message[1], message[2][0]["kind"]) == ("rpc.error", "early_bytes")
        assert await host.receive() is None
        assert not stream.attached
        stream.close()
        os.close(process)

    as_host(tmp_path, body)


def test_large_answers_are_not_made_for_a_host_that_does_not_read(tmp_path: Path) -> None:
    """Each of the hundred is almost a megabyte, and each is there once the host reads; ping does not wait."""
    count, words = 100, ("x" * 100_000,) * 9

    async def body(host: Host) -> None:
        await host.greet()
        container: Container = host.registry.new("c", host.registry.runtimes.default, False, {})
        container.processes["p"] = Process("c", "p", words, Stdio(), False)
        ask = [{"container": "c"}]
        host.send(*([0, number, "container.state", ask] for number in range(count)))
        host.send([0, count, "agent.ping", [{}]])
        for _ in range(1000):
            await asyncio.sleep(0)
        assert 0 < host.session._wire.unread <= wire.MAX_UNREAD + MAX_ROOM
        answered: set[int] = set()
        while len(answered) < count + 1:
            _, msgid, error, result = await host.receive()
            assert error is None
            answered.add(msgid)
            if msgid == 0:
                assert len(msgpack.packb(result)) > 900_000
        container.processes.clear()

    as_host(tmp_path, body)


def test_a_large_answer_that_waits_for_room_can_be_cancelled(tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        await host.greet()
        container: Container = host.registry.new("c", host.registry.runtimes.default, False, {})
        container.processes["p"] = Process("c", "p", ("x" * 100_000,) * 9, Stdio(), False)
        ask = [{"container": "c"}]
        host.send(*([0, number, "container.state", ask] for number in range(10)))
        host.send([0, 10, "container.state", [{"container": "c", "deadline_ms": 1}]])
        host.send([2, "rpc.cancel", [{"msgid": 9}]])
        errors: dict[int, str] = {}
        for _ in range(11):
            _, msgid, error, _ = await host.receive()
            if error is not None:
                errors[msgid] = error["code"]
        assert errors.pop(9) == "CANCELLED"
        assert set(errors) <= {10}
        container.processes.clear()

    as_host(tmp_path, body)
