"""guest.time and guest.set_time: readings to measure the clock by, and its steps and slews.

Steps and slews are the kernel's own: a step moves the clock by an offset in one system call, a slew goes on
in the kernel whether or not the agent lives. Whoever was stepped by an agent that was killed before it could
say so measures again.
"""

from __future__ import annotations

import errno
import functools
import logging
import time
from typing import Any

from gcsagent.agent.call import Call
from gcsagent.agent.guest.only import refuse_outside
from protocol.errors import Code, RpcError
from protocol.families.guest import MAX_SLEW_NS, ClockChange, GuestTime, SetTime, TimeSet
from protocol.method import Empty

_log = logging.getLogger("agent.guest.clock")


class ClockService:
    def __init__(self, guest: bool) -> None:
        self._guest = guest

    def time(self, _params: Empty, _call: Call) -> GuestTime:
        received = time.time_ns()
        boottime, slewing = time.clock_gettime_ns(time.CLOCK_BOOTTIME), _slew(None)
        return GuestTime(received, time.time_ns(), boottime, slewing)

    def set_time(self, params: SetTime, call: Call) -> TimeSet:
        refuse_outside(self._guest, "set the clock")
        _check(params)
        call.commit()
        if params.how is ClockChange.SLEW:
            before = time.time_ns()
            _slew(params.offset_ns)
        else:
            before = step(params)
        done = TimeSet(before, time.time_ns(), _slew(None))
        _log.info("clock set", extra={"how": params.how.value, "by_ns": done.after_ns - before})
        return done


def _check(params: SetTime) -> None:
    if (params.time_ns is None) == (params.offset_ns is None):
        raise RpcError(Code.INVALID_ARGUMENT, "give exactly one of time_ns and offset_ns", field="offset_ns")
    if params.how is not ClockChange.SLEW:
        return
    if params.offset_ns is None:
        raise RpcError(Code.INVALID_ARGUMENT, "a slew takes offset_ns, not time_ns", field="time_ns")
    if abs(params.offset_ns) > MAX_SLEW_NS:
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"a slew of {params.offset_ns / 1e9:.1f} s would take more than five hours: step instead",
            field="offset_ns",
        )


def step(params: SetTime) -> int:
    """Returns the clock right before."""
    before = time.time_ns()
    wanted = params.time_ns if params.time_ns is not None else before + (params.offset_ns or 0)
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, wanted)
    except (OSError, OverflowError) as error:
        code = getattr(error, "errno", errno.EINVAL)
        if code not in (errno.EINVAL, errno.EPERM):
            raise
        kind = Code.PERMISSION_DENIED if code == errno.EPERM else Code.INVALID_ARGUMENT
        field = "time_ns" if params.time_ns is not None else "offset_ns"
        raise RpcError(
            kind, f"the kernel does not take {wanted} ns since 1970: {error}", errno=code, field=field
        ) from error
    return before


def _slew(offset_ns: int | None) -> int:
    """Begins a slew in place of any other, unless ``offset_ns`` is None; what was left before, in ns."""
    adjtime, timeval, byref = _adjtime()
    left = timeval()
    delta = None if offset_ns is None else byref(timeval(*divmod(offset_ns // 1000, 1_000_000)))
    if adjtime(delta, byref(left)) != 0:
        raise OSError(errno.EPERM, "adjtime")
    return int(left.sec * 1_000_000_000 + left.usec * 1000)


@functools.cache
def _adjtime() -> tuple[Any, Any, Any]:
    """adjtime(3), its struct timeval, and how to point to one."""
    import ctypes  # on demand: the agent starts without it

    class Timeval(ctypes.Structure):
        _fields_ = (("sec", ctypes.c_long), ("usec", ctypes.c_long))

    return ctypes.CDLL(None, use_errno=True).adjtime, Timeval, ctypes.byref
