"""Takes connections, keeps count of shells, and ends with the last of them.

Only the host may connect. What there is at the same time is bounded. A server that nobody has been connected
to for IDLE_SECONDS exits: the supervisor holds the listening socket, too, and starts another when it is used.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import struct
from collections.abc import Callable

from gcsagent.common.loop import Loop, Timer
from gcsagent.shell import containers
from gcsagent.shell.journal import Journal
from gcsagent.shell.session import Session
from gcsagent.shell.shell import Shell
from protocol.errors import Code, RpcError
from protocol.families.shell import MAX_SHELLS, OpenShell, ShellEnd, ShellExit, ShellList, ShellOpened
from protocol.limits import Limits

IDLE_SECONDS = 60.0
"""More than a client may take to close the connection of a shell that has ended."""

STOP_SECONDS = 5.0
"""What is left of shells after that, once the end has begun, is left to die with this process."""

MAX_CONNECTIONS = 1024
"""That have said hello, beside those of shells."""

MAX_STRANGERS = 256
"""That have not. One more, and the oldest gives way."""

MAX_ENDED = 64
"""Records of shells that have ended, for whoever asks late."""

LIMITS = Limits(max_connections=MAX_CONNECTIONS)


class Server:
    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        journal: Journal,
        *,
        state: str,
        peer_cid: int | None,
        supervisor: int,
        generation: int,
    ) -> None:
        """``supervisor``: the pid of the parent of all containers' inits. ``journal`` says when it ends."""
        self.loop, self.limits, self.generation = loop, LIMITS, generation
        self._listener, self._journal, self._state = listener, journal, state
        self._peer_cid, self._supervisor = peer_cid, supervisor
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            self.boot_id = file.read().strip()
        self._sessions: dict[Session, None] = {}  # in the order they came
        self._shells: dict[str, Shell] = {}
        self._ended: dict[str, Shell] = {}
        self._waiting: dict[tuple[Session, int], str] = {}
        self._idle: Timer | None = None
        self._stopping = False

    def run(self) -> None:
        """Until it is idle, told to end by SIGTERM, or the supervisor has ended."""
        read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # the wake-up descriptor needs a handler to be there
        self.loop.watch(read_end, lambda _events: self.stop())
        self.loop.watch(self._journal.fileno(), lambda _events: self.stop())
        self._listener.setblocking(False)
        self.loop.watch(self._listener.fileno(), lambda _events: self._accept())
        self._look_idle()
        self.loop.run()
        for shell in self._shells.values():
            shell.give_up()

    def stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        for fd in (self._listener.fileno(), self._journal.fileno()):
            self.loop.forget(fd)
        for shell in list(self._shells.values()):
            shell.end(ShellEnd.SHUTDOWN)
        self.loop.after(STOP_SECONDS, self.loop.stop)
        self._stop_if_done()

    def _stop_if_done(self) -> None:
        if self._stopping and not self._shells:
            self.loop.stop()

    def _look_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if not self._sessions and not self._shells:
            self._idle = self.loop.after(IDLE_SECONDS, self.loop.stop)

    # -- connections ----------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._journal.write("error", "cannot accept a connection to the debug shell", error=str(error))
            self.loop.forget(self._listener.fileno())
            self.loop.after(0.5, lambda: self.loop.watch(self._listener.fileno(), lambda _: self._accept()))
            return
        peer = self._peer_name(sock, address)
        if peer is None:
            self._journal.write(
                "warning", "a peer that is not the host was refused a shell", peer=str(address)
            )
            sock.close()
            return
        strangers = [each for each in self._sessions if not each.greeted]
        if len(strangers) >= MAX_STRANGERS:
            strangers[0].close()
        sock.setblocking(False)
        self._sessions[Session(self, sock, peer)] = None
        self._look_idle()

    def _peer_name(self, sock: socket.socket, address: object) -> str | None:
        """None: it may not connect."""
        if sock.family != socket.AF_VSOCK:
            peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, _ = struct.unpack("iII", peer)
            return f"unix:pid={pid},uid={uid}"
        assert isinstance(address, tuple)
        cid, port = address
        return f"vsock:{cid}:{port}" if self._peer_cid in (None, cid) else None

    def admit(self) -> None:
        """One that says hello. Raises RESOURCE_EXHAUSTED."""
        if sum(each.greeted for each in self._sessions) > MAX_CONNECTIONS:
            raise self.exhausted("max_connections", "connections are open: close some, or try again")

    def session_gone(self, session: Session) -> None:
        self._sessions.pop(session, None)
        for waiting in [each for each in self._waiting if each[0] is session]:
            del self._waiting[waiting]
        self._look_idle()

    # -- shells ---------------------------------------------------------------------------------

    def open(
        self, params: OpenShell, who: tuple[str, str], opened: Callable[[Shell, RpcError | None], None]
    ) -> Shell:
        """Raises RpcError, at once or by ``opened``."""
        try:
            return self._begin(params, who, opened)
        except RpcError as error:
            self._refused(params, who, error)
            raise

    def _begin(
        self, params: OpenShell, who: tuple[str, str], opened: Callable[[Shell, RpcError | None], None]
    ) -> Shell:
        if self._stopping:
            raise RpcError(Code.UNAVAILABLE, "the guest, or the supervisor, is being ended")
        if len(self._shells) >= MAX_SHELLS:
            raise self.exhausted("max_shells", "shells are open: end some, or try again", MAX_SHELLS)
        if params.container is None:
            place = containers.guest()
        else:
            place = containers.find(self._state, params.container, self._supervisor)

        def done(failure: RpcError | None) -> None:
            if failure is not None:
                self._refused(params, who, failure)
            opened(shell, failure)

        shell = Shell(self.loop, secrets.token_hex(6), params, place, who, done, self._shell_ended)
        self._shells[shell.ident] = shell
        return shell

    def opened(self, shell: Shell) -> ShellOpened:
        params, (peer, client) = shell.params, shell.who
        self._journal.write(
            "info",
            "shell opened",
            shell=shell.ident,
            container=params.container,
            argv=params.argv,
            pid=shell.pid,
            peer=peer,
            client=client,
            timeout_ms=params.timeout_ms,
        )
        return ShellOpened(shell.ident, shell.pid)

    def _refused(self, params: OpenShell, who: tuple[str, str], error: RpcError) -> None:
        self._journal.write(
            "warning",
            "shell refused",
            container=params.container,
            argv=params.argv,
            peer=who[0],
            client=who[1],
            error=str(error),
        )

    def _shell_ended(self, shell: Shell) -> None:
        del self._shells[shell.ident]
        if shell.was_open and shell.exit is not None:
            self._record(shell, shell.exit)
        self._look_idle()
        self._stop_if_done()

    def _record(self, shell: Shell, ended: ShellExit) -> None:
        self._journal.write(
            "info",
            "shell closed",
            shell=shell.ident,
            container=shell.params.container,
            argv=shell.params.argv,
            peer=shell.who[0],
            exit_code=ended.exit_code,
            signal=ended.signal,
            reason=ended.reason.value,
            duration_ms=ended.duration_ms,
        )
        self._ended[shell.ident] = shell
        while len(self._ended) > MAX_ENDED:
            oldest = self._ended.pop(next(iter(self._ended)))
            oldest.disconnect()
        for (session, msgid), _ in [each for each in self._waiting.items() if each[1] == shell.ident]:
            del self._waiting[session, msgid]
            session.shell_ended(msgid, shell)

    def shell(self, ident: str) -> Shell:
        """One that was opened and is alive. Raises RpcError: NOT_FOUND, FAILED_PRECONDITION."""
        if ident in self._ended:
            raise RpcError(Code.FAILED_PRECONDITION, f"shell {ident} has ended", field="shell")
        found = self._shells.get(ident)
        if found is None or not found.was_open:
            raise RpcError(Code.NOT_FOUND, f"there is no shell {ident}", field="shell")
        return found

    def list(self) -> ShellList:
        return ShellList(tuple(shell.state() for shell in self._shells.values() if shell.was_open))

    # -- who waits ------------------------------------------------------------------------------

    def wait_for(self, ident: str, session: Session, msgid: int) -> bool:
        """False: it has ended, and that has been answered. Raises RpcError."""
        ended = self._ended.get(ident)
        if ended is not None:
            session.shell_ended(msgid, ended)
            return False
        self._waiting[session, msgid] = self.shell(ident).ident
        return True

    def is_waiting(self, session: Session, msgid: int) -> bool:
        return (session, msgid) in self._waiting

    def wait_no_more(self, session: Session, msgid: int) -> None:
        self._waiting.pop((session, msgid), None)

    def exhausted(self, limit: str, what: str, value: int = 0) -> RpcError:
        most = value or getattr(self.limits, limit)
        return RpcError(Code.RESOURCE_EXHAUSTED, f"{most} {what} ({limit})", limit=limit, value=most)
