"""Unplugs a running guest's vsock device and plugs it again, with a fresh daemon behind the same address.

QEMU's vhost-user-vsock never reconnects to a daemon, so a new daemon takes a new device: device_del, which
the guest has to agree to, then a new chardev over a connection that is handed to QEMU with the monitor's
getfd, then device_add. The host kernel's vhost-vsock goes the same way, with a newly opened device that
claims the same CID.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import tenacity

from gcsagent.host.vm.errors import QmpClosed, QmpError, ReplugError, VmError
from gcsagent.host.vm.qemu import VSOCK_BACKEND, VSOCK_DEVICE, vsock_device
from gcsagent.host.vm.qmp import QmpClient, QmpEvent
from gcsagent.host.vm.vsockdev import VsockDevice

# How long the guest may take before QEMU is asked whether it still lives, and QEMU to answer: both take
# milliseconds.
_PATIENCE = 3.0

# How long QEMU may take to free a device that it has announced as deleted.
_FREE_SECONDS = 5.0

# How often QEMU is asked at most whether the guest's driver runs.
_LOOK_SECONDS = 0.05

_VIRTIO_DEVICE = f"/machine/peripheral/{VSOCK_DEVICE}/virtio-backend"


class VsockPlug:
    """Where the vsock device is plugged into one QEMU.

    Attributes:
        plugged: whether QEMU is known to have the device.
    """

    def __init__(self, qmp: QmpClient, device: VsockDevice, *, plugged: bool = True) -> None:
        self.plugged = plugged
        self._qmp = qmp
        self._device = device
        self._uses_daemon = device.choice.kind == "vhost-user-vsock"
        self._backend = VSOCK_BACKEND if self._uses_daemon and plugged else ""
        self._names = (f"vsock{number}" for number in itertools.count(1))
        self._leaving: asyncio.Future[None] | None = None

    def on_event(self, event: QmpEvent) -> None:
        """To be told of every event of the monitor."""
        if event.data.get("device") != VSOCK_DEVICE:
            return
        if event.name == "DEVICE_DELETED":
            self.plugged = False
            self._settle(None)
        elif event.name == "DEVICE_UNPLUG_GUEST_ERROR":
            self._settle(QmpError("the guest refuses to let go of it"))

    def abandon(self) -> None:
        """The VM has ended."""
        self._settle(QmpClosed("the VM has ended"))

    async def replug(self, timeout: float) -> None:
        """Unplugs the device and plugs it again. To be called by one task at a time.

        Args:
            timeout: seconds the guest may take to let go of the device.

        Raises:
            ReplugError: it failed; nothing of the attempt is left.
        """
        await self.unplug(timeout)
        await self.plug()

    async def unplug(self, timeout: float) -> None:
        """The first half of it: the guest is out of reach then. Raises ReplugError."""
        try:
            await self._unplug(timeout)
            # Who dials meanwhile is refused rather than left waiting.
            self._device.close()
        except (VmError, OSError) as error:
            raise ReplugError(str(error), plugged=self.plugged) from error

    async def plug(self) -> None:
        """The second half. Raises ReplugError."""
        try:
            if self._device.fd < 0:
                await self._device.renew()
            await self._plug(next(self._names))
        except (VmError, OSError) as error:
            raise ReplugError(str(error), plugged=self.plugged) from error

    async def publish(self) -> None:
        """Has hosts dial once the guest's driver runs, or where QEMU cannot tell (before 7.2), from now on.

        vhost-device-vsock 0.3.0 serves nobody any more, without a word, if somebody dials between the
        guest's memory and its queues having been told to it: for a millisecond while the driver starts, which
        hosts that try again and again met one replug in thirty. Nothing announces the driver, so QEMU is
        asked; what slips through all the same, `VsockDevice.check` finds.
        """
        if not self._uses_daemon:
            return
        looks = 0

        async def look() -> int:
            nonlocal looks
            looks = looks + 1 if await self._driver_runs() else 0
            return looks

        retrying = tenacity.AsyncRetrying(
            # What QEMU has told the daemon the daemon may still be reading: once more, then.
            retry=tenacity.retry_if_result(lambda looks: looks < 2),
            wait=tenacity.wait_exponential(multiplier=0.002, max=_LOOK_SECONDS),
        )
        with contextlib.suppress(QmpClosed):
            await retrying(look)
            self._device.publish()

    async def _driver_runs(self) -> bool:
        try:
            answer = await self._qmp.execute("x-query-virtio-status", {"path": _VIRTIO_DEVICE})
        except QmpClosed:
            raise
        except QmpError:
            return True
        status = answer.get("status") if isinstance(answer, dict) else None
        bits = status.get("statuses", ()) if isinstance(status, dict) else ()
        return any(str(bit).startswith("VIRTIO_CONFIG_S_DRIVER_OK") for bit in bits)

    async def _unplug(self, timeout: float) -> None:
        # Asked rather than remembered: an earlier attempt may have come to its end after its deadline.
        children = await self._qmp.execute("qom-list", {"path": "/machine/peripheral"})
        if any(child.get("name") == VSOCK_DEVICE for child in children):
            self._leaving = asyncio.get_running_loop().create_future()
            await self._qmp.execute("device_del", {"id": VSOCK_DEVICE})
            await self._left(self._leaving, timeout)
        self.plugged = False
        await self._drop_backend()

    async def _left(self, leaving: asyncio.Future[None], timeout: float) -> None:
        deadline = asyncio.get_running_loop().time() + timeout
        await asyncio.wait((leaving,), timeout=min(timeout, _PATIENCE))
        if not leaving.done() and not await self._qemu_answers():
            # It waits for the daemon, which hangs, to stop the device; end of file frees it.
            self._device.kill_daemon()
        try:
            async with asyncio.timeout_at(deadline):
                await leaving
        except TimeoutError:
            raise QmpError(f"the guest did not let go of it within {timeout:g} s") from None

    async def _qemu_answers(self) -> bool:
        try:
            await self._qmp.execute("query-status", timeout=_PATIENCE)
        except QmpError:
            return False
        return True

    async def _drop_backend(self) -> None:
        if not self._backend:
            return
        # QEMU announces the deletion first and frees the device at its leisure (RCU); until then its chardev
        # is busy, and nothing tells when it no longer is.
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_exponential(multiplier=0.002, max=0.5),
            stop=tenacity.stop_after_delay(_FREE_SECONDS),
            reraise=True,
        )
        await retrying(self._qmp.execute, "chardev-remove", {"id": self._backend})
        self._backend = ""

    async def _plug(self, name: str) -> None:
        try:
            await self._qmp.execute("getfd", {"fdname": name}, fd=self._device.fd)
            self._device.handed_over()
            if self._uses_daemon:
                await self._qmp.execute("chardev-add", _chardev(name))
                self._backend = name
            choice = self._device.choice
            await self._qmp.execute("device_add", vsock_device(choice.kind, self._device.cid, name))
        except BaseException:
            # The daemon first: a QEMU that waits for its answer is then free to do the rest.
            self._device.close()
            await self._take_back(name)
            raise
        self.plugged = True

    async def _take_back(self, name: str) -> None:
        # Whether QEMU still holds the descriptor by its name depends on how far it came.
        with contextlib.suppress(QmpError):
            await self._qmp.execute("closefd", {"fdname": name})
        with contextlib.suppress(QmpError):
            await self._drop_backend()

    def _settle(self, error: QmpError | None) -> None:
        if self._leaving is None or self._leaving.done():
            return
        if error is None:
            self._leaving.set_result(None)
        else:
            self._leaving.set_exception(error)
            # Whoever waited may have gone.
            self._leaving.exception()


def _chardev(name: str) -> dict[str, object]:
    address = {"type": "fd", "data": {"str": name}}
    return {"id": name, "backend": {"type": "socket", "data": {"addr": address, "server": False}}}


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, QmpError) and not isinstance(error, QmpClosed)
