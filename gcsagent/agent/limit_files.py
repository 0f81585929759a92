"""Which kernel files stand behind each limit, and how to put them back.

Names are those of the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/*.rst. A limit has
one of its files where the kernel can enforce it, and none where it cannot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from gcsagent.agent.cgroups import Cgroup
from protocol.errors import Code, RpcError

FILES: dict[str, tuple[str, ...]] = {
    "memory_bytes": ("memory.max", "memory.limit_in_bytes"),
    "memory_swap_bytes": ("memory.swap.max", "memory.memsw.limit_in_bytes"),
    "memory_reservation_bytes": ("memory.low", "memory.soft_limit_in_bytes"),
    "cpus": ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"),
    "cpu_shares": ("cpu.weight", "cpu.shares"),
    "cpuset_cpus": ("cpuset.cpus",),
    "cpuset_mems": ("cpuset.mems",),
    "pids": ("pids.max",),
    "io_weight": ("io.bfq.weight", "io.weight", "blkio.bfq.weight", "blkio.weight"),
}
"""By argument of container.update, v2's names first."""

IO_FILES: dict[str, tuple[str, str]] = {
    "read_bps": ("rbps", "blkio.throttle.read_bps_device"),
    "write_bps": ("wbps", "blkio.throttle.write_bps_device"),
    "read_iops": ("riops", "blkio.throttle.read_iops_device"),
    "write_iops": ("wiops", "blkio.throttle.write_iops_device"),
}
"""By key of a device's limit: the key in v2's io.max, and v1's file."""


def require(cgroup: Cgroup, fields: Iterable[str]) -> None:
    """Raises UNIMPLEMENTED naming the first of these limits that this kernel cannot enforce."""
    for field in fields:
        if field == "io":
            names: tuple[str, ...] = ("io.max", *(name for _, name in IO_FILES.values()))
        else:
            names = FILES[field]
        if not any(cgroup.read(name) for name in names):
            raise RpcError(
                Code.UNIMPLEMENTED,
                f"{field}: this guest's kernel cannot limit that: the container's cgroup has no"
                f" {' or '.join(names[:2])}; leave it out",
                field=field,
            )


def snapshot(cgroup: Cgroup, fields: Iterable[str]) -> dict[str, str]:
    """What the files of these limits say now, by name."""
    names = [name for field in fields for name in FILES[field]]
    return {name: _first_line(texts[0]) for name in names if (texts := cgroup.read(name))}


def restore(cgroup: Cgroup, before: dict[str, str]) -> None:
    """Puts back what differs. Twice: with v1 one limit may be in the way of the other."""
    for _ in range(2):
        for name, text in before.items():
            if [_first_line(found) for found in cgroup.read(name)] not in ([text], []):
                with contextlib.suppress(OSError):
                    cgroup.write(name, text + "\n")


def write_io_weight(cgroup: Cgroup, weight: int) -> None:
    """``weight`` is blkio's, 10 to 1000. io.weight goes from 1 to 10000: converted as runc does it."""
    for name in FILES["io_weight"]:
        if cgroup.read(name):
            cgroup.write(name, f"{1 + (weight - 10) * 9999 // 990 if name == 'io.weight' else weight}\n")
            return


def _first_line(text: str) -> str:
    """io.weight has lines for devices behind it, which updates do not change."""
    return text.split("\n")[0].strip()
