"""A live agent with real runc, and a host beside it that must not notice.

Every answer is one the contract has, none says INTERNAL without a runtime's words; the agent stays the same
process, its log has no traceback, its memory is bounded; a process of somebody else's goes on all the while;
at the end nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import msgpack

from gcsagent.host.vm.tools import cache_dir
from protocol.errors import Code, RpcError
from protocol.methods import ELSEWHERE, METHODS
from protocol.schema import SchemaError, from_wire, to_wire
from tests.cases.agents import RunningAgent, greeted
from tests.cases.bystander import undisturbed
from tests.cases.spine import close_box, open_box
from tests.cases.target import PIPES, Target, connect, creation, remove
from tests.fuzz import vectors
from tests.fuzz.tar import archives
from tests.fuzz.target import Broken

SECONDS = 60.0
"""For one answer on a machine that has other things to do."""

LOOK_EVERY, CLEAR_EVERY = 50, 250
GROWTH_KIB = 96 << 10
"""What the agent may grow by: its log ring, its journal of answers and its events are bounded, not empty."""

LONGEST_MS = 2000
"""What a request is given: those that wait for something else to happen take all of it."""

NOT_ASKED = {"agent.hello", "agent.shutdown", "agent.upgrade", *ELSEWHERE}
NOT_ASKED |= {"guest.snapshot_prepare"}  # it stops everybody, and says so
BOX, OURS = "somebodys-own", ("web", "c.1_2-x")


class Live:
    """``with`` an agent; what kind of input it is given is up to subclasses."""

    name, coverage = "", False

    def open(self, directory: Path) -> None:
        rootfs = str((cache_dir() / "demo-rootfs" / "current" / "rootfs").resolve())
        self.agent = RunningAgent("--log-level", "warning", "--watchdog", "off")
        self.target = Target(self.agent.address, rootfs, BOX, pace=6.0, execs=1)
        self._log = self.agent.directory / "log"
        self._read = self._count = 0
        self._before = self.agent.holdings()
        asyncio.run(open_box(self.target))
        self._asked_to_stop, self._bystander_failed, self.rounds = threading.Event(), list[BaseException](), 0
        self._bystander = threading.Thread(target=lambda: asyncio.run(self._stand_by()), daemon=True)
        self._bystander.start()
        self.restore()
        self._pid, self._kib = self.agent.agent_pid, self.agent.memory_kib()[1]
        self._generation = self.generation()

    def close(self) -> None:
        try:
            self._look()
            self._asked_to_stop.set()
            self._bystander.join(120)
            if self._bystander.is_alive() or self._bystander_failed:
                raise Broken(f"the bystander was disturbed: {self._bystander_failed}")
            asyncio.run(self._clear())
            asyncio.run(close_box(self.target))
            self.agent.assert_holds(self._before)
            if self.agent.stop() != 0:
                raise Broken("it did not end in order")
            self.agent.assert_nothing_left()
        finally:
            self.agent.destroy()

    async def _stand_by(self) -> None:
        try:
            async with undisturbed(self.target) as bystander:
                while not self._asked_to_stop.is_set():
                    await bystander.several(1)
                    self.rounds = bystander.rounds
                    await asyncio.sleep(0.2)  # it is to watch, not to be the load
        except BaseException as error:
            self._bystander_failed.append(error)

    def generation(self) -> int:
        with greeted(self.agent.socket_path, SECONDS) as now:
            return now

    def restore(self) -> None:
        """Back to the containers that inputs name."""

        async def make() -> None:
            await self._clear()
            async with await connect(self.target) as client:
                for ident in OURS:
                    await client.create_container(
                        creation(self.target, ident, ("sleep", "100000"), stdio=PIPES)
                    )
                await client.start_container(OURS[0])

        asyncio.run(make())

    async def _clear(self) -> None:
        async with await connect(self.target) as client:
            for _ in range(3):  # a sandbox goes after its members
                for state in await client.list_containers(processes=False):
                    if state.container != BOX:
                        with contextlib.suppress(RpcError):
                            await remove(client, state.container)
            for method, field, ident in (
                ("checkpoint.list", "checkpoints", "checkpoint"),
                ("storage.list", "mounts", "mount"),
            ):
                await self._undo(client, method, field, ident)

    async def _undo(self, client: Any, method: str, field: str, ident: str) -> None:
        undo = {"checkpoint": "checkpoint.delete", "mount": "storage.unmount"}[ident]
        listed = await client.call(method, from_wire(METHODS[method].params, {}))
        for each in getattr(listed, field):
            with contextlib.suppress(RpcError):
                await client.call(undo, from_wire(METHODS[undo].params, {ident: getattr(each, ident)}))

    def checked(self) -> None:
        """After each input; now and then thoroughly."""
        self._count += 1
        if self._bystander_failed:
            raise Broken(f"the bystander was disturbed: {self._bystander_failed[0]!r}")
        if self._count % LOOK_EVERY == 0:
            self._look()
        if self._count % CLEAR_EVERY == 0:
            self.restore()

    def _look(self) -> None:
        if self.generation() != self._generation:
            raise Broken(f"the agent was restarted: {self.agent.log_tail()[-3000:]}")
        with self._log.open(errors="replace") as log:
            log.seek(self._read)
            said = log.read()
            self._read = log.tell()
        if "Traceback" in said:
            at = said.index("Traceback")
            raise Broken(f"a traceback: {said[max(0, at - 300) : at + 2500]}")
        if (kib := self.agent.memory_kib()[1]) > self._kib + GROWTH_KIB:
            was, self._kib = self._kib, kib
            raise Broken(f"the agent has {kib} KiB, {was} at first")

    # -- a connection -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def greet(self) -> Any:
        """A connection, and a function that gives the next message, None at the end."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(SECONDS)
            sock.connect(self.agent.socket_path)
            unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, max_buffer_size=1 << 26)

            def following() -> Any:
                while True:
                    for message in unpacker:
                        return message
                    try:
                        data = sock.recv(1 << 16)
                    except ConnectionResetError:
                        data = b""
                    if not data:
                        return None
                    unpacker.feed(data)

            yield sock, following


