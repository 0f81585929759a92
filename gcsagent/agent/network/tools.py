"""Runs ``ip``, ``nft`` and ``sysctl`` through the supervisor, in any network namespace.

A namespace is entered by descriptor (``nsenter``, of util-linux or busybox), so that neither a name nor a pid
that is used again can lead elsewhere. ``ip -batch`` makes many changes with one program and says which line
failed (ip(8)).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from typing import Any

from gcsagent.agent.calls import Caller, CannotStart, Outcome, capture
from gcsagent.agent.failures import not_started, tool_failed
from protocol.dataclass import dataclass
from protocol.errors import Code, RpcError

MAX_OUTPUT = 4 << 20
"""Bytes: some thousand interfaces or routes."""

CALL = "network"
"""The supervisor's name for the change under way: an agent started over waits for its end."""

NS_FD, OTHER_FD = 3, 4
"""Where a tool finds the namespace it is to be in, and the one it is to put an interface into."""

OTHER = f"/proc/self/fd/{OTHER_FD}"

_FAILED_LINE = re.compile(r"^Command failed -:(\d+)$", re.MULTILINE)
_PACKAGES = {"ip": "iproute2", "nft": "nftables", "sysctl": "procps or busybox", "nsenter": "util-linux"}


@dataclass(frozen=True, slots=True)
class Namespace:
    """``fd`` is /proc/PID/ns/net, which keeps it. ``pid`` and ``pidfd`` of a container's init, 0 and -1 for
    the guest's own.

    ``pod_files`` is the directory of the files its pod's containers share, where it is a pod's.
    """

    fd: int
    pid: int = 0
    pod_files: str = ""
    pidfd: int = -1

    @property
    def is_guest(self) -> bool:
        return self.pid == 0

    def check_lives(self) -> None:
        """Raises ProcessLookupError once the container's init has ended."""
        if self.pidfd >= 0:
            signal.pidfd_send_signal(self.pidfd, 0)


class ToolFailed(Exception):
    """``lines`` are those of a batch that failed, from 1; ``line`` the first, 0 when it was none of them."""

    def __init__(self, program: str, outcome: Outcome) -> None:
        self.program, self.outcome = program, outcome
        self.lines = tuple(int(number) for number in _FAILED_LINE.findall(outcome.stderr))
        self.line = self.lines[0] if self.lines else 0
        super().__init__(f"{program}: {self.reason}")

    @property
    def reason(self) -> str:
        """The tool's own words, on one line."""
        if self.outcome.timed_out:
            return "took too long and was ended"
        lines = [line for line in _FAILED_LINE.sub("", self.outcome.stderr).splitlines() if line.strip()]
        words = lines[-1].strip() if lines else f"exit status {self.outcome.status}"
        return re.sub(r"^(RTNETLINK answers|Error|sysctl): ", "", words).rstrip(".")


def argv_in(namespace: Namespace, argv: list[str]) -> list[str]:
    """The command that runs ``argv`` in the namespace, its descriptor being NS_FD."""
    return argv if namespace.is_guest else ["nsenter", f"-n/proc/self/fd/{NS_FD}", *argv]


class Tools:
    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def settle(self) -> None:
        """Waits for the end of a change that an earlier agent had begun."""
        if await self._caller.join(CALL) is not None:
            self._caller.forget(CALL)

    async def ask(self, namespace: Namespace, argv: list[str], timeout: float) -> bytes:
        """What the tool prints. Raises ToolFailed, RpcError."""
        return await self._run(namespace, argv, b"", timeout)

    async def ask_json(self, namespace: Namespace, argv: list[str], timeout: float) -> list[Any]:
        """The documents it prints, one after the other. Raises RpcError."""
        try:
            return parse_documents((await self.ask(namespace, argv, timeout)).decode(errors="replace"))
        except ToolFailed as failure:
            if "BusyBox" in failure.outcome.stderr:
                raise missing("what is there is busybox's", argv[0]) from failure
            code = Code.DEADLINE_EXCEEDED if failure.outcome.timed_out else Code.INTERNAL
            said = f"`{' '.join(argv)}` failed in the guest: {failure.reason}"
            raise tool_failed(failure.outcome, said, code) from failure

    async def batch(
        self, namespace: Namespace, lines: list[str], timeout: float, other: Namespace, *, force: bool = False
    ) -> None:
        """Runs ``ip`` commands up to the first that fails, or with ``force`` all of them.

        ``other`` is the namespace they call OTHER. Raises ToolFailed with the number of the line, RpcError.
        """
        argv = ["ip", *(["-force"] if force else []), "-batch", "-"]
        data = "".join(f"{line}\n" for line in lines).encode()
        await self._run(namespace, argv, data, timeout, other, key=CALL)

    async def change(self, namespace: Namespace, argv: list[str], timeout: float, data: bytes = b"") -> None:
        """Runs a tool that changes something. Raises ToolFailed, RpcError."""
        await self._run(namespace, argv, data, timeout, key=CALL)

    async def _run(
        self,
        namespace: Namespace,
        argv: list[str],
        data: bytes,
        timeout: float,
        other: Namespace | None = None,
        key: str = "",
    ) -> bytes:
        # By its path: busybox's nsenter would take a bare name for its own.
        path = shutil.which(argv[0])
        if path is None:
            raise missing("it is not there", argv[0])
        output, given = capture("stdout", MAX_OUTPUT), _input(data)
        fds = {0: given, 1: output, NS_FD: namespace.fd} | ({OTHER_FD: other.fd} if other else {})
        try:
            outcome = await self._caller.run(argv_in(namespace, [path, *argv[1:]]), timeout, fds=fds, key=key)
            if outcome.status != 0:
                raise ToolFailed(argv[0], outcome)
            return os.pread(output, os.lseek(output, 0, os.SEEK_CUR), 0)
        except CannotStart as error:
            raise _no_start(error, argv_in(namespace, argv)[0]) from error
        finally:
            if key:
                self._caller.forget(key)
            os.close(output)
            os.close(given)


def _input(data: bytes) -> int:
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _no_start(error: CannotStart, program: str) -> RpcError:
    if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC):
        return missing(str(error), program)
    return not_started(error, f"{error}; try again")


def missing(said: str, program: str) -> RpcError:
    package = _PACKAGES.get(program, program)
    return RpcError(
        Code.UNIMPLEMENTED,
        f"this guest cannot do that without `{program}`: put {package} into its image ({said})",
        program=program,
    )


def parse_documents(text: str) -> list[Any]:
    """JSON documents behind each other, as ``ip -json -batch`` prints them; no output is none.

    Raises RpcError for anything else: busybox's ip knows no -json.
    """
    decoder, at, found = json.JSONDecoder(), 0, []
    try:
        while at < len(text):
            if text[at].isspace():
                at += 1
                continue
            document, at = decoder.raw_decode(text, at)
            found.append(document)
    except (ValueError, RecursionError) as error:
        raise missing("what is there does not print JSON", "ip") from error
    return found
