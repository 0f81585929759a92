"""One process of a container, from the request for it to its exit record."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import Any

from gcsagent.agent import fifo
from gcsagent.agent.attachable import Stream
from gcsagent.agent.journal import RequestMark
from gcsagent.agent.stdio import close_all
from gcsagent.agent.terminal import DiscardedTty, TtyStream
from protocol.checks import INIT
from protocol.errors import Code, RpcError
from protocol.schema import to_wire
from protocol.types import ExitRecord, Oom, ProcessState, Reason, Rusage, Status, Stdio

UNCLAIMED_SECONDS = 60.0
"""How long auto_delete leaves output for somebody to come for it, after the process's end or the last
detach: a host whose connection was lost is back by then."""


class Process:
    """``key`` is what the supervisor knows it by."""

    def __init__(
        self, container: str, ident: str, args: tuple[str, ...], stdio: Stdio, auto_delete: bool
    ) -> None:
        self.container, self.ident, self.args, self.stdio = container, ident, args, stdio
        self.auto_delete = auto_delete
        self.key = f"{container}/{ident}"
        self.pid = 0
        self.pidfd = -1
        self.killed = False
        """SIGKILL has been sent to it from here."""
        self.status = Status.CREATING
        self.streams: dict[str, Stream] = {}
        self.slots: dict[str, list[int]] = {}
        self.fifos = fifo.wanted(stdio)
        self.created_at_ns = time.time_ns()
        self.started_at_ns = 0
        self.exit: ExitRecord | None = None
        self.early_exit: dict[str, Any] | None = None
        self.request: RequestMark | None = None
        self.claim_timer: asyncio.TimerHandle | None = None
        self._ended_at = 0.0
        self._exited: asyncio.Future[ExitRecord] = asyncio.get_running_loop().create_future()

    @property
    def is_init(self) -> bool:
        return self.ident == INIT

    @property
    def alive(self) -> bool:
        return self.pid > 0 and self.exit is None

    async def wait(self) -> ExitRecord:
        return await asyncio.shield(self._exited)

    def signal(self, number: int) -> None:
        """Raises FAILED_PRECONDITION when it has ended already, or is not there yet."""
        try:
            if self.pidfd < 0:
                raise ProcessLookupError
            signal.pidfd_send_signal(self.pidfd, number)
            self.killed = self.killed or number == signal.SIGKILL
        except ProcessLookupError as error:
            creating = self.status is Status.CREATING
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"process {self.ident} of container {self.container}"
                f" {'is still being created' if creating else 'has already ended'}",
                status=(Status.CREATING if creating else Status.STOPPED).value,
            ) from error

    def kill(self) -> None:
        """SIGKILLs it, unless it was faster."""
        with contextlib.suppress(RpcError):
            self.signal(signal.SIGKILL)

    def resize(self, rows: int, cols: int) -> None:
        stream = self.streams.get("tty")
        if not isinstance(stream, (TtyStream, DiscardedTty)):
            raise RpcError(Code.FAILED_PRECONDITION, f"process {self.ident} has no terminal to resize")
        stream.resize(rows, cols)

    def stream(self, name: str) -> Stream:
        """Raises NOT_FOUND naming the streams there are."""
        stream = self.streams.get(name)
        if stream is None:
            there = ", ".join(self.streams) or "none"
            raise RpcError(Code.NOT_FOUND, f"process {self.ident} has no stream {name}; it has {there}")
        return stream

    def restore_exit(self, record: ExitRecord) -> None:
        """It had ended before this agent began."""
        self.exit, self.status = record, Status.STOPPED
        self._ended_at = asyncio.get_running_loop().time()
        for stream in self.streams.values():
            stream.process_ended()
        self._exited.set_result(record)

    def end(self, record: dict[str, Any], oom: Oom | None, victim: bool = False) -> ExitRecord:
        """Takes the supervisor's record of the exit; waiters are answered.

        ``victim``: it was the kernel that killed it, for want of memory.
        """
        code = os.waitstatus_to_exitcode(record["status"])
        number = -code if code < 0 else 0
        reason = Reason.SIGNALLED if number else Reason.EXITED
        self.exit = ExitRecord(
            exit_code=128 + number if number else code,
            signal=number,
            reason=Reason.OOM if victim else reason,
            pid=self.pid,
            started_at_ns=self.started_at_ns,
            exited_at_ns=record["exited_at_ns"],
            core_dumped=os.WCOREDUMP(record["status"]),
            rusage=Rusage(**record["rusage"]),
            oom=oom,
            streams={
                name: count
                for name, stream in self.streams.items()
                if (count := stream.produced()) is not None
            },
        )
        self.status = Status.STOPPED
        self._ended_at = asyncio.get_running_loop().time()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        for stream in self.streams.values():
            stream.process_ended()
        if not self._exited.done():
            self._exited.set_result(self.exit)
        return self.exit

    @property
    def finished(self) -> bool:
        """It has ended and nobody is owed a byte of its output."""
        return self.exit is not None and all(stream.settled() for stream in self.streams.values())

    def forsaken_at(self) -> float | None:
        """Loop time from which output nobody came for is nobody's due; None while somebody may be owed."""
        at = self._ended_at
        for stream in self.streams.values():
            if not stream.settled():
                since = stream.idle_since()
                if since is None:
                    return None
                at = max(at, since)
        return at + UNCLAIMED_SECONDS

    def close(self) -> None:
        """Lets go of everything it holds. Its waiters have had their answer, or get one now."""
        if self.claim_timer is not None:
            self.claim_timer.cancel()
        close_all(self.streams)
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        if not self._exited.done():
            self._exited.set_exception(
                RpcError(Code.NOT_FOUND, f"process {self.ident} of container {self.container} was deleted")
            )
            self._exited.exception()  # nobody need be waiting

    def state(self) -> ProcessState:
        return ProcessState(
            container=self.container,
            process=self.ident,
            status=self.status,
            pid=self.pid,
            args=self.args,
            terminal=self.stdio.terminal,
            created_at_ns=self.created_at_ns,
            started_at_ns=self.started_at_ns,
            exit=self.exit,
            streams={name: stream.state() for name, stream in self.streams.items()},
        )

    def document(self) -> dict[str, Any]:
        """What process.json says of it."""
        return {
            "version": 1,
            "container": self.container,
            "process": self.ident,
            "pid": self.pid,
            "args": list(self.args),
            "stdio": to_wire(self.stdio),
            "slots": self.slots,
            "fifos": {name: [each.path, each.device, each.inode] for name, each in self.fifos.items()},
            "closing_at": {
                name: offset
                for name, stream in self.streams.items()
                if (offset := stream.closing_at()) is not None
            },
            "auto_delete": self.auto_delete,
            "request": self.request,
            "created_at_ns": self.created_at_ns,
            "started_at_ns": self.started_at_ns,
            "exit": to_wire(self.exit) if self.exit is not None else None,
        }
