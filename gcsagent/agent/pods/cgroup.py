"""A pod's cgroup: around its containers' cgroups, with limits of its own.

Files are those of the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/*.rst.
"""

from __future__ import annotations

import contextlib

from gcsagent.agent import limit_files
from gcsagent.agent.cgroups import Cgroup
from protocol.checks import UNLIMITED
from protocol.dataclass import names_of, replace
from protocol.errors import Code, RpcError
from protocol.pods import PodLimits

PERIOD_US = 100_000
FIELDS = names_of(PodLimits)


def given(limits: PodLimits) -> list[str]:
    """Those that are to be there."""
    return [name for name in FIELDS if getattr(limits, name) not in (None, UNLIMITED)]


def apply(cgroup: Cgroup, limits: PodLimits) -> None:
    """All of them, or what was before; what is not named is unlimited. Raises RpcError."""
    limit_files.require(cgroup, given(limits))
    before = limit_files.snapshot(cgroup, FIELDS)
    for field in FIELDS:
        value = getattr(limits, field)
        try:
            _write(cgroup, field, None if value == UNLIMITED else value)
        except OSError as error:
            limit_files.restore(cgroup, before)
            raise RpcError(
                Code.INVALID_ARGUMENT,
                f"{field}: the kernel refuses {value} for the pod ({error.strerror}); it may be less than"
                " what the pod uses now",
                field=field,
                errno=error.errno,
            ) from error


def _write(cgroup: Cgroup, field: str, value: float | None) -> None:
    for name, text in _texts(field, value).items():
        if cgroup.read(name):
            cgroup.write(name, f"{text}\n")


def _texts(field: str, value: float | None) -> dict[str, str]:
    """What to write into which file; those of the other version of cgroups are not there."""
    if field == "memory_bytes":
        return {
            "memory.max": "max" if value is None else str(value),
            "memory.limit_in_bytes": str(UNLIMITED if value is None else value),
        }
    if field == "cpus":
        quota = None if value is None else round(value * PERIOD_US)
        return {
            "cpu.max": f"{'max' if quota is None else quota} {PERIOD_US}",
            "cpu.cfs_period_us": str(PERIOD_US),
            "cpu.cfs_quota_us": str(UNLIMITED if quota is None else quota),
        }
    if field == "cpu_shares":
        shares = 1024 if value is None else round(value)
        weight = 100 if value is None else 1 + (shares - 2) * 9999 // 262142  # as runc converts
        return {"cpu.weight": str(weight), "cpu.shares": str(shares)}
    return {"pids.max": "max" if value is None else str(value)}


def merged(old: PodLimits, new: object) -> PodLimits:
    """``new`` has the same names; None leaves one as it is."""
    found = {name: value for name in FIELDS if (value := getattr(new, name)) is not None}
    return replace(old, **found)


def apply_again(cgroup: Cgroup, limits: PodLimits) -> None:
    """What an earlier agent may have been killed in the middle of."""
    with contextlib.suppress(RpcError):
        apply(cgroup, limits)
