"""guest.entropy and guest.add_entropy: what the kernel's random number generator is fed with."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from gcsagent.agent.call import Call
from gcsagent.agent.guest.only import refuse_outside
from gcsagent.agent.proc import text
from protocol.errors import Code, RpcError
from protocol.families.guest import AddEntropy, Entropy
from protocol.method import Empty

# linux/random.h
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207

_RANDOM = "/proc/sys/kernel/random"
_SOURCE = "/sys/devices/virtual/misc/hw_random/rng_current"


class EntropyService:
    def __init__(self, guest: bool) -> None:
        self._guest = guest

    def entropy(self, _params: Empty, _call: Call) -> Entropy:
        return look()

    def add(self, params: AddEntropy, call: Call) -> Entropy:
        refuse_outside(self._guest, "feed the random number generator")
        bits = 8 * len(params.data) if params.bits is None else params.bits
        if bits > 8 * len(params.data):
            raise RpcError(
                Code.INVALID_ARGUMENT,
                f"bits: {len(params.data)} bytes are worth {8 * len(params.data)} bits at most, not {bits}",
                field="bits",
            )
        call.commit()
        add(params.data, bits)
        if params.reseed:
            reseed()
        return look()


def look() -> Entropy:
    source = text(_SOURCE)
    return Entropy(
        int(text(f"{_RANDOM}/entropy_avail") or 0),
        int(text(f"{_RANDOM}/poolsize") or 0),
        "" if source == "none" else source,
    )


def add(data: bytes, bits: int) -> None:
    """Mixes ``data`` in and credits ``bits`` (random(4), RNDADDENTROPY). Raises OSError."""
    _random(RNDADDENTROPY, struct.pack("=ii", bits, len(data)) + data)


def reseed() -> None:
    """Has the generator take new keys from what it has been fed. Raises RpcError, OSError."""
    try:
        _random(RNDRESEEDCRNG)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        message = "the kernel's random number generator is not initialised yet: add entropy with credit first"
        raise RpcError(Code.FAILED_PRECONDITION, message, errno=errno.ENODATA) from error


def _random(operation: int, argument: bytes = b"") -> None:
    fd = os.open("/dev/random", os.O_RDWR | os.O_CLOEXEC)
    try:
        # Immutable bytes may be 1024 at most, ioctl() has it.
        fcntl.ioctl(fd, operation, bytearray(argument) if argument else 0)
    finally:
        os.close(fd)
