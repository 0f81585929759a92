"""runc (or crun, which takes the same command line) behind :class:`gcsagent.agent.runtime.Runtime`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shlex
import shutil
import stat
from datetime import UTC, datetime
from typing import Any

from gcsagent.agent import runc_argv
from gcsagent.agent.calls import Caller, CannotStart, Outcome, capture, kill_and_close
from gcsagent.agent.logs import context
from gcsagent.agent.runtime import (
    CriuOptions,
    Launch,
    Launched,
    RuntimeFailure,
    RuntimeInterrupted,
    RuntimeMissing,
    RuntimeState,
    change_call,
    checkpoint_call,
    launch_call,
    start_call,
)
from gcsagent.agent.turns import LAUNCHES, NotBegun
from protocol.checks import identifier

LOG_TAIL = 64 * 1024
MAX_ERROR = 4096
"""Characters kept of runc's error line."""

MAX_OUTPUT = 256 * 1024
ASK_SECONDS = 10.0
MIN_SECONDS = 1.0
"""For a call whose turn has come late: its request's own deadline is about to end it."""

UNMOUNT_SECONDS = 10.0

_log = logging.getLogger("agent.runc")

_numbers = itertools.count(1)
"""Of calls, whichever runtime's: their files share a directory."""


class Runc:
    def __init__(
        self,
        caller: Caller,
        binary: str,
        state: str,
        console_directory: str,
        arguments: tuple[str, ...] = (),
        no_pivot: bool = False,
    ) -> None:
        """``arguments`` come before the command of every call."""
        self.name = os.path.basename(binary)
        self.binary = binary
        self._caller = caller
        # Each runtime reads its own state only: another's would be rubbish to it.
        self._globals = runc_argv.RuncGlobals(binary, os.path.join(state, "runtime", self.name), arguments)
        self._no_pivot = no_pivot
        self._logs = os.path.join(state, "calls")
        self._consoles = console_directory
        for directory in (self._logs, self._globals.root):
            os.makedirs(directory, mode=0o700, exist_ok=True)

    async def version(self) -> str:
        text = await self._output("version", runc_argv.version(self._globals))
        return text.decode(errors="replace").partition("\n")[0]

    async def features(self) -> dict[str, Any]:
        """What ``features`` prints (runc 1.1, crun 1.8.6; OCI runtime spec, features.md), else nothing."""
        try:
            found = json.loads(await self._output("features", runc_argv.features(self._globals)))
        except RuntimeMissing:
            raise
        except (RuntimeFailure, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    async def _output(self, action: str, argv: list[str]) -> bytes:
        fd = capture("stdout", MAX_OUTPUT)
        try:
            await self._run(action, argv, ASK_SECONDS, fds={1: fd})
            return os.pread(fd, os.lseek(fd, 0, os.SEEK_CUR), 0)
        finally:
            os.close(fd)

    async def create(self, container: str, bundle: str, launch: Launch, timeout: float) -> Launched:
        with _Files(self, bool(launch.console_name)) as files:
            argv = runc_argv.create(
                self._globals,
                files.log,
                container,
                bundle=bundle,
                pid_file=launch.pid_file,
                console_socket=files.console,
                preserve_fds=max(0, len(launch.fds) - 3),
                no_pivot=self._no_pivot,
            )
            return await self._launch("create", argv, launch, files, timeout)

    async def start(self, container: str, timeout: float) -> None:
        with _Files(self) as files:
            argv = runc_argv.start(self._globals, files.log, container)
            await self._run("start", argv, timeout, log=files.log, key=start_call(container))
        if self.waits_for_start(container):
            raise RuntimeFailure("start", 0, "it reported success, and the container waits for start")

    def waits_for_start(self, container: str) -> bool:
        """The FIFO that init waits at goes once it has been let through (runc's and crun's start)."""
        return os.path.exists(os.path.join(self._state(container), "exec.fifo"))

    async def exec(self, container: str, process_file: str, launch: Launch, timeout: float) -> Launched:
        with _Files(self, bool(launch.console_name)) as files:
            argv = runc_argv.exec_(
                self._globals,
                files.log,
                container,
                process_file=process_file,
                pid_file=launch.pid_file,
                console_socket=files.console,
            )
            return await self._launch("exec", argv, launch, files, timeout)

    async def state(self, container: str, timeout: float) -> RuntimeState:
        fd = os.memfd_create("stdout", os.MFD_CLOEXEC)
        try:
            with _Files(self) as files:
                argv = runc_argv.state(self._globals, files.log, container)
                await self._run("state", argv, timeout, fds={1: fd}, log=files.log)
            return parse_state(os.pread(fd, MAX_OUTPUT, 0))
        finally:
            os.close(fd)

    async def delete(self, container: str, timeout: float) -> None:
        """Whatever state it is in; that it is not there any more is success, too (--force)."""
        await self._unmount_copies(container)
        try:
            with _Files(self) as files:
                argv = runc_argv.delete(self._globals, files.log, container, force=True)
                await self._run("delete", argv, timeout, log=files.log)
        except RuntimeMissing:
            raise
        except RuntimeFailure as failure:
            if failure.timed_out or not self._state_is_broken(container):
                raise
            context(_log, container=container).warning(
                "the runtime cannot read its own state, which is removed", extra={"error": str(failure)}
            )
            await self._caller.run(["rm", "-rf", "--", self._state(container)], UNMOUNT_SECONDS)
        if os.path.exists(self._state(container)):
            raise RuntimeFailure("delete", 0, f"it left {self._state(container)}")

    def _state(self, container: str) -> str:
        return os.path.join(self._globals.root, container)

    def _state_is_broken(self, container: str) -> bool:
        """Cut off or overwritten: with such a file runc refuses every command, ``delete --force`` too."""
        try:
            with open(os.path.join(self._state(container), "state.json"), "rb") as file:
                state = json.load(file)
        except OSError:
            return False
        except (ValueError, RecursionError):
            return True
        return not isinstance(state, dict) or state.get("id") != container

    async def pause(self, container: str, timeout: float) -> None:
        with _Files(self) as files:
            argv = runc_argv.pause(self._globals, files.log, container)
            await self._run("pause", argv, timeout, log=files.log, key=change_call(container))

    async def resume(self, container: str, timeout: float) -> None:
        with _Files(self) as files:
            argv = runc_argv.resume(self._globals, files.log, container)
            await self._run("resume", argv, timeout, log=files.log, key=change_call(container))

    async def update(self, container: str, resources: dict[str, Any], timeout: float) -> None:
        fd = os.memfd_create("resources", os.MFD_CLOEXEC)
        try:
            os.pwrite(fd, json.dumps(resources).encode(), 0)  # its position stays at 0, where runc reads
            with _Files(self) as files:
                argv = runc_argv.update(self._globals, files.log, container)
                key = change_call(container)
                await self._run("update", argv, timeout, fds={0: fd}, log=files.log, key=key)
        finally:
            os.close(fd)

    async def checkpoint(
        self, container: str, options: CriuOptions, timeout: float, *, leave_running: bool
    ) -> None:
        with _Files(self) as files:
            argv = runc_argv.checkpoint(
                self._globals, files.log, container, options, leave_running=leave_running
            )
            await self._run("checkpoint", argv, timeout, log=files.log, key=checkpoint_call(container))

    async def restore(
        self, container: str, bundle: str, options: CriuOptions, launch: Launch, timeout: float
    ) -> Launched:
        with _Files(self, bool(launch.console_name)) as files:
            argv = runc_argv.restore(
                self._globals,
                files.log,
                container,
                options,
                bundle=bundle,
                pid_file=launch.pid_file,
                console_socket=files.console,
            )
            return await self._launch("restore", argv, launch, files, timeout)

    async def _unmount_copies(self, container: str) -> None:
        """runc protects its binary by a copy, in older versions by a bind mount on a ``runc.XXXXXX`` of
        its state directory (nsexec's cloned_binary.c). One that was killed leaves it there, busy."""
        directory = self._state(container)
        try:
            names = [name for name in os.listdir(directory) if name.startswith("runc.")]
        except FileNotFoundError:
            return
        for name in names:
            # It fails where nothing is mounted, which only the mount table could tell beforehand.
            with contextlib.suppress(CannotStart):
                await self._caller.run(["umount", os.path.join(directory, name)], UNMOUNT_SECONDS)

    def leftovers(self) -> set[str]:
        """Containers it has a state for: a directory each below its root. crun keeps a cache there, too."""
        try:
            return {name for name in os.listdir(self._globals.root) if identifier(name) is None}
        except FileNotFoundError:
            return set()

    def forget_earlier_logs(self) -> None:
        """Removes the logs of calls that an earlier agent was killed over."""
        for name in os.listdir(self._logs):
            if not name.startswith(f"{self._caller.prefix}."):
                os.unlink(os.path.join(self._logs, name))

    async def _launch(
        self, action: str, argv: list[str], launch: Launch, files: _Files, timeout: float
    ) -> Launched:
        extra = {"process": launch.process, "pid_file": launch.pid_file}
        if launch.console_name:
            extra |= {"console_path": files.console, "console_name": launch.console_name}
        fds = {target: fd for target, fd in enumerate(launch.fds) if fd is not None}
        if 2 not in fds and not launch.console_name:
            # The process inherits runc's standard error, unless it has a terminal; a captured file there
            # would be its own for good.
            fds[2] = files.null
        key = launch_call(launch.process)
        outcome = await self._run(
            action, argv, timeout, fds=fds, hold=launch.hold, extra=extra, log=files.log, key=key
        )
        if not outcome.pid:
            problem = outcome.pid_error or "no pid file was written"
            raise RuntimeFailure(action, outcome.status, f"it reported success, but {problem}")
        return Launched(outcome.pid, outcome.pidfd, outcome.exit)

    async def _run(
        self,
        action: str,
        argv: list[str],
        timeout: float,
        *,
        fds: dict[int, int] | None = None,
        hold: dict[str, int] | None = None,
        extra: dict[str, str] | None = None,
        log: str = "",
        key: str = "",
    ) -> Outcome:
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        try:
            async with self._caller.turns.turn(action):
                # Only what launches has a deadline that is the request's: a deletion that waited goes on.
                left = max(MIN_SECONDS, end - loop.time()) if action in LAUNCHES else timeout
                outcome = await self._caller.run(argv, left, fds=fds, hold=hold, extra=extra, key=key)
        except CannotStart as error:
            raise RuntimeMissing(action, error.errno, self._why_not(error)) from error
        except NotBegun as error:
            raise RuntimeInterrupted(
                f"{self.name} {action} had not begun: it waited for the calls before it (max_runtime_calls)"
            ) from error
        except asyncio.CancelledError as error:
            problem = f"{self.name} {action} had not ended and was killed"
            raise RuntimeInterrupted(problem, last_error(log)) from error
        if outcome.status != 0:
            if outcome.pidfd is not None:
                kill_and_close(outcome.pidfd)  # it got as far as its pid file before it failed
            # As a shell takes it, so that it can be tried again by hand.
            _log.info("the runtime failed", extra={"command": shlex.join(argv), "status": outcome.status})
            raise RuntimeFailure(action, outcome.status, last_error(log), outcome.stderr, outcome.timed_out)
        return outcome

    def _why_not(self, error: CannotStart) -> str:
        """In the words of what is wrong with the binary, where that is it."""
        return f"{self.binary} cannot be started: {os.strerror(error.errno) if error.errno else error.reason}"


class _Files:
    """The per-call files: a fresh log, a console socket's path, /dev/null. Gone when the call is."""

    def __init__(self, runc: Runc, console: bool = False) -> None:
        number = next(_numbers)
        self.log = os.path.join(runc._logs, f"{runc._caller.prefix}.{number}.log")
        self.console = os.path.join(runc._consoles, f"{runc._caller.prefix}.{number}") if console else ""
        self._null = -1

    @property
    def null(self) -> int:
        if self._null < 0:
            self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        return self._null

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._null >= 0:
            os.close(self._null)
        try:
            os.unlink(self.log)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            shutil.rmtree(self.log, ignore_errors=True)


def parse_state(output: bytes) -> RuntimeState:
    """Raises RuntimeFailure for what is no state."""
    try:
        found = json.loads(output)
        return RuntimeState(
            str(found["status"]),
            int(found.get("pid", 0)),
            str(found.get("bundle", "")),
            _epoch_ns(str(found.get("created", ""))),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RuntimeFailure("state", 0, f"printed no state: {output[:80]!r}") from error


def _epoch_ns(text: str) -> int:
    """RFC 3339 with up to nine digits behind the second; 0 for what is not that."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    try:
        seconds = datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp()
        return int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, "0"))
    except ValueError:
        return 0


def last_error(path: str) -> str:
    """The last error in runc's JSON log, ``""`` if there is none; rubbish in between is passed over.

    Whatever is at ``path`` is not waited for, and one line of it is not kept whole.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return ""
        lines = os.pread(fd, LOG_TAIL, max(0, status.st_size - LOG_TAIL)).splitlines()
    finally:
        os.close(fd)
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "fatal") and entry.get("msg"):
            # JSON can hold half of a surrogate pair, which UTF-8 on the wire cannot.
            return str(entry["msg"])[:MAX_ERROR].encode(errors="replace").decode()
    return ""
