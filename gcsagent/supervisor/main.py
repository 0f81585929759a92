"""Puts the supervisor together: one loop, one agent, its channel, the signals.

How it ends: SIGTERM, SIGINT or the power button ask the agent to stop the containers; when it reports that
it has (``stop``), or its time is up, or it is not there to ask, what is left is killed here.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import time

from gcsagent.common import boot, channel
from gcsagent.common.loop import READ, WRITE, Loop, Timer
from gcsagent.supervisor import heldup, requests
from gcsagent.supervisor.agentproc import EX_CONFIG, AgentProcess
from gcsagent.supervisor.exits import ExitRecords
from gcsagent.supervisor.log import log, on_line
from gcsagent.supervisor.notify import Notifier
from gcsagent.supervisor.reaper import Call, Reaper
from gcsagent.supervisor.shellproc import ShellProcess
from gcsagent.supervisor.store import FdStore, StoreError
from gcsagent.supervisor.upgrade import Upgrade, UpgradeError

TYPE_CHECKING = False  # typing itself is half a megabyte
if TYPE_CHECKING:
    from typing import Any

GRACE_SECONDS = 10.0
"""Between TERM and KILL for containers when the supervisor is told to stop."""

CLEANUP_SECONDS = 20.0
"""Behind the grace; after that the agent is taken to be stuck, and what is left is killed from here."""

KILL_SECONDS = 10.0
BURST = 64
"""Packets taken in one wake-up: a busy agent must not keep exits from being seen."""

MAX_UNREAD = 1024
"""Answers the agent may leave unread before its next requests are left unread, too."""

MAX_ERROR = 4096
"""Characters of a refusal; it must fit a packet, whatever the agent sent."""

CRASH_LOOP = 5
"""Deaths in a row before READY after which a guest gives up, unless it is told to hold."""


class Supervisor:
    """``guest``: this is PID 1 and the machine ends with it."""

    def __init__(
        self, state: str, agent_env: dict[str, str], guest: bool, on_failure: str, watchdog: float = 0.0
    ) -> None:
        self._state, self._guest, self._on_failure = state, guest, on_failure
        self._action = ""
        self._exit_code = 0
        self._stopping = ""
        self._stop_timer: Timer | None = None
        self._stop_at = 0.0
        self._channel: socket.socket | None = None
        self._outbox: list[tuple[bytes, tuple[int, ...]]] = []
        self.loop = Loop()
        self.notify = Notifier(self.loop)
        self.store = FdStore(_room_for_descriptors())
        self.console_directory = os.path.join(state, "console")
        self.code_directory = os.path.join(state, "code")
        for directory in (self.console_directory, self.code_directory):
            os.makedirs(directory, mode=0o700, exist_ok=True)
        self.exits = ExitRecords(self.loop, os.path.join(state, "exits"))
        self.reaper = Reaper(self.loop, self.exits, self.answer_call, self._process_ended)
        self.agent = AgentProcess(
            self.loop,
            self.reaper,
            agent_env,
            self._agent_connected,
            self._agent_ended,
            lambda pid, again: heldup.free(pid, self.store.items(), self.reaper, again),
            watchdog,
        )
        self.upgrade = Upgrade(self.loop, self.agent, self._upgraded)
        self.shell: ShellProcess | None = None
        self._env = agent_env
        self.waiting: dict[str, int] = {}  # call key -> id of the request that waits for it
        self.listing: list[Any] = []  # of which the agent has asked for a page, and may for the next
        self._install_signals()
        on_line(lambda: self._send([None, "log", {}]))

    def run(self) -> int:
        """Runs until stopped; returns the exit status (outside a guest)."""
        try:
            self.agent.start()
        except OSError as error:
            self._give_up(f"the agent cannot be started: {error}")
        self.loop.run()
        self.notify.close()
        return self._exit_code

    def allow_shell(self, address: str) -> None:
        """Listens for debug shells. Raises OSError."""
        self.shell = ShellProcess(self.loop, self.reaper, self._env, address, self._end_if_done)

    # -- the agent ------------------------------------------------------------------------------

    def agent_ready(self) -> None:
        self.agent.set_ready()
        if self._guest:
            boot.reached("ready", self._state)
        self.notify.ready(f"serving, agent generation {self.agent.generation}")
        log("info", "agent ready", generation=self.agent.generation, pid=self.agent.pid)
        if self._stopping:
            self._ask_agent_to_stop()  # the one that had been asked is dead

    def _agent_connected(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._channel = sock
        self.loop.watch(sock.fileno(), self._on_channel)

    def _agent_ended(self, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        while self._take_packet():
            pass  # what it said before it died counts: descriptors to hold, above all
        self._drop_channel()
        was_ready = self.agent.ready
        if self._action:
            self._end_if_done()
            return
        self.notify.status(f"the agent ended with status {code}; starting the next one")
        log("warning", "the agent ended", status=code, ready=was_ready, generation=self.agent.generation)
        if self.upgrade.agent_ended(code):
            self.agent.start_again()
            return
        never_ready = not was_ready and self.agent.generation - self.agent.failures <= 1
        if code == EX_CONFIG and never_ready:
            self._give_up("the agent cannot work with these settings (its log says why)", code)
        elif not was_ready and self.agent.failures + 1 >= CRASH_LOOP and self._guest and never_ready:
            self._give_up(f"the agent ended {CRASH_LOOP} times before it was ready (status {code})", code)
        else:
            self.agent.restart(code)

    def _upgraded(self, status: dict[str, Any]) -> None:
        self._send([None, "upgrade", status])

    def _give_up(self, reason: str, code: int = -1) -> None:
        """``code`` as in :meth:`AgentProcess.restart`."""
        if not self._guest:
            self._exit_code = 1
            self.finish("exit")
            return
        boot.failed("agent", reason)
        if self._on_failure == "poweroff":
            self.finish("poweroff")
        else:
            self.agent.restart(code)  # backs off for ever; the console has a log to look at

    # -- the channel ----------------------------------------------------------------------------

    def _on_channel(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        hung_up = events & ~(READ | WRITE)
        for _ in range(BURST):
            if len(self._outbox) >= MAX_UNREAD and not hung_up:
                return
            if not self._take_packet():
                return

    def _take_packet(self) -> bool:
        """Carries out one packet; False when there is none now, or there will be none any more."""
        if self._channel is None:
            return False
        try:
            received = channel.receive(self._channel)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True  # it died with packets of ours unread: said once, before what it had sent
        except (channel.ChannelError, OSError) as error:
            log("error", "a broken packet from the agent; it is killed", error=str(error))
            self._drop_channel()
            self.agent.kill()
            return False
        if received is None:
            self._drop_channel()
            self.agent.expect_end()
            return False
        self._on_request(*received)
        return True

    def _on_request(self, message: list[Any], fds: list[int]) -> None:
        ident, operation, arguments = message
        if type(ident) is not int:
            channel.close_all(fds)
            if ident is None and operation == "alive":
                self.agent.alive()
                self.upgrade.agent_alive()
            return
        name = operation if isinstance(operation, str) else "a request"
        try:
            reply = requests.handle(self, ident, operation, arguments, fds)
        except (OSError, requests.RequestError, StoreError) as error:
            self._refuse(ident, name, str(error), error.errno or 0)
        except UpgradeError as error:
            self._refuse(ident, name, str(error))
        except Exception as error:  # a fault of ours must not end PID 1, and with it the machine
            log("error", "a fault in the supervisor", operation=name[:64], error=repr(error))
            self._refuse(ident, name, f"a fault in the supervisor: {error!r}")
        else:
            if reply.now and ident >= 0:  # below that it is a word nobody waits for the answer to
                self._send([ident, None, reply.result], reply.fds)

    def _refuse(self, ident: int, operation: str, problem: str, errno: int = 0) -> None:
        message = f"{operation[:64]}: {problem}"[:MAX_ERROR]
        self._send([ident, {"errno": errno, "message": message}, None])

    def _send(self, message: list[Any], fds: tuple[int, ...] = ()) -> None:
        """Queues one packet. The queue holds duplicates of the descriptors only while the agent is slow."""
        if self._channel is None:
            return
        packet = channel.pack(message)
        if not self._outbox:
            try:
                channel.send(self._channel, packet, fds)
                return
            except BlockingIOError:
                pass
            except OSError:
                return  # it is dying; its exit will be seen
        try:
            self._outbox.append((packet, _duplicates(fds)))
        except OSError as error:
            log("error", "the agent does not read its answers; it is killed", error=str(error))
            self.agent.kill()
        self._watch_channel()

    def _watch_channel(self) -> None:
        """Nothing is read from an agent that leaves our answers unread."""
        if self._channel is not None:
            events = (WRITE if self._outbox else 0) | (READ if len(self._outbox) < MAX_UNREAD else 0)
            self.loop.watch(self._channel.fileno(), self._on_channel, events)

    def _flush(self) -> None:
        while self._outbox and self._channel is not None:
            packet, fds = self._outbox[0]
            try:
                channel.send(self._channel, packet, fds)
            except BlockingIOError:
                break
            except OSError:  # it is dying: what it still said is read first
                self._clear_outbox()
                break
            del self._outbox[0]
            channel.close_all(fds)
        self._watch_channel()

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self.loop.forget(self._channel.fileno())
            self._channel.close()
            self._channel = None
        self._clear_outbox()
        self.waiting.clear()
        self.listing = []

    def _clear_outbox(self) -> None:
        for _, fds in self._outbox:
            channel.close_all(fds)
        self._outbox.clear()

    # -- what the reaper reports ----------------------------------------------------------------

    def answer_call(self, call: Call) -> None:
        """Tells the agent how a call ended, if it waits for it."""
        ident = self.waiting.pop(call.key, None)
        process = self.reaper.processes.get(call.process) if call.process else None
        if process is not None and self._action:
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)  # it came while all others were killed
        if ident is not None:
            fds = (process.pidfd,) if process is not None else ()
            result = {**(call.result or {}), "exit": self.exits.records.get(call.process)}
            self._send([ident, None, result], fds)
        self._end_if_done()

    def _process_ended(self, key: str, record: dict[str, Any]) -> None:
        self._send([None, "exit", {"process": key, **record}])
        self._end_if_done()

    # -- the end --------------------------------------------------------------------------------

    def _install_signals(self) -> None:
        read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the wake-up descriptor needs a handler to be there
        self._signals = read_end
        self.loop.watch(read_end, self._on_signal)

    def _on_signal(self, _events: int) -> None:
        numbers = set(os.read(self._signals, 4096))
        if signal.SIGCHLD in numbers:
            self.reaper.on_child()
        if numbers & {signal.SIGTERM, signal.SIGINT}:
            # In a guest SIGINT is Ctrl-Alt-Delete: init has asked the kernel for it with CAD_OFF.
            reboot = self._guest and signal.SIGINT in numbers
            self.ask_to_stop("reboot" if reboot else "poweroff" if self._guest else "exit")

    def ask_to_stop(self, action: str, grace: float = GRACE_SECONDS) -> None:
        """Has the agent stop the containers; it answers with ``stop``, or time runs out.

        Asked again, with less grace than is left, time runs out sooner.
        """
        stop_at = time.monotonic() + grace + CLEANUP_SECONDS
        if self._action or (self._stopping and stop_at >= self._stop_at):
            return
        if self._stopping:
            self._finish_at(stop_at)
            return
        log("info", "stopping", action=action, grace=grace)
        self.notify.stopping()
        if not self.agent.ready and not self.reaper.processes:
            self.finish(action)
            return
        self._stopping = action
        self._finish_at(stop_at)
        if self.agent.ready:
            self._ask_agent_to_stop()

    def _finish_at(self, stop_at: float) -> None:
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        self._stop_at = stop_at
        self._stop_timer = self.loop.after(stop_at - time.monotonic(), lambda: self.finish(self._stopping))

    def _ask_agent_to_stop(self) -> None:
        """The grace is what is left of it: an agent may have been killed over it."""
        grace = max(0.0, self._stop_at - time.monotonic() - CLEANUP_SECONDS)
        self._send([None, "shutdown", {"action": self._stopping, "grace_ms": round(grace * 1000)}])

    def finish(self, action: str) -> None:
        """Kills the agent and every process still alive, then ends as ``action`` says."""
        if self._action:
            return
        self._action = action
        self.agent.stop()
        if self.shell is not None:
            self.shell.stop()
        for call in self.reaper.calls.values():
            self.reaper.cancel_call(call.key)
        for process in self.reaper.processes.values():
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
        self.loop.after(KILL_SECONDS, self._end)
        self._end_if_done()

    def _end_if_done(self) -> None:
        shell = self.shell is not None and self.shell.pid
        if self._action and not self.agent.pid and not shell and not self.reaper.busy:
            self._end()

    def _end(self) -> None:
        if self._guest:
            from gcsagent.supervisor import machine

            machine.end(self._action)
        self.loop.stop()


def _room_for_descriptors() -> int:
    """How many the agent may have held, so that there are always some left for our own work."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft - min(1024, soft // 2)


def _duplicates(fds: tuple[int, ...]) -> tuple[int, ...]:
    """Raises OSError, and then has made none."""
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError:
        channel.close_all(made)
        raise
    return tuple(made)
