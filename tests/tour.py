"""Runs README's tour, line by line as it stands there, and prints what came: ``python3 -m tests.tour``.

The commands are README's; here is only what a person would do beside them: type into a shell, press Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gcsagent.host.vm.tools import cache_dir
from tests.cases.agents import REPO
from tests.cases.real_images import redis_image

TYPED = ("id", "exit")
"""Into what has a terminal, one after each prompt."""

WATCHED = ("logs -f", "agent-logs -f", "pressure")
"""What goes on until Ctrl-C, which comes after WATCH_SECONDS."""

WATCH_SECONDS = 5

VMS = ("dev", "two", "all", "lab")
"""Those it starts."""

HOME = re.compile(rf"(?<![\w.]){re.escape(str(Path.home()))}/")

STATE = Path("/run/gcs")
"""The state directory of the tour's agent on this machine."""

LEFT_OUT = {"checkpoint create": "needs an image with CRIU"}

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07|[\r\x07\0]")
_PROMPT = re.compile(rb"[#$] (\x1b\[[0-9;?]*[a-zA-Z])*\Z")
_STATUS = re.compile(r"^<<(\d+)>>$")


LINE_SECONDS = 180.0


class Failed(Exception):
    """A line of the tour did not end well."""


def commands(readme: str) -> list[str]:
    """The lines of the tour's blocks, in order."""
    tour = readme.partition("\n## A five-minute tour\n")[2].partition("\nFrom Python:\n")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", tour, re.S | re.M)
    return [line for block in blocks for line in block.splitlines()]


def left_out(line: str) -> str | None:
    """Why a line is not run, if it is not."""
    return next((why for words, why in LEFT_OUT.items() if words in line), None)


class Session:
    """One bash, which keeps its variables and its background jobs."""

    def __init__(self, directory: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GCS_", "XDG_"))}
        # VMs and snapshots of earlier days are not shown, nor in the way.
        own = {"XDG_STATE_HOME": "state", "XDG_DATA_HOME": "share"}
        own = {name: str(directory / place) for name, place in own.items()}
        path = f"{directory}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        self._env = {**kept, **own, "PATH": path, "TERM": "xterm"}
        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=directory,
            env=self._env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._send("set -a")  # what is set is exported: to the commands that are watched or typed into

    def run(self, line: str) -> Iterator[str]:
        """Shown as it comes. Raises Failed."""
        yield f"$ {line}"
        command = as_run(line)
        watchdog = threading.Timer(LINE_SECONDS, self._kill)
        watchdog.start()
        try:
            yield from self._run(line, command)
        finally:
            watchdog.cancel()

    def _run(self, line: str, command: str) -> Iterator[str]:
        self._send(f"{{ {command}\n}} </dev/null\nprintf '\\n<<%s>>\\n' $?")
        yield from self._until(lambda shown: _STATUS.match(shown) is not None, command)
        if " forward " in line:  # whoever connects next must find it listening
            yield from self._until(lambda shown: "->" in shown, command)

    def _until(self, last: Callable[[str], bool], command: str) -> Iterator[str]:
        assert self._bash.stdout is not None
        empty = False
        for raw in self._bash.stdout:
            shown = _ESCAPES.sub("", raw).rstrip("\n")
            status = _STATUS.match(shown)
            if status is not None and int(status[1]) not in (0, 130):
                raise Failed(f"exit status {status[1]}: {command}")
            if status is None and shown:
                yield from [""] * empty
                yield shown
            empty = not shown
            if last(shown):
                return
        raise Failed(f"bash ended: {command}")

    def _send(self, text: str) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.write(f"{text}\n")
        self._bash.stdin.flush()

    def close(self) -> None:
        """Ends it, its jobs and its VMs."""
        self._kill()
        self._bash.wait()
        for vm in VMS:
            stop = [self._env["PATH"].partition(":")[0] + "/gcsctl", "vm", "stop", vm]
            subprocess.run(stop, env=self._env, capture_output=True, timeout=LINE_SECONDS, check=False)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGKILL)


def as_run(line: str) -> str:
    """With the person at the keyboard."""
    if " -it " in line or re.search(r" shell \w+ +#", line):
        return f"python3 -m tests.tour --type {shlex.quote(line)}"
    if any(words in line for words in WATCHED):
        return f"timeout --preserve-status -s INT {WATCH_SECONDS} bash -c {shlex.quote(line)}"
    return line


def type_into(line: str) -> int:
    """Runs ``line`` on a terminal and answers its prompts; its exit status. Raises TimeoutError."""
    main, side = os.openpty()
    argv = ["bash", "-c", line]
    process = subprocess.Popen(argv, stdin=side, stdout=side, stderr=side, start_new_session=True)
    os.close(side)
    waiting, seen = list(TYPED), b""
    while select.select([main], [], [], LINE_SECONDS)[0]:
        try:
            data = os.read(main, 65536)
        except OSError:  # EIO: everybody has closed it
            return process.wait()
        os.write(1, data)
        seen = (seen + data)[-100:]
        if waiting and _PROMPT.search(seen):
            seen = b""
            os.write(main, f"{waiting.pop(0)}\n".encode())
    process.kill()
    raise TimeoutError(line)


@contextmanager
def scene() -> Iterator[Path]:
    """A directory with what the tour takes for granted."""
    rootfs = cache_dir() / "demo-rootfs" / "current"
    with tempfile.TemporaryDirectory(prefix="tour-") as name:
        directory = Path(name)
        (directory / "bin").mkdir()
        for program, module in (("gcsctl", "gcsagent.host"),):
            shim = directory / "bin" / program
            shim.write_text(f'#!/bin/sh\nPYTHONPATH={REPO} exec {sys.executable} -m {module} "$@"\n')
            shim.chmod(0o755)
        python = directory / "bin" / "python3"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={REPO} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        subprocess.run(
            ["cp", "-a", (rootfs / "rootfs").resolve(), directory / "rootfs"], check=True, timeout=120
        )
        (directory / "rootfs.erofs").symlink_to((rootfs / "rootfs.erofs").resolve())
        (directory / "site").mkdir()
        (directory / "site" / "index.html").write_text("the host says hello\n")
        redis_image(str((rootfs / "rootfs").resolve()), directory)
        before = STATE.exists()
        yield directory
        if not before:
            shutil.rmtree(STATE, ignore_errors=True)


def main() -> int:
    if sys.argv[1:2] == ["--type"]:
        return type_into(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # its VMs and jobs end with it
    with scene() as directory:
        session = Session(directory)
        try:
            for line in commands((REPO / "README.md").read_text()):
                why = left_out(line)
                if why is not None:
                    print(f"# not run here, it {why}:\n# {line}", flush=True)
                    continue
                for shown in session.run(line):
                    print(HOME.sub("~/", shown.replace(str(directory), ".")), flush=True)
        except Failed as failed:
            print(f"tour: {failed}", file=sys.stderr)
            return 1
        finally:
            session.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
