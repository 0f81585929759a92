"""One shell, from its opening to its end.

It ends by itself, or is ended: SIGHUP to everybody in its session, as when a terminal is hung up, and
SIGKILL to those who are still there after GRACE_SECONDS. Our child is not reaped before: as long as it is a
zombie, its session's number is nobody else's. What has left for a session of its own lives on, and so do
background jobs of a shell that has exited by itself, as they do under ssh.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import time
from collections.abc import Callable

from gcsagent.common.loop import Loop, Timer
from gcsagent.shell.child import Child
from gcsagent.shell.containers import Place
from gcsagent.shell.enter import Plan
from gcsagent.shell.pipes import Pipes
from gcsagent.shell.pty import Terminal
from gcsagent.shell.relay import Relay
from protocol.errors import Code, RpcError
from protocol.families.shell import OpenShell, ShellEnd, ShellExit, ShellState
from protocol.types import Winsize

GRACE_SECONDS = 2.0
LINGER_SECONDS = 30.0
"""How long a client may take to close its connection once its shell has ended; as for stream.attach."""

DEFAULT_COMMANDS = (("bash",), ("sh",))
_MAX_REPORT = 4096


class Shell:
    """``opened`` is called once, with None or with why it could not be; ``ended`` once, after that."""

    def __init__(
        self,
        loop: Loop,
        ident: str,
        params: OpenShell,
        place: Place,
        who: tuple[str, str],
        opened: Callable[[RpcError | None], None],
        ended: Callable[[Shell], None],
    ) -> None:
        """``who``: the peer, and what it calls itself. ``place`` is this one's to close. Raises RpcError."""
        self.ident, self.params, self.who = ident, params, who
        self.exit: ShellExit | None = None
        self.was_open = False
        self._loop, self._place, self._opened, self._ended = loop, place, opened, ended
        self._started = time.monotonic()
        self._reason: ShellEnd | None = None
        self._relay: Relay | None = None
        self._limit: Timer | None = None
        self._grace: Timer | None = None
        self._linger: Timer | None = None
        self._opening, self._zombie = True, False
        self._words = b""
        self._pidfd = -1
        try:
            self._start()
        except OSError as error:
            place.close()
            raise RpcError(
                Code.RESOURCE_EXHAUSTED, f"the guest cannot start a shell: {error}", errno=error.errno or 0
            ) from error

    def _start(self) -> None:
        self._report, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            commands = [
                list(each) for each in ((self.params.argv,) if self.params.argv else DEFAULT_COMMANDS)
            ]
            place = self._place
            plan = Plan(
                commands,
                self._environment(),
                theirs,
                place.pidfd,
                place.root,
                place.namespaces,
                self.params.terminal,
            )
            self._child = self._spawn(plan)
        except BaseException:
            os.close(self._report)
            raise
        finally:
            os.close(theirs)
        self.pid = self._child.pid
        os.set_blocking(self._report, False)
        try:
            self._pidfd = os.pidfd_open(self._child.pid)
        except OSError:
            os.kill(self._child.pid, signal.SIGKILL)
            os.waitpid(self._child.pid, 0)
            self._child.close()
            os.close(self._report)
            raise
        self._loop.watch(self._report, lambda _events: self._read_report())
        self._loop.watch(self._pidfd, lambda _events: self._on_exit())
        if self._place.pidfd >= 0:
            self._loop.watch(self._place.pidfd, lambda _events: self._container_ended())

    def _spawn(self, plan: Plan) -> Child:
        if not plan.terminal:
            return Pipes(plan)
        return Terminal(plan, self.params.winsize.rows, self.params.winsize.cols)

    def _environment(self) -> dict[str, str]:
        given = (each.partition("=") for each in self._place.env)
        return {**{name: value for name, _, value in given}, "TERM": self.params.term, **self.params.env}

    # -- opening --------------------------------------------------------------------------------

    def _read_report(self) -> None:
        """The child says what went wrong; that it says nothing, and the end of file, is exec's success."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._report, _MAX_REPORT):
                self._words += data
            self._end_opening()

    def _end_opening(self) -> None:
        if not self._opening:
            return
        self._opening = False
        self._loop.forget(self._report)
        os.close(self._report)
        failure: RpcError | None = None
        for line in self._words.splitlines():
            words = json.loads(line)
            self.pid = self._child.session = int(words.get("pid", self.pid))
            if "step" in words:
                failure = self._failure(words["step"], int(words["errno"]), str(words["error"]))
        if failure is None and self._reason is not None:
            failure = RpcError(Code.CANCELLED, "the shell was ended before it had begun")
        self.was_open = failure is None
        if failure is None and self.params.timeout_ms is not None:
            self._limit = self._loop.after(self.params.timeout_ms / 1000, lambda: self.end(ShellEnd.TIMEOUT))
        self._opened(failure)

    def _failure(self, step: str, number: int, words: str) -> RpcError:
        name = self.params.argv[0] if self.params.argv else "bash or sh"
        where = f"container {self._place.container}" if self._place.pid else "the guest"
        hint = "; `gcsctl shell` without a container has the guest's own programs" if self._place.pid else ""
        if step != "exec":
            return RpcError(Code.INTERNAL, f"could not {step}: {words}{hint}", errno=number)
        if number in (errno.ENOENT, errno.ENOTDIR):
            return RpcError(
                Code.NOT_FOUND,
                f"there is no {name} in {where}, or not the interpreter it names{hint}",
                exec_error="not_found",
                errno=number,
                field="argv",
            )
        return RpcError(
            Code.PERMISSION_DENIED,
            f"{name} cannot be executed in {where}: {os.strerror(number)}{hint}",
            exec_error="not_executable",
            errno=number,
            field="argv",
        )

    def give_up(self) -> None:
        """It takes too long to open, or nobody wants it any more: ``opened`` is told, if that is to come."""
        if self._opening:
            self._reason = ShellEnd.HANGUP
            self._child.signal(signal.SIGKILL)
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def connect(self, sock: socket.socket, first: bytes) -> None:
        """``sock`` is this one's from here on; ``first`` goes out before all else."""
        self._relay = Relay(self._loop, self._child, sock, first, self.disconnect)

    # -- open -----------------------------------------------------------------------------------

    def state(self) -> ShellState:
        return ShellState(
            shell=self.ident,
            pid=self.pid,
            argv=self.params.argv,
            peer=self.who[0],
            client=self.who[1],
            running_ms=self._running_ms(),
            container=self._place.container,
        )

    def resize(self, winsize: Winsize) -> None:
        self._child.resize(winsize.rows, winsize.cols)

    def close_input(self, offset: int) -> None:
        """Raises RpcError: FAILED_PRECONDITION."""
        if self.params.terminal:
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"shell {self.ident} is on a terminal, where the end of the input is typed (^D)",
                field="shell",
            )
        if self._relay is not None:
            self._relay.end_input(offset)

    def end(self, reason: ShellEnd) -> None:
        """Has it end; the first reason counts."""
        if self.exit is not None or self._reason is not None:
            return
        self._reason = reason
        self._child.signal(signal.SIGHUP, signal.SIGCONT)
        self._grace = self._loop.after(GRACE_SECONDS, self._kill)

    def _kill(self) -> None:
        self._grace = None
        self._child.signal(signal.SIGKILL)
        if self._zombie:
            self._reap()

    def disconnect(self) -> None:
        """The client has gone, or is sent away: that ends a shell."""
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        if self.exit is not None:
            self._let_go()
        elif self._reason is None:
            self._reason = ShellEnd.HANGUP
            self._grace = self._loop.after(GRACE_SECONDS, self._kill)
            self._child.signal(signal.SIGHUP, signal.SIGCONT)
        self._child.close()

    def _container_ended(self) -> None:
        self._loop.forget(self._place.pidfd)
        self.end(ShellEnd.CONTAINER)

    # -- the end --------------------------------------------------------------------------------

    def _on_exit(self) -> None:
        self._loop.forget(self._pidfd)
        if self._opening:
            self._read_report()
            self._end_opening()
        if self._grace is not None and self._child.signal():
            self._zombie = True  # until those who are left of its session have had their time
        else:
            self._reap()

    def _reap(self) -> None:
        _, status = os.waitpid(self._child.pid, 0)
        os.close(self._pidfd)
        for timer in (self._limit, self._grace):
            if timer is not None:
                timer.cancel()
        if self._place.pidfd >= 0:
            self._loop.forget(self._place.pidfd)
        if self._relay is not None:
            self._relay.finish()
        self._child.close()
        produced = self._relay.produced if self._relay is not None else 0
        code = os.waitstatus_to_exitcode(status)
        reason = self._why(-code)
        self._place.close()
        self.exit = ShellExit(
            128 - code if code < 0 else code, max(-code, 0), reason, produced, self._running_ms()
        )
        if self._relay is None:
            self._let_go()
        else:
            self._linger = self._loop.after(LINGER_SECONDS, self.disconnect)
        self._ended(self)

    def _why(self, number: int) -> ShellEnd:
        if self._reason is not None:
            return self._reason
        if number == signal.SIGKILL and self._place.ends():  # the kernel kills all of its pid namespace
            return ShellEnd.CONTAINER
        return ShellEnd.SIGNALLED if number > 0 else ShellEnd.EXITED

    def _let_go(self) -> None:
        if self._linger is not None:
            self._linger.cancel()

    def _running_ms(self) -> int:
        return round((time.monotonic() - self._started) * 1000)
