"""What only a guest's PID 1 does: the power button, and the end of the machine."""

from __future__ import annotations

import glob
import os
import struct
from collections.abc import Callable

from gcsagent.common import boot
from gcsagent.common.loop import Loop
from gcsagent.supervisor.log import log
from gcsagent.supervisor.unmount import kill_all, unmount_all

BALLOON = "/sys/bus/virtio/drivers/virtio_balloon"
"""The end of the machine breaks the queues of its virtio devices, while this driver may still be reporting
free pages: Linux 6.12 then warns, with a trace, of what can mean nothing any more."""

_EVENT = struct.Struct("llHHi")  # struct input_event, linux/input.h, 64-bit
_EV_KEY, _KEY_POWER = 1, 116


class PowerButton:
    """Watches the input devices for KEY_POWER (ACPI's button driver sends it; QMP system_powerdown too)."""

    def __init__(self, loop: Loop, pressed: Callable[[], None]) -> None:
        self._loop, self._pressed = loop, pressed
        self._fds: list[int] = []
        for path in sorted(glob.glob("/dev/input/event*")):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                log("warning", "an input device cannot be opened", path=path, error=str(error))
                continue
            self._fds.append(fd)
            loop.watch(fd, lambda _events, fd=fd: self._read(fd))  # type: ignore[misc]

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, 64 * _EVENT.size)
        except BlockingIOError:
            return
        except OSError:  # unplugged: it would be readable for ever
            data = b""
        if not data:
            self._loop.forget(fd)
            self._fds.remove(fd)
            os.close(fd)
        for _, _, kind, code, value in _EVENT.iter_unpack(data[: len(data) - len(data) % _EVENT.size]):
            if (kind, code, value) == (_EV_KEY, _KEY_POWER, 1):
                self._pressed()


def end(action: str) -> None:
    """Kills all there is, unmounts, syncs, powers off or reboots.

    PID 1 must never return from this: the kernel panics when it exits.
    """
    kill_all()
    unmount_all()
    _unbind(BALLOON)
    program = "reboot" if action == "reboot" else "poweroff"
    try:
        # -f: reboot(2) at once; there is no init system to tell, we are it. -n: a second sync could hang
        # where the first one, which is done, was given up.
        os.execv("/bin/busybox", ["busybox", program, "-f", "-n"])
    except OSError as error:
        boot.failed("shutdown", f"cannot {program}: {error}")
        raise


def _unbind(driver: str) -> None:
    """Takes all its devices from a driver, which ends what it does in the background."""
    for device in glob.glob(f"{driver}/virtio*"):
        try:
            fd = os.open(f"{driver}/unbind", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, os.path.basename(device).encode())
            finally:
                os.close(fd)
        except OSError as error:
            log("warning", "a device stays with its driver", device=device, error=str(error))
