"""Runs the real ``gcsagent`` on this machine, and counts what it holds and leaves behind."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgpack
from tenacity import Retrying, retry_if_not_result, stop_after_delay, wait_exponential

REPO = Path(__file__).resolve().parents[2]
START_SECONDS = 20.0
ANSWER_SECONDS = 30.0
"""To hello, of an agent that may be busy."""
STOP_SECONDS = 30.0
LOG_TAIL = 6000
RUNC_COPY = "runtime/*/*/runc.*"
"""Below the state directory: what a killed runc leaves of a copy of itself, which goes with its container."""

T = TypeVar("T")


def eventually(look: Callable[[], T], seconds: float = 10.0) -> T:
    """What ``look`` sees once that is true, or at the end of ``seconds``: the caller asserts on it."""
    attempts = Retrying(
        retry=retry_if_not_result(bool),
        stop=stop_after_delay(seconds),
        wait=wait_exponential(multiplier=0.005, max=0.2),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
    seen: T = attempts(look)
    return seen


@contextlib.contextmanager
def greeted(path: str, timeout: float, connected: socket.socket | None = None) -> Iterator[int]:
    """A connection that has said hello: the agent's generation. ``connected`` is used if given."""
    with connected or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        if connected is None:
            connection.connect(path)
        connection.sendall(msgpack.packb([0, 0, "agent.hello", [{"protocol_min": 1, "protocol_max": 1}]]))
        unpacker = msgpack.Unpacker(raw=False)
        while data := connection.recv(65536):
            unpacker.feed(data)
            for message in unpacker:
                yield int(message[3]["generation"])
                return
    raise ConnectionError("the agent closed before saying hello")


@dataclass(frozen=True, slots=True)
class Holdings:
    """What supervisor and agent hold between requests: counted, so that a leak of one shows."""

    fds: tuple[int, int]
    threads: tuple[int, int]
    children: int
    mounts: tuple[str, ...]
    cgroups: tuple[str, ...]
    files: tuple[str, ...]

    def differences(self, before: Holdings) -> list[str]:
        """What is not as it was; empty is right."""
        found = [
            f"{what}: {now}, before {then}"
            for what in ("fds", "threads", "children")
            if (now := getattr(self, what)) != (then := getattr(before, what))
        ]
        now_there, there_before = self._named(), before._named()
        found += [f"new: {each}" for each in sorted((now_there - there_before).elements())]
        return found + [f"gone: {each}" for each in sorted((there_before - now_there).elements())]

    def _named(self) -> Counter[str]:
        # A path can be mounted upon twice.
        return Counter([*(f"mount {line}" for line in self.mounts), *self.cgroups, *self.files])


