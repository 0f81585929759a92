"""Gives a VM its vsock device: the kernel's vhost-vsock where the host has it, else vhost-device-vsock.

With vhost-vsock the guest has a CID of its own in the host's AF_VSOCK and is dialled as `vsock:CID:PORT`.
Without it, QEMU's vhost-user-vsock device is served by the daemon vhost-device-vsock, which maps guest
ports to one UNIX socket on the host (hybrid vsock: "CONNECT <port>\\n" answered by "OK <port>\\n"),
dialled as `hvsock:PATH:PORT`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import random
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tenacity

from gcsagent.host.vm.errors import InvalidVmConfig, LaunchError
from gcsagent.host.vm.inotify import DirectoryWatch
from gcsagent.host.vm.process import Child, PipeReader, Tail
from gcsagent.host.vm.tools import VHOST_DEVICE_VSOCK, find_tool

Kind = Literal["vhost-vsock", "vhost-user-vsock"]

VHOST_VSOCK = Path("/dev/vhost-vsock")

# linux/vhost.h: _IOW(VHOST_VIRTIO, 0x60, __u64) with VHOST_VIRTIO = 0xAF.
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60

# 0 to 2 are reserved (vsock(7)); small numbers are what people pick by hand.
_LOWEST_CID = 0x1000
_HIGHEST_CID = 0x7FFFFFFF
_CID_ATTEMPTS = 32

# Every daemon serves one guest on sockets of its own, so the number means nothing outside.
_PRIVATE_CID = 3

# vhost-device-vsock 0.3.0 drops a guest packet whose payload spans several descriptors
# ("DescriptorLengthTooSmall") and the stream then stalls for good. Linux 6.12 guests build such packets
# above 32 KiB, and never send more than the credit the peer advertises: this buffer is that credit, and
# keeps every packet in one descriptor.
_TX_BUFFER_SIZE = 28672

_DAEMON_DEADLINE = 15.0

# The daemon's thread that serves every host (vhost-user-backend, handler.rs), whose end is not the daemon's;
# and what it says if it panics.
_WORKER, _PANIC = "vring_worker", "thread 'vring_worker' "

# linux/pidfd.h, since Linux 6.9: a pidfd of one thread.
_PIDFD_THREAD = os.O_EXCL

# The daemon's sockets: QEMU's, and the one that hosts dial.
_CONTROL, _HYBRID, _UNPUBLISHED = "vhost-user", "vsock", "vsock.new"


@dataclass(frozen=True, slots=True)
class VsockChoice:
    """Which device, and why."""

    kind: Kind
    reason: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.reason})"


def choose(request: str = "auto", *, device: Path | None = None) -> VsockChoice:
    """Picks the vsock device.

    Raises:
        InvalidVmConfig: `request` is none of auto, vhost, vhost-user; or it is vhost and the host lacks it.
    """
    if request == "vhost-user":
        return VsockChoice("vhost-user-vsock", "asked for")
    if request not in ("auto", "vhost"):
        raise InvalidVmConfig(f"vsock device {request!r} is not one of auto, vhost, vhost-user")
    device = device or VHOST_VSOCK
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        obstacle = f"{device}: {error.strerror}"
        if request == "vhost":
            raise InvalidVmConfig(
                f"vhost-vsock was asked for but cannot be used: {obstacle}; load vhost_vsock or use auto"
            ) from None
        return VsockChoice("vhost-user-vsock", obstacle)
    return VsockChoice("vhost-vsock", "asked for" if request == "vhost" else f"{device} opens")


class VsockDevice:
    """A device ready to be given to one QEMU.

    Attributes:
        address: prefix of the address hosts dial; the port follows after a colon.
        fd: goes to QEMU: the opened vhost device, or the connected vhost-user socket.
        cid: the guest's CID.
        daemon: the vhost-device-vsock process, if there is one.
        on_deaf: told, once of each daemon, that it lives and serves nobody any more.
    """

    def __init__(self, choice: VsockChoice, address: str, cid: int, directory: Path) -> None:
        self.choice = choice
        self.address = address
        self.fd = -1
        self.cid = cid
        self.daemon: Child | None = None
        self.on_deaf: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._directory = directory
        self._complaints = Tail()
        self._stderr: PipeReader | None = None
        self._worker: Path | None = None
        self._worker_pidfd = -1

    @classmethod
    async def create(
        cls, choice: VsockChoice, directory: Path, env: Mapping[str, str] | None = None
    ) -> VsockDevice:
        """Reserves a CID, or starts the daemon with its sockets in `directory`.

        Raises:
            LaunchError: no CID is free, or the daemon did not come up.
            ToolMissing: there is no vhost-device-vsock.
        """
        if choice.kind == "vhost-vsock":
            fd, cid = reserve_cid(VHOST_VSOCK)
            device = cls(choice, f"vsock:{cid}", cid, directory)
            device.fd = fd
            return device
        device = cls(choice, f"hvsock:{directory / _HYBRID}", _PRIVATE_CID, directory)
        await device.renew(env)
        return device

    async def renew(self, env: Mapping[str, str] | None = None) -> None:
        """Gives it a new `fd` for QEMU, with the same address: the same CID, or a fresh daemon's connection.

        A daemon that still runs is ended, so QEMU must not have the device any more.

        Raises:
            LaunchError: the CID was taken meanwhile, or the daemon did not come up; there is none then.
            ToolMissing: there is no vhost-device-vsock.
        """
        self.close()
        if self.choice.kind == "vhost-vsock":
            self.fd, _ = reserve_cid(VHOST_VSOCK, lambda: self.cid, attempts=1)
            return
        for name in (_CONTROL, _HYBRID, _UNPUBLISHED):
            (self._directory / name).unlink(missing_ok=True)
        try:
            await self._start_daemon(find_tool(VHOST_DEVICE_VSOCK, env))
        except BaseException:
            self.close()
            raise

    def complaints(self) -> str:
        """The last thing the daemon said, on one line."""
        lines = [line for line in self._complaints.text().splitlines() if line.strip()]
        # Rust's advice how to see more of a panic.
        told = [line for line in lines if not line.startswith("note: ")]
        return told[-1] if told else "no output"

    def handed_over(self) -> None:
        """QEMU has its copy of the descriptor: ours would keep the CID or the daemon's session alive."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def publish(self) -> None:
        """From now on hosts may dial. The daemon would take their calls before that."""
        if self.daemon is not None:
            # A daemon that ends takes its socket with it.
            with contextlib.suppress(FileNotFoundError):
                (self._directory / _UNPUBLISHED).rename(self._directory / _HYBRID)
            self._watch_worker()

    def check(self) -> None:
        """Looks whether the daemon still serves hosts, once these may dial.

        vhost-device-vsock 0.3.0 loses the thread that does, and goes on without, when a host hangs up between
        CONNECT and OK (EPIPE at writing OK), and when one dials or writes while the queues are stopped: as
        the guest's driver starts, and as long as the VM is paused.
        """
        if self._worker is not None and not self._worker.exists():
            self._deaf()

    def kill_daemon(self) -> None:
        """Kills the daemon, if there is one, and leaves it to whoever waits for it."""
        if self.daemon is not None:
            self.daemon.signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends the daemon and frees everything; may be called again."""
        self.handed_over()
        self._leave_worker()
        if self.daemon is not None:
            self.daemon.destroy()
            self.daemon = None
        if self._stderr is not None:
            self._stderr.close()

    async def _start_daemon(self, program: Path) -> None:
        directory, control = self._directory, self._directory / _CONTROL
        self._complaints = Tail()
        self._stderr = PipeReader(self._on_stderr)
        with DirectoryWatch(directory) as watch:
            self.daemon = Child.spawn(
                VHOST_DEVICE_VSOCK,
                daemon_argv(program, control, directory / _UNPUBLISHED, self.cid),
                stdout=subprocess.DEVNULL,
                stderr=self._stderr.write_end,
            )
            self._stderr.close_write_end()
            self.fd = await self._connect(watch, self.daemon, control)

    def _on_stderr(self, chunk: bytes) -> None:
        self._complaints.feed(chunk)
        # Said before the thread ends, and all that tells of it before Linux 6.9.
        if self._worker is not None and _PANIC in self._complaints.text():
            self._deaf()

    def _watch_worker(self) -> None:
        assert self.daemon is not None
        self._leave_worker()
        threads = Path(f"/proc/{self.daemon.pid}/task").glob("*/comm")
        self._worker = next((thread.parent for thread in threads if _comm(thread) == _WORKER), None)
        if self._worker is None:
            return
        # Before Linux 6.9 what it says and `check` must do.
        with contextlib.suppress(OSError):
            self._worker_pidfd = os.pidfd_open(int(self._worker.name), _PIDFD_THREAD)
            self._loop.add_reader(self._worker_pidfd, self.check)

    def _deaf(self) -> None:
        self._leave_worker()
        self.on_deaf()

    def _leave_worker(self) -> None:
        self._worker = None
        if self._worker_pidfd >= 0:
            self._loop.remove_reader(self._worker_pidfd)
            os.close(self._worker_pidfd)
            self._worker_pidfd = -1

    async def _connect(self, watch: DirectoryWatch, daemon: Child, control: Path) -> int:
        connecting = asyncio.create_task(_connect_when_there(watch, control))
        exiting = asyncio.create_task(daemon.wait())
        try:
            done, _ = await asyncio.wait(
                (connecting, exiting), timeout=_DAEMON_DEADLINE, return_when=asyncio.FIRST_COMPLETED
            )
            if connecting in done:
                return connecting.result()
            if exiting in done:
                raise LaunchError(f"vhost-device-vsock exited {exiting.result()}: {self.complaints()}")
            raise LaunchError(f"vhost-device-vsock made no socket within {_DAEMON_DEADLINE:g} s")
        finally:
            await _cancel(connecting, exiting)


def daemon_argv(program: Path, control: Path, uds: Path, cid: int) -> list[str]:
    """The command line of vhost-device-vsock for one guest."""
    for path in (control, uds):
        if "," in str(path):
            raise LaunchError(f"vhost-device-vsock cannot use a path with a comma: {path}")
    vm = f"guest-cid={cid},socket={control},uds-path={uds},tx-buffer-size={_TX_BUFFER_SIZE}"
    return [str(program), "--vm", vm]


def reserve_cid(
    device: Path, pick: Callable[[], int] | None = None, attempts: int = _CID_ATTEMPTS
) -> tuple[int, int]:
    """Opens the vhost device and claims a free CID on it; returns the descriptor and the CID.

    The claim lasts as long as the descriptor, so no other VM can take the CID before QEMU uses it.

    Raises:
        LaunchError: the device cannot be used, or no free CID was found.
    """
    pick = pick or (lambda: random.randint(_LOWEST_CID, _HIGHEST_CID))
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise LaunchError(f"cannot open {device}: {error.strerror}") from error
    try:
        for _ in range(attempts):
            cid = pick()
            if _claim_cid(fd, cid):
                return fd, cid
    except OSError as error:
        os.close(fd)
        raise LaunchError(f"{device} refuses a guest CID: {error.strerror}") from error
    os.close(fd)
    raise LaunchError(f"{device}: CID {cid} is in use, no free one in {attempts} attempts")


def _claim_cid(fd: int, cid: int) -> bool:
    try:
        fcntl.ioctl(fd, VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise
    return True


async def _connect_when_there(watch: DirectoryWatch, control: Path) -> int:
    while not control.is_socket():
        await watch.changed()
    # Between the daemon's bind and its listen the socket exists and refuses; nothing announces the listen.
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(ConnectionRefusedError),
        wait=tenacity.wait_exponential(multiplier=0.001, max=0.5),
        stop=tenacity.stop_after_delay(_DAEMON_DEADLINE),
        reraise=True,
    )
    return await retrying(_connect, control)


async def _connect(control: Path) -> int:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with contextlib.closing(sock):
        sock.connect(str(control))
        return sock.detach()


def _comm(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


async def _cancel(*tasks: asyncio.Task[int]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
