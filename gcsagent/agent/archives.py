"""``archive.*``: hands the connection and a root directory to an archiver, a process of its own.

From there on the agent has no part in it but to see to the end: that the host of a killed archiver is told,
and that the temporary name it may have left is removed. An agent that takes over does that for those that
are still at work (:meth:`Archives.resume`): the connection is theirs, and does not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import gcsagent
from gcsagent.agent.calls import CannotStart, Outcome
from gcsagent.agent.failures import not_started, tool_failed
from gcsagent.agent.roots import Root, open_root
from gcsagent.archiver.job import CONNECTION_FD, NOTE_FD, ROOT_FD, Job
from gcsagent.common.files import write_new
from protocol.errors import Code, RpcError
from protocol.families.archive import GetArchive, PutArchive
from protocol.framing import Response, encode
from protocol.schema import to_wire

if TYPE_CHECKING:
    from gcsagent.agent.container import Container
    from gcsagent.agent.registry import Registry

MAX_AT_ONCE = 16
"""Archivers at work: each is an interpreter, some 15 MiB."""

LONGEST = 24 * 3600.0
BEYOND_DEADLINE = 45.0
"""Seconds an archiver has to say itself that its deadline has passed, and to see its host close."""

LINGER_SECONDS, SWEEP_SECONDS = 30.0, 30.0

CALL = "archive/"
"""What the supervisor's names of archivers begin with; a token follows."""

_log = logging.getLogger("agent.archives")