class Methods(Live):
    """Arguments of every method: good ones, changed."""

    name = "methods"

    def seeds(self) -> list[bytes]:
        found = {method: params for method, params in vectors.requests().items() if method not in NOT_ASKED}
        made = to_wire(creation(self.target, "web", ("sh", "-c", "echo x; sleep 100"), stdio=PIPES))
        pod = to_wire(creation(self.target, "c.1_2-x", ("sleep", "100"), sandbox=None))
        exec_spec = {"args": ["sh", "-c", "echo x; cat"], "cwd": "/", "env": ["PATH=/bin:/usr/bin"]}
        documents = [[method, params] for method, params in found.items()]
        documents += [["container.create", made], ["container.create", pod]]
        documents += [["container.create", {**made, "container": "fresh"}]] * 3
        documents += [
            ["process.exec", {"container": "web", "process": "p", "spec": exec_spec, "stdio": made["stdio"]}]
        ] * 3
        documents += [[method, _at_ours(method, params)] for method, params in found.items()]
        return [msgpack.packb(document) for document in documents]

    def execute(self, data: bytes) -> Hashable:
        try:
            document = msgpack.unpackb(data, raw=False, strict_map_key=False)
            method, params = document
        except (ValueError, TypeError):
            return None
        if not isinstance(method, str) or method in NOT_ASKED or not isinstance(params, dict):
            return None
        if not _harmless(method, params):
            return None
        try:
            answer = self._asked(method, params)
        finally:
            self.checked()
        return answer

    def _asked(self, method: str, params: dict[Any, Any]) -> Hashable:
        wire = {**params, "deadline_ms": _deadline(params.get("deadline_ms", LONGEST_MS))}
        wire.pop("request_id", None)  # the answer to another request is no answer
        with self.greet() as (sock, following):
            sock.sendall(vectors.HELLO)
            following()
            try:
                sock.sendall(msgpack.packb([0, 1, method, [wire]]))
            except OSError as error:
                return "unsendable", error.errno
            while True:
                message = following()
                if message is None:
                    raise Broken(f"{method}: the connection was closed without an answer")
                if message[0] == 2 and message[1] == "rpc.error":
                    return "fault", message[2][0]["kind"]
                if message[0] == 2 and message[1] == "archive.ready":
                    return method, "ready"
                if message[0] == 1:
                    return _judged(method, message[2], message[3])


def _deadline(given: Any) -> Any:
    """As it is when it is no deadline; no longer than it is worth waiting for."""
    if given is None:  # the same as none: some requests then wait for ever
        return LONGEST_MS
    return min(given, LONGEST_MS) if type(given) is int else given


