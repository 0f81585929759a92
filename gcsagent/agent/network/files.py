"""resolv.conf and hosts, of the guest, a container, or a pod.

A container's files are written through descriptors below its root directory, so that none of its symlinks
leads outside. A file that something is mounted on cannot be replaced and is written in place; a pod's, which
is bound into all its containers, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator

from gcsagent.agent.inroot import open_inside, read_inside
from gcsagent.agent.network.tools import Namespace
from protocol import checks
from protocol.pods import Dns, HostsEntry

RESOLV_CONF, HOSTS = "resolv.conf", "hosts"
MAX_FILE = 64 * 1024
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCALHOST = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


def parse_resolv_conf(text: str) -> Dns:
    """What it says, as far as the contract has words for it."""
    servers: list[str] = []
    search: list[str] = []
    options: list[str] = []
    for line in text.splitlines():
        word, *rest = line.split() or [""]
        if word == "nameserver" and rest and checks.ip_address(rest[0]) is None:
            servers.append(rest[0])
        elif word in ("search", "domain"):
            search = [each for each in rest if checks.search_domain(each) is None]
        elif word == "options":
            options += [each for each in rest if checks.dns_option(each) is None]
    return Dns(tuple(servers), tuple(search), tuple(options))


def hosts(entries: tuple[HostsEntry, ...]) -> str:
    """hosts(5): the text for /etc/hosts, which always knows localhost."""
    return _LOCALHOST + "".join(f"{each.address}\t{' '.join(each.names)}\n" for each in entries)


def read(target: Namespace, name: str) -> str | None:
    """The file in /etc, of the guest, the container or the pod; None where there is none. Raises OSError.

    What is no UTF-8 in it is kept as it is (PEP 383), for :func:`write` to put it back.
    """
    with _directory(target, name) as (root, path):
        try:
            return read_inside(root, path, MAX_FILE).decode(errors="surrogateescape")
        except FileNotFoundError:
            return None


def write(target: Namespace, name: str, text: str | None) -> None:
    """Replaces it as a whole, or removes it. Raises OSError."""
    with _directory(target, name) as (root, path):
        folder = open_inside(root, os.path.dirname(path))
        try:
            if path == name:
                _overwrite(folder, name, _encoded(text or ""))
            elif text is None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
            else:
                _replace(folder, name, _encoded(text))
        finally:
            os.close(folder)


def _replace(etc: int, name: str, data: bytes) -> None:
    fresh = f".{name}.{secrets.token_hex(6)}"
    try:
        _write(os.open(fresh, _NEW, 0o644, dir_fd=etc), data)
        os.rename(fresh, name, src_dir_fd=etc, dst_dir_fd=etc)
        return
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(fresh, dir_fd=etc)
        if error.errno not in (errno.EBUSY, errno.EROFS):
            raise
    # Something is mounted on it, which may be writable though the directory is not.
    _overwrite(etc, name, data)


def _overwrite(folder: int, name: str, data: bytes) -> None:
    """Looks before it opens: an image or a workload may have put a pipe there, or a disk's device."""
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        _write(os.open(f"/proc/self/fd/{found}", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC), data)
    finally:
        os.close(found)


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _write(fd: int, data: bytes) -> None:
    try:
        os.fchmod(fd, 0o644)
        written = os.write(fd, data)
        while written < len(data):  # of a disk that is full the kernel takes what still fits
            written += os.write(fd, data[written:])
    finally:
        os.close(fd)


@contextlib.contextmanager
def _directory(target: Namespace, name: str) -> Iterator[tuple[int, str]]:
    """The root to look below, and the file's path there; that of a pod's file is its name alone."""
    shared = bool(target.pod_files) and os.path.exists(os.path.join(target.pod_files, name))
    where = target.pod_files if shared else f"/proc/{target.pid}/root" if target.pid else "/"
    fd = os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        target.check_lives()  # its pid was still its own
        yield fd, name if shared else f"etc/{name}"
    finally:
        os.close(fd)
