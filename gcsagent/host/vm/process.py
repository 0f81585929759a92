"""Child processes that cannot outlive the launcher, waited for through their pidfd.

Each child gets PR_SET_PDEATHSIG, so even a SIGKILLed launcher leaves none behind, and a session of its
own, so a Ctrl-C at the terminal reaches the launcher only, which then ends the guest in order. The
parent-death signal follows the *thread* that forked (prctl(2)): start children from the thread that runs
the event loop.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gcsagent.host.vm.errors import LaunchError

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

# How long a SIGKILLed process may take to be reaped; only a task stuck in the kernel needs more.
_REAP_SECONDS = 10.0

_READ_SIZE = 65536


class Child:
    """One running child process. Make it with `spawn` from within the event loop."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], pidfd: int) -> None:
        self.name = name
        self.pid = popen.pid
        self._popen = popen
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._on_exit)

    @classmethod
    def spawn(
        cls,
        name: str,
        argv: Sequence[str | Path],
        *,
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
    ) -> Child:
        """Starts `argv`; standard streams are /dev/null unless given as descriptors.

        Raises:
            LaunchError: it cannot be executed, or not watched: then it has been killed.
        """
        try:
            popen = subprocess.Popen(
                [os.fspath(word) for word in argv],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise LaunchError(f"cannot start {name}: {error}") from error
        try:
            pidfd = os.pidfd_open(popen.pid)
        except OSError as error:
            popen.kill()
            popen.wait(_REAP_SECONDS)
            raise LaunchError(f"cannot watch {name}: {error}") from error
        return cls(name, popen, pidfd)

    @property
    def returncode(self) -> int | None:
        """None while it runs; then the exit status, or minus the signal number that ended it."""
        return self._popen.returncode

    async def wait(self) -> int:
        """The return code, once it has exited. Any number of tasks may wait."""
        return await asyncio.shield(self._exited)

    def signal(self, signum: int) -> None:
        """Sends a signal; nothing happens if it has exited already."""
        if self._popen.returncode is None:
            signal.pidfd_send_signal(self._pidfd, signum)

    def destroy(self) -> None:
        """SIGKILL, then reap, without giving up control: safe while the task is being cancelled."""
        if self._popen.returncode is None:
            self.signal(signal.SIGKILL)
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if poller.poll(_REAP_SECONDS * 1000):
                self._on_exit()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_exit(self) -> None:
        if self._popen.poll() is None:
            return
        self._loop.remove_reader(self._pidfd)
        if not self._exited.done():
            self._exited.set_result(self._popen.returncode)


class PipeReader:
    """Reads a pipe as it fills and hands every chunk to `sink`; owns the read end."""

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._eof: asyncio.Future[None] = self._loop.create_future()
        self._fd, self.write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # O_NONBLOCK belongs to each end's own description; the writer's end blocks as programs expect.
        os.set_blocking(self.write_end, True)
        self._loop.add_reader(self._fd, self._on_readable)

    def close_write_end(self) -> None:
        """Call once the writer has been started; only then can end of file be seen."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    async def drained(self, timeout: float) -> None:
        """Returns at end of file, or after `timeout` seconds if some process keeps the pipe open."""
        await asyncio.wait([self._eof], timeout=timeout)

    def close(self) -> None:
        """Takes in what the pipe still holds, then closes it."""
        self.close_write_end()
        while self._fd >= 0 and self._read_once():
            pass
        self._finish()

    def _on_readable(self) -> None:
        self._read_once()

    def _read_once(self) -> bool:
        try:
            chunk = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return False
        if not chunk:
            self._finish()
            return False
        self._sink(chunk)
        return True

    def _finish(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        if not self._eof.done():
            self._eof.set_result(None)


class Tail:
    """Keeps the last bytes of a stream that may be endless: a guest can make the daemon complain for ever."""

    def __init__(self, limit: int = 16384) -> None:
        self._limit = limit
        self._data = b""

    def feed(self, chunk: bytes) -> None:
        """Adds bytes, forgetting the oldest beyond the limit."""
        self._data = (self._data + chunk)[-self._limit :]

    def text(self) -> str:
        """What is kept, decoded with replacement characters."""
        return self._data.decode("utf-8", "replace")

    def last_line(self) -> str:
        """The last line with something in it; empty if there is none."""
        lines = self.text().strip().splitlines()
        return lines[-1] if lines else ""


async def run(name: str, argv: Sequence[str | Path], seconds: float) -> tuple[int, str]:
    """Runs a program to its end; returns its status (minus the signal) and the last line it wrote.

    Raises:
        LaunchError: it cannot be executed.
        TimeoutError: it took longer, and was killed.
    """
    said = Tail()
    reader = PipeReader(said.feed)
    try:
        child = Child.spawn(name, argv, stdout=reader.write_end, stderr=subprocess.STDOUT)
        try:
            async with asyncio.timeout(seconds):
                status = await child.wait()
        finally:
            child.destroy()
    finally:
        reader.close()
    return status, said.last_line()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Holds back Ctrl-C for a moment: somebody who presses it twice must not stop the clean-up half-way.

    By a handler rather than the signal mask, since any other thread would take the signal in this one's
    place.
    """
    before = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread only; elsewhere nothing can interrupt.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda signum, frame: held.append(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def start_time(pid: int) -> int | None:
    """When `pid` started, in clock ticks after boot (proc(5), stat field 22); None if there is none.

    Together with the pid this names a process for good, since pids are reused. Zombies count as gone.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def open_pidfd(pid: int, started: int) -> int | None:
    """A pidfd of the process with that pid and start time, or None if it is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    # Checked after opening: the pidfd pins the process, so what matches now is what the pidfd means.
    if start_time(pid) == started:
        return pidfd
    os.close(pidfd)
    return None


async def wait_pidfd(pidfd: int, timeout: float | None) -> bool:
    """Whether the process exits within `timeout` seconds; None: for ever."""
    loop = asyncio.get_running_loop()
    exited = loop.create_future()

    def on_exit() -> None:
        if not exited.done():
            exited.set_result(None)

    loop.add_reader(pidfd, on_exit)
    try:
        async with asyncio.timeout(timeout):
            await exited
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True


def _die_with(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The parent may have died before the prctl: then no signal will ever come.
        if os.getppid() != parent:
            os._exit(1)

    return prepare