def _at_ours(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """The same of a container that is there."""
    return {
        **params,
        **{key: value for key, value in (("container", "web"), ("process", "init")) if key in params},
    }


def _harmless(method: str, params: dict[str, Any]) -> bool:
    """Not at the bystander's, and not the files of this machine."""
    if BOX in repr(params):
        return False
    return not (method.startswith("archive.") and not isinstance(params.get("container"), str))


def _judged(method: str, error: Any, result: Any) -> Hashable:
    if error is not None:
        code, details = Code(error["code"]), error.get("details", {})
        message = str(error["message"])
        if not message or len(message) > 20_000:
            raise Broken(f"{method}: an error of {len(message)} characters")
        if code is Code.INTERNAL and not {"runtime_error", "stderr", "exit_status"} & details.keys():
            raise Broken(f"{method}: INTERNAL: {message[:300]} {str(details)[:300]}")
        field = re.sub(r"\[\d+\]", "[]", str(details.get("field", "")))
        return method, str(code), field[:40], "".join(re.findall(r"[a-z ]+", message))[:40]
    if method not in METHODS:
        raise Broken("a method that there is not has a result")
    try:
        from_wire(METHODS[method].result, result)
    except SchemaError as wrong:
        raise Broken(f"{method}: its result breaks the contract: {wrong}") from wrong
    return method, "done"


class Wire(Live):
    """Any bytes on a connection: frames that are none, in any order, cut off anywhere."""

    name = "wire"

    def seeds(self) -> list[bytes]:
        calm = [
            msgpack.packb([0, number, method, [_at_ours(method, params)]])
            for number, (method, params) in enumerate(vectors.requests().items())
            if method not in NOT_ASKED
            and METHODS[method].deadline_ms is not None
            and not method.startswith("archive.")
        ]
        faults = vectors.frames("faults", "encodings", "notifications", "results")
        return [vectors.HELLO + each for each in calm] + [vectors.HELLO + each for each in faults] + faults

    def execute(self, data: bytes) -> Hashable:
        if any(method.encode() in data for method in (*NOT_ASKED - {"agent.hello"}, "archive.", BOX)):
            return None
        with self.greet() as (sock, following):
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)  # a host that is gone: what only waits is dropped
            except OSError:
                pass
            answers = []
            while (message := following()) is not None:
                answers.append(message)
        self.checked()
        return tuple(_kind(message) for message in answers[:8])


def _kind(message: Any) -> Hashable:
    if not isinstance(message, list) or len(message) < 3:
        return "stream"  # bytes of one, behind the reply that began it
    if message[0] == 2:
        return str(message[1]), str(message[2][0].get("kind", ""))
    if isinstance(message[2], dict):
        if message[2].get("code") == "INTERNAL" and not message[2].get("details"):
            raise Broken(f"INTERNAL: {message[2].get('message')}")
        return str(message[2].get("code"))
    return "done"


class Archives(Live):
    """Tar streams into a container."""

    name = "archive"

    def seeds(self) -> list[bytes]:
        return archives()

    def execute(self, data: bytes) -> Hashable:
        wire = {
            "container": OURS[0],
            "path": "/tmp/put",
            "make": True,
            "deadline_ms": 30_000,
            "max_bytes": 1 << 20,
        }
        if len(data) % 3 == 0:
            wire["copy"] = "a"
        with self.greet() as (sock, following):
            sock.sendall(vectors.HELLO)
            following()
            sock.sendall(msgpack.packb([0, 1, "archive.put", [wire]]))
            message = following()
            if message is not None and message[:2] == [2, "archive.ready"]:
                with contextlib.suppress(OSError):
                    for at in range(0, len(data), 1 << 16):
                        sock.sendall(
                            msgpack.packb([2, "archive.data", [{"data": data[at : at + (1 << 16)]}]])
                        )
                    if len(data) % 5:
                        sock.sendall(msgpack.packb([2, "archive.end", [{"bytes": len(data)}]]))
                    else:
                        sock.shutdown(socket.SHUT_WR)
                message = following()
        self.checked()
        if message is None:
            return "closed"
        if message[0] == 2:
            raise Broken(f"a notification instead of an answer: {message[1:]}")
        if message[2] is not None and message[2]["code"] == "INTERNAL":
            raise Broken(f"INTERNAL: {message[2]['message']}")
        return _judged("archive.put", message[2], message[3])