class RunningAgent:
    """One supervisor and its agent, in the foreground of a subprocess. :meth:`stop` is to be called."""

    def __init__(
        self,
        *options: str,
        runtime: str = "runc",
        socket_path: str = "",
        python_path: str = "",
        path: str = "",
        state_dir: Path | None = None,
        wrapper: tuple[str, ...] = (),
    ) -> None:
        """``python_path`` comes before this tree on the agent's module path, ``path`` is its PATH, and
        ``wrapper`` executes it."""
        self.directory = Path(tempfile.mkdtemp(prefix="gcs-test-"))
        self.directory.chmod(0o711)  # roots of user namespaces must get to their root directories
        self.socket_path = socket_path or str(self.directory / "gcs.sock")
        self.address = f"unix:{self.socket_path}"
        self.state_dir = state_dir or self.directory / "state"
        self._log = self.directory / "log"
        self._last_words = ""
        self._cgroup = f"gcs-{hashlib.sha256(str(self.state_dir).encode()).hexdigest()[:8]}"
        command = [sys.executable, "-m", "gcsagent", "--listen", self.address, "--state", str(self.state_dir)]
        command += ["--runtime", runtime, *options]
        if "crun" in " ".join(command):
            command = _where_crun_works(command)
        command = [*wrapper, *command]
        with self._log.open("wb") as log:
            given = {"PYTHONPATH": python_path, "PATH": path}
            env = {**os.environ, **{name: value for name, value in given.items() if value}}
            self._process = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log, env=env)
        self.pid = self._process.pid
        try:
            self.wait_for_generation(1)
        except BaseException:
            self.destroy()
            raise

    @property
    def agent_pid(self) -> int:
        """0 while there is none."""
        return next((pid for pid in children(self.pid) if b"gcsagent.agent" in command_line(pid)), 0)

    def kill_agent(self) -> None:
        """SIGKILLs the agent and waits for the next."""
        with greeted(self.socket_path, ANSWER_SECONDS) as generation:
            os.kill(self.agent_pid, signal.SIGKILL)
        self.wait_for_generation(generation + 1)

    def wait_for_generation(self, generation: int) -> None:
        """Until an agent of at least this generation answers."""

        def answers() -> bool:
            try:
                with greeted(self.socket_path, START_SECONDS) as now:
                    return now >= generation
            except (OSError, ConnectionError):
                return self._process.poll() is not None

        answered = eventually(answers, START_SECONDS)
        assert answered, f"no agent answered:\n{self.log_tail()}"
        assert self._process.poll() is None, f"it exited {self._process.poll()}:\n{self.log_tail()}"

    def log_tail(self) -> str:
        if not self._log.exists():
            return self._last_words
        return self._log.read_text(errors="replace")[-LOG_TAIL:]

    def holdings(self) -> Holdings:
        pids = (self.pid, self.agent_pid)
        with greeted(self.socket_path, START_SECONDS):  # behind it, every earlier close has been seen
            fds = (len(os.listdir(f"/proc/{pids[0]}/fd")), len(os.listdir(f"/proc/{pids[1]}/fd")))
        return Holdings(
            fds=fds,
            threads=(len(os.listdir(f"/proc/{pids[0]}/task")), len(os.listdir(f"/proc/{pids[1]}/task"))),
            children=len(children(self.pid)),
            mounts=tuple(self._mounts(self.pid)),
            cgroups=tuple(path for path in self.cgroups() if not path.endswith(self._cgroup)),
            files=tuple(str(path) for path in self.state() if path.parent != self.state_dir),
        )

    def assert_holds(self, before: Holdings) -> None:
        """Exactly what it held before, once what is under way is through."""
        eventually(lambda: not self.holdings().differences(before))
        different = self.holdings().differences(before)
        assert not different, "\n".join(different)

    def memory_kib(self) -> tuple[int, int]:
        """Resident anonymous memory of supervisor and agent."""
        return _anonymous_kib(self.pid), _anonymous_kib(self.agent_pid)

    def cgroups(self) -> list[str]:
        """Directories of ours in any hierarchy."""
        roots = [
            line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup" in line
        ]
        tops = [top for root in roots if (top := Path(root, self._cgroup)).is_dir()]
        return sorted(str(path) for top in tops for path in [top, *(p for p in walk(top) if p.is_dir())])

    def state(self) -> list[Path]:
        """What is in the state directory.

        Not counted: the answers kept for repeated requests, a bounded ring, and a killed runc's RUNC_COPY.
        """
        kept = self.state_dir / "requests"
        found = [path for path in walk(self.state_dir) if kept not in (path, *path.parents)]
        return [path for path in found if not path.match(RUNC_COPY)]

    def _mounts(self, pid: int) -> list[str]:
        """Of /proc/PID/mounts, all but a killed runc's RUNC_COPY."""
        lines = Path(f"/proc/{pid}/mounts").read_text().splitlines()
        mine = [line for line in lines if str(self.directory) in line]
        return [line for line in mine if not Path(line.split()[1]).match(RUNC_COPY)]

    def leftovers(self) -> list[str]:
        """Traces after the end: processes, mounts, cgroups, sockets, files. Empty is right."""
        mine = str(self.directory)
        left = [f"mount {line}" for line in Path("/proc/mounts").read_text().splitlines() if mine in line]
        left += [f"cgroup {path}" for path in self.cgroups()]
        left += [
            f"process {pid}: {command!r}"
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if mine.encode() in (command := command_line(pid))
        ]
        left += [f"socket {path}" for path in walk(self.directory) if path.is_socket()]
        containers = self.state_dir / "containers"
        left += [f"container {path}" for path in containers.glob("*")]
        left += [
            f"file {path}" for path in self.state() if containers not in path.parents and not path.is_dir()
        ]
        return left

    def assert_nothing_left(self) -> None:
        left = self.leftovers()
        assert not left, "\n".join(left)

    def stop(self, timeout: float = STOP_SECONDS) -> int:
        """SIGTERM; the exit status. Raises TimeoutExpired."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def wait(self, timeout: float = STOP_SECONDS) -> int:
        return self._process.wait(timeout)

    def destroy(self) -> None:
        """Whatever state it is in: kills it and its containers, and removes every trace. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
        if not self.directory.exists():
            return
        self._last_words = self.log_tail()
        eventually(self._clear_cgroups)
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in reversed([mount for mount in mounts if mount.startswith(f"{self.directory}/")]):
            subprocess.run(["umount", "-l", mount], timeout=STOP_SECONDS, check=True)
        shutil.rmtree(self.directory)

    def _clear_cgroups(self) -> bool:
        """Kills what is in them and removes those that are empty; whether none is left."""
        for path in reversed(self.cgroups()):
            with contextlib.suppress(FileNotFoundError):  # one hierarchy may be mounted twice
                for pid in Path(path, "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.rmdir(path)
        return not self.cgroups()


def _where_crun_works(command: list[str]) -> list[str]:
    """crun refuses a machine with cgroup v1 whose v2 hierarchy has a controller: there it sees v1 alone."""
    controllers = Path("/sys/fs/cgroup/unified/cgroup.controllers")
    if not controllers.exists() or not controllers.read_text().strip():
        return command
    hide = 'umount /sys/fs/cgroup/unified && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh", *command]


def stopped_clean(running: RunningAgent) -> Generator[RunningAgent]:
    """The body of a fixture: after it the agent must end in order, and leave nothing."""
    try:
        yield running
        assert running.stop() == 0
        running.assert_nothing_left()
    finally:
        running.destroy()


def children(pid: int) -> list[int]:
    """Of all threads, of which PID 1 has some for a moment; zombies count."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def walk(top: Path) -> list[Path]:
    found = []
    for parent, directories, files in os.walk(top):
        found += [Path(parent, name) for name in (*directories, *files)]
    return found


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _anonymous_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def frozen(pid: int) -> bool:
    """Whether the cgroup of this process is frozen, as its kernel file says, v1 or v2."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("freezer", ""):
            continue
        for mount in ("freezer", "unified", ""):
            for file in ("freezer.state", "cgroup.freeze"):
                found = Path(f"/sys/fs/cgroup/{mount}{path}/{file}")
                if found.exists():
                    return found.read_text().strip() in ("FROZEN", "1")
    raise AssertionError("it is in no freezer")
