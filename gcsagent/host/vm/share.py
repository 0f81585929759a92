"""Directories of this host that a VM shares: virtiofs, each served by a virtiofsd of its own.

The daemon is given a socket that listens already, and to which QEMU's end is connected already: there is
nothing to wait for, and no path by which anybody else could come in. It ends when QEMU lets go of the
connection, and with the process that started it.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host.vm.errors import InvalidVmConfig, LaunchError, ShareError
from gcsagent.host.vm.process import Child, PipeReader, Tail
from gcsagent.host.vm.tools import VIRTIOFSD, find_tool
from gcsagent.host.vm.words import path_name_mode

# The device keeps 36 bytes of a tag (virtio-v1.2, 5.11.4).
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,35}")
_NOT_IN_TAGS = re.compile(r"[^A-Za-z0-9_.-]+")

_SOCKET = "virtiofsd"

# What a daemon has said before its end is there as soon as it has ended.
_LAST_WORDS_SECONDS = 1.0

# A daemon that cannot serve says so and exits at once; QEMU may have noticed a moment before.
_EXIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Share:
    """A directory of this host and the tag by which the guest mounts it."""

    path: Path
    tag: str
    read_only: bool = False

    def __post_init__(self) -> None:
        if not _TAG.fullmatch(self.tag):
            raise InvalidVmConfig(
                f"share tag {self.tag!r} must be 1 to 36 letters, digits, '_', '.', '-', no sign first"
            )

    @classmethod
    def parse(cls, text: str) -> Share:
        """``DIR[:TAG][:ro]``; the tag is the directory's name without one.

        Raises:
            InvalidVmConfig: no such form, or the tag cannot be one.
        """
        path, tag, read_only = path_name_mode(text, "share", "DIR[:TAG][:ro]")
        name = _NOT_IN_TAGS.sub("-", path.resolve().name).strip("-._")[:36]
        return cls(path, name if tag is None else tag, read_only)

    @property
    def target(self) -> str:
        """Where the guest has it mounted, if it is the launcher's or gcsctl's doing."""
        return f"/run/gcs/shares/{self.tag}"


class ServedShare:
    """A share with its daemon.

    Attributes:
        fd: the connection to the daemon, for QEMU; -1 once that has it.
    """

    def __init__(self, share: Share, daemon: Child, stderr: PipeReader, complaints: Tail, fd: int) -> None:
        self.share = share
        self.fd = fd
        self._daemon = daemon
        self._stderr = stderr
        self._complaints = complaints

    @classmethod
    def start(cls, share: Share, directory: Path, env: Mapping[str, str] | None = None) -> ServedShare:
        """Starts a virtiofsd for it; `directory` is private, and as it was afterwards.

        Raises:
            ShareError: it is no directory.
            LaunchError: virtiofsd cannot be executed.
            ToolMissing: there is no virtiofsd.
        """
        program = find_tool(VIRTIOFSD, env)
        if not share.path.is_dir():
            raise ShareError(f"share {share.tag}: {share.path} is not a directory")
        listener, fd = _connected(directory / _SOCKET)
        complaints = Tail()
        stderr = PipeReader(complaints.feed)
        try:
            argv = daemon_argv(program, share, listener.fileno())
            daemon = Child.spawn(VIRTIOFSD, argv, pass_fds=(listener.fileno(),), stderr=stderr.write_end)
        except BaseException:
            os.close(fd)
            stderr.close()
            raise
        finally:
            listener.close()
        stderr.close_write_end()
        return cls(share, daemon, stderr, complaints, fd)

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return self._daemon.pid

    def handed_over(self) -> None:
        """QEMU has its copy of the descriptor: ours would keep the daemon alive."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    async def ended(self) -> tuple[int, str]:
        """The daemon's exit status, once it has exited, and the fact as one line."""
        status = await self._daemon.wait()
        await self._stderr.drained(_LAST_WORDS_SECONDS)
        problem = self._complaints.last_line() or "no output"
        return status, f"virtiofsd of share {self.share.tag} exited {status}: {problem}"

    async def failure(self) -> str:
        """Why the daemon has failed, after QEMU could not use it; empty if it has not."""
        try:
            async with asyncio.timeout(_EXIT_SECONDS):
                status, how = await self.ended()
        except TimeoutError:
            return ""
        return how if status else ""

    def close(self) -> None:
        """Ends the daemon; may be called again."""
        self.handed_over()
        self._daemon.destroy()
        self._stderr.close()


def daemon_argv(program: Path, share: Share, listener: int) -> list[str]:
    """The command line of virtiofsd for one share."""
    argv = [str(program), "--fd", str(listener), "--shared-dir", str(share.path.resolve())]
    # Where the guest cannot be trusted to keep its hands off, the daemon does not let it.
    argv += ["--readonly"] if share.read_only else []
    return [*argv, "--log-level", "error"]


def _connected(path: Path) -> tuple[socket.socket, int]:
    """A socket that listens, without a path any more, and a descriptor connected to it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        try:
            listener.listen(1)
            ours.connect(str(path))
        finally:
            path.unlink()
    except OSError as error:
        listener.close()
        ours.close()
        raise LaunchError(f"cannot make a socket for virtiofsd: {error}") from error
    return listener, ours.detach()