class Archives:
    def __init__(self, registry: Registry, state: str) -> None:
        self._registry = registry
        self._notes = os.path.join(state, "archives")
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> tuple[asyncio.Task[None], ...]:
        return tuple(self._tasks)

    # -- beginning --------------------------------------------------------------------------------

    def check(self, params: PutArchive | GetArchive) -> None:
        """Whether it may begin now. Raises RpcError."""
        if len(self._tasks) >= MAX_AT_ONCE:
            raise RpcError(
                Code.RESOURCE_EXHAUSTED, f"{MAX_AT_ONCE} archives are under way: wait for one of them"
            )
        if params.container is not None:
            self._registry.get(params.container).check("copy files of")

    def begin(
        self,
        connection: socket.socket,
        msgid: int,
        method: str,
        params: PutArchive | GetArchive,
        seconds: float | None,
    ) -> None:
        """Has an archiver serve ``connection``, which is ours then. Raises RpcError or OSError: it is not."""
        self.check(params)
        container = self._registry.get(params.container) if params.container is not None else None
        root = open_root(container)
        token = secrets.token_hex(8)
        try:
            note = self._make_note(token, params.container)
        except OSError:
            os.close(root.fd)
            raise
        job = Job(method, msgid, to_wire(params), seconds, root.mountinfo, root.uids, root.gids)
        self._look_after(self._serve(connection, job, root, note, token), container)

    def _make_note(self, token: str, container: str | None) -> int:
        """Where the archiver writes down its temporary name; beside it a file says whose root that is in."""
        os.makedirs(self._notes, mode=0o700, exist_ok=True)
        path = os.path.join(self._notes, token)
        try:
            write_new(f"{path}.of", json.dumps(container).encode())
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            self._drop_note(token)
            raise

    def _look_after(self, work: Coroutine[Any, Any, None], container: Container | None) -> None:
        task = self._registry.spawn(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if container is not None:
            container.visitors.add(task)
            task.add_done_callback(container.visitors.discard)

    # -- to its end -------------------------------------------------------------------------------

    async def _serve(self, connection: socket.socket, job: Job, root: Root, note: int, token: str) -> None:
        failure = None
        try:
            failure = await self._run(connection, job, root, note, token)
            if failure is not None:
                _log.error("an archive was broken off", extra={"error": str(failure), **failure.details})
                await self._sweep(root, note)
        except asyncio.CancelledError:
            failure = RpcError(Code.CANCELLED, "the container is being deleted, or the agent is going down")
            await self._sweep(root, note)
            raise
        finally:
            os.close(note)
            os.close(root.fd)
            self._forget(token)
            if failure is None:
                connection.close()
            else:
                self._registry.spawn(_tell(connection, job, failure))

    async def _run(
        self, connection: socket.socket, job: Job, root: Root, note: int, token: str
    ) -> RpcError | None:
        timeout = LONGEST if job.seconds is None else min(LONGEST, job.seconds + BEYOND_DEADLINE)
        fds = {CONNECTION_FD: connection.fileno(), ROOT_FD: root.fd, NOTE_FD: note}
        try:
            outcome = await self._archiver(job.to_text(), timeout, fds, CALL + token)
        except CannotStart as error:
            return not_started(error, f"in the guest: {error}")
        return None if outcome.status == 0 else _broken_off(outcome)

    async def _archiver(self, argument: str, timeout: float, fds: dict[int, int], key: str = "") -> Outcome:
        caller = self._registry.caller
        tree = os.path.dirname(os.path.dirname(os.path.abspath(gcsagent.__file__)))  # uploaded code, maybe
        argv = [sys.executable, "-P", "-X", "utf8", "-m", "gcsagent.archiver", argument]
        env = {**caller.env, "PYTHONPATH": tree}
        return await caller.run(argv, timeout, fds=fds, extra={"env": env}, key=key)

    async def _sweep(self, root: Root, note: int) -> None:
        if not os.fstat(note).st_size:
            return
        try:
            await self._archiver("--sweep", SWEEP_SECONDS, {ROOT_FD: root.fd, NOTE_FD: note})
        except CannotStart as error:
            _log.error("a temporary file of a broken archive may be left", extra={"error": str(error)})

    def _forget(self, token: str) -> None:
        self._registry.caller.forget(CALL + token)
        self._drop_note(token)

    def _drop_note(self, token: str) -> None:
        for name in (token, f"{token}.of"):
            with contextlib.suppress(OSError):  # what stays goes with the next agent
                os.unlink(os.path.join(self._notes, name))

    async def end(self) -> None:
        """Breaks off all that is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # -- after another agent ----------------------------------------------------------------------

    def resume(self) -> None:
        """Looks after what an earlier agent has begun."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._notes):
                if not name.endswith(".of"):
                    continue
                try:
                    with open(os.path.join(self._notes, name)) as file:
                        ident = json.load(file)
                except (OSError, ValueError):  # killed as it was written: nothing had begun
                    ident = None
                container = self._registry.containers.get(ident or "")
                gone = ident is not None and container is None
                work = self._take_over(name.removesuffix(".of"), container, gone=gone)
                self._look_after(work, container)

    async def _take_over(self, token: str, container: Container | None, *, gone: bool) -> None:
        """``gone``: its container is, and what it had in there; no container at all is the guest's root."""
        caller = self._registry.caller
        try:
            await caller.join(CALL + token)
        except asyncio.CancelledError:
            caller.cancel(CALL + token)
            await caller.join(CALL + token)
            raise
        finally:
            if not gone:
                await self._sweep_after(token, container)
            self._forget(token)

    async def _sweep_after(self, token: str, container: Container | None) -> None:
        try:
            note = os.open(os.path.join(self._notes, token), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return
        try:
            root = open_root(container)
            try:
                await self._sweep(root, note)
            finally:
                os.close(root.fd)
        except (RpcError, OSError) as error:
            _log.error("a temporary file of a broken archive may be left", extra={"error": str(error)})
        finally:
            os.close(note)


def _broken_off(outcome: Outcome) -> RpcError:
    how = f"signal {-outcome.status}" if outcome.status < 0 else f"status {outcome.status}"
    return tool_failed(
        outcome,
        f"the archive was broken off: the process in the guest that served it ended with {how};"
        " what was whole by then is there",
    )


async def _tell(connection: socket.socket, job: Job, failure: RpcError) -> None:
    """Answers in the archiver's place, waits for the host to close, and closes.

    Not amid an archive that is being read: half a message may be under way, and the end says enough.
    """
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    frame = encode(Response(job.msgid, failure.to_wire(), None))
    with connection, contextlib.suppress(OSError, TimeoutError):
        if job.method == "archive.get":
            return
        async with asyncio.timeout(LINGER_SECONDS):
            await loop.sock_sendall(connection, frame)
            while await loop.sock_recv(connection, 65536):
                pass
