"""Puts the supervisor together: one loop, one agent, its channel, the signals.

How it ends: SIGTERM, SIGINT or the power button ask the agent to stop the containers; when it reports that
it has (``stop``), or its time is up, or it is not there to ask, what is left is killed here.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from typing import Any

from gcsagent.common import channel
from gcsagent.supervisor import requests
from gcsagent.supervisor.agentproc import EX_CONFIG, AgentProcess
from gcsagent.supervisor.exits import ExitRecords
from gcsagent.supervisor.log import boot_stage, log
from gcsagent.supervisor.loop import READ, WRITE, Loop, Timer
from gcsagent.supervisor.reaper import Call, Reaper
from gcsagent.supervisor.store import FdStore, StoreError

GRACE_SECONDS = 10.0
"""Between TERM and KILL for containers when the supervisor is told to stop."""

STOP_SECONDS = GRACE_SECONDS + 20.0
"""After that the agent is taken to be stuck, and what is left is killed from here."""

KILL_SECONDS = 10.0
CRASH_LOOP = 5
"""Deaths in a row before READY after which a guest gives up, unless it is told to hold."""


class Supervisor:
    """``guest``: this is PID 1 and the machine ends with it."""

    def __init__(self, state: str, agent_env: dict[str, str], guest: bool, on_failure: str) -> None:
        self._guest, self._on_failure = guest, on_failure
        self._action = ""
        self._exit_code = 0
        self._stop_timer: Timer | None = None
        self._channel: socket.socket | None = None
        self._outbox: list[tuple[bytes, tuple[int, ...]]] = []
        self.loop = Loop()
        self.store = FdStore()
        self.console_directory = os.path.join(state, "console")
        os.makedirs(self.console_directory, mode=0o700, exist_ok=True)
        self.exits = ExitRecords(self.loop, os.path.join(state, "exits"))
        self.reaper = Reaper(self.loop, self.exits, self._call_ended, self._process_ended)
        self.agent = AgentProcess(self.loop, self.reaper, agent_env, self._agent_connected, self._agent_ended)
        self.waiting: dict[str, int] = {}  # call key -> id of the request that waits for it
        self._install_signals()

    def run(self) -> int:
        """Runs until stopped; returns the exit status (outside a guest)."""
        self.agent.start()
        self.loop.run()
        return self._exit_code

    # -- the agent ------------------------------------------------------------------------------

    def agent_ready(self) -> None:
        self.agent.set_ready()
        if self._guest and self.agent.generation == 1:
            boot_stage("ready")
        log("info", "agent ready", generation=self.agent.generation, pid=self.agent.pid)

    def _agent_connected(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._channel = sock
        self.loop.watch(sock.fileno(), self._on_channel)

    def _agent_ended(self, status: int, was_ready: bool) -> None:
        code = os.waitstatus_to_exitcode(status)
        self._drop_channel()
        if self._action:
            self._end_if_done()
            return
        log("warning", "the agent ended", status=code, ready=was_ready, generation=self.agent.generation)
        never_ready = not was_ready and self.agent.generation - self.agent.failures <= 1
        if code == EX_CONFIG and never_ready:
            self._give_up("the agent cannot work with these settings (its log says why)")
        elif not was_ready and self.agent.failures + 1 >= CRASH_LOOP and self._guest and never_ready:
            self._give_up(f"the agent ended {CRASH_LOOP} times before it was ready (status {code})")
        else:
            self.agent.restart()

    def _give_up(self, reason: str) -> None:
        if not self._guest:
            self._exit_code = 1
            self.finish("exit")
            return
        boot_stage("agent", reason)
        if self._on_failure == "poweroff":
            self.finish("poweroff")
        else:
            self.agent.restart()  # backs off for ever; the console has a log to look at

    # -- the channel ----------------------------------------------------------------------------

    def _on_channel(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        while self._channel is not None:
            try:
                received = channel.receive(self._channel)
            except BlockingIOError:
                return
            except channel.ChannelError as error:
                log("error", "a broken packet from the agent; it is killed", error=str(error))
                self._drop_channel()
                self.agent.kill()
                return
            except OSError:
                received = None  # reset: it was killed with packets of ours unread
            if received is None:
                self._drop_channel()
                return
            self._on_request(*received)

    def _on_request(self, message: list[Any], fds: list[int]) -> None:
        ident, operation, arguments = message
        if type(ident) is not int:
            channel.close_all(fds)
            return
        try:
            reply = requests.handle(self, ident, operation, arguments, fds)
        except OSError as error:
            self._send([ident, {"errno": error.errno or 0, "message": f"{operation}: {error}"}, None])
        except (requests.RequestError, StoreError) as error:
            self._send([ident, {"errno": 0, "message": f"{operation}: {error}"}, None])
        else:
            if reply.now:
                self._send([ident, None, reply.result], reply.fds)

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
                self.loop.watch(self._channel.fileno(), self._on_channel, READ | WRITE)
            except OSError:
                return  # it is dying; its exit will be seen
        self._outbox.append((packet, tuple(os.dup(fd) for fd in fds)))

    def _flush(self) -> None:
        while self._outbox and self._channel is not None:
            packet, fds = self._outbox[0]
            try:
                channel.send(self._channel, packet, fds)
            except BlockingIOError:
                return
            except OSError:
                self._drop_channel()
                return
            del self._outbox[0]
            channel.close_all(fds)
        if self._channel is not None:
            self.loop.watch(self._channel.fileno(), self._on_channel)

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self.loop.forget(self._channel.fileno())
            self._channel.close()
            self._channel = None
        for _, fds in self._outbox:
            channel.close_all(fds)
        self._outbox.clear()
        self.waiting.clear()

    # -- what the reaper reports ----------------------------------------------------------------

    def _call_ended(self, call: Call) -> None:
        ident = self.waiting.pop(call.key, None)
        if ident is None:
            return
        process = self.reaper.processes.get(call.process) if call.process else None
        fds = (process.pidfd,) if process is not None and process.pidfd >= 0 else ()
        self._send([ident, None, {**(call.result or {}), "exit": self.exits.records.get(call.process)}], fds)

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
            self.reaper.reap_orphans()
        if numbers & {signal.SIGTERM, signal.SIGINT}:
            # In a guest SIGINT is Ctrl-Alt-Delete: init has asked the kernel for it with CAD_OFF.
            reboot = self._guest and signal.SIGINT in numbers
            self.ask_to_stop("reboot" if reboot else "poweroff" if self._guest else "exit")

    def ask_to_stop(self, action: str) -> None:
        """Has the agent stop the containers; it answers with ``stop``, or time runs out."""
        if self._stop_timer is not None or self._action:
            return
        log("info", "stopping", action=action)
        if self._channel is None or not self.agent.ready:
            self.finish(action)
            return
        self._stop_timer = self.loop.after(STOP_SECONDS, lambda: self.finish(action))
        self._send([None, "shutdown", {"action": action, "grace_ms": int(GRACE_SECONDS * 1000)}])

    def finish(self, action: str) -> None:
        """Kills the agent and every process still alive, then ends as ``action`` says."""
        if self._action:
            return
        self._action = action
        self.agent.kill()
        for call in self.reaper.calls.values():
            self.reaper.cancel_call(call.key)
        for process in self.reaper.processes.values():
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
        self.loop.after(KILL_SECONDS, self._end)
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._action and not self.agent.pid and not self.reaper.processes:
            self._end()

    def _end(self) -> None:
        if self._guest:
            from gcsagent.supervisor import machine

            machine.end(self._action)
        self.loop.stop()


def raise_limits() -> None:
    """As many descriptors as the hard limit allows: they are what this program is for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def protect_from_oom() -> None:
    """Makes the kernel kill anything else first; containers get their own value set explicitly."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("-999")
    except OSError as error:
        log("warning", "cannot protect against the OOM killer", error=str(error))


def become_subreaper() -> None:
    """Containers and execs are re-parented to us, not to init. Before the first fork (prctl(2))."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_child_subreaper = 36
    if libc.prctl(pr_set_child_subreaper, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
