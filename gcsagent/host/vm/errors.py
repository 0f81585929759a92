"""Everything the VM launcher can fail with.

`str()` of each is one line that says what to do or what happened; `gcsctl` prints it and exits 125.
Guest bytes in a message have been through `console.sanitize`.
"""

from __future__ import annotations

import signal


class VmError(Exception):
    """Base of all launcher errors."""

    def report(self) -> str:
        """What to show a person: the one-line message, and whatever helps to understand it below."""
        return str(self)


class InvalidVmConfig(VmError):
    """A value the caller gave cannot be used."""


class ToolMissing(VmError):
    """A program or image file is not where it was looked for."""


class UnsuitableTool(VmError):
    """A program was found but is known not to work here."""


class DiskError(VmError):
    """A root file system could not be turned into, or recognised as, a disk."""


class ShareError(VmError):
    """A directory cannot be shared with a VM, or a share cannot be taken away."""


class LaunchError(VmError):
    """QEMU or a daemon it needs did not start."""


class QmpError(VmError):
    """QEMU refused a command, broke the protocol, or did not answer in time."""


class QmpClosed(QmpError):
    """The monitor connection is gone: QEMU has exited or is exiting."""


class ReplugError(VmError):
    """The vsock device could not be unplugged or plugged again; the VM itself runs on.

    Attributes:
        plugged: whether the VM has its device still. Without it the guest is out of reach; trying again may
            mend that.
    """

    def __init__(self, reason: str, *, plugged: bool) -> None:
        self.plugged = plugged
        state = "still plugged" if plugged else "unplugged now, try again or power the VM down"
        super().__init__(f"cannot replug the vsock device: {reason} (it is {state})")


class SnapshotError(VmError):
    """A VM cannot be saved, or not be made from a snapshot."""


class PlugError(VmError):
    """A device cannot be plugged in, or unplugged."""


class BootError(VmError):
    """The guest did not become ready.

    Attributes:
        stage: last boot stage the guest reported; "none" before the first one.
        reason: what went wrong, one line.
        lines: the console lines that bear on it, sanitized.
        silent: the guest wrote nothing at all to its console.
    """

    def __init__(self, stage: str, reason: str, lines: tuple[str, ...] = (), *, silent: bool = False) -> None:
        self.stage = stage
        self.reason = reason
        self.lines = lines
        self.silent = silent
        reached = "before its first stage" if stage == "none" else f"after stage '{stage}'"
        where = "before the kernel said anything" if silent else reached
        super().__init__(f"VM boot failed {where}: {reason}")

    def report(self) -> str:
        """The one-line message followed by the console lines."""
        return "\n".join([str(self), *(f"  {line}" for line in self.lines)])


class VmNotFound(VmError):
    """No named VM of that name."""


class VmExists(VmError):
    """A named VM of that name is running or being started."""


class VmNotRunning(VmError):
    """The named VM is known but not running."""


class Interrupted(VmError):
    """A signal told this program to end while it was looking after a VM.

    Attributes:
        signum: the signal's number.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"ended by {signal.Signals(signum).name}")
