"""Limits on what a container moves to and from a block device: io.max of cgroup v2, blkio.throttle of v1.

Written by the agent itself: ``runc update`` takes weights and leaves the devices out, and writes those of
the container's spec again each time. 0 stands for no limit.
"""

from __future__ import annotations

import os
import stat

from gcsagent.agent.cgroups import Cgroup
from gcsagent.agent.limit_files import IO_FILES
from protocol.errors import Code, RpcError
from protocol.usage import IoLimit

Table = dict[str, dict[str, int]]
"""By device (``MAJ:MIN``), by key of IO_FILES; 0: none."""


def wanted_table(limits: tuple[IoLimit, ...]) -> Table:
    """Devices by their numbers. Raises INVALID_ARGUMENT or NOT_FOUND naming the field."""
    table: Table = {}
    for index, limit in enumerate(limits):
        values = {key: value for key in IO_FILES if (value := getattr(limit, key)) is not None}
        if not values:
            keys = ", ".join(IO_FILES)
            raise RpcError(
                Code.INVALID_ARGUMENT, f"io[{index}]: give at least one of {keys}", field=f"io[{index}]"
            )
        table.setdefault(_device(limit.device, f"io[{index}].device"), {}).update(values)
    return table


def _device(name: str, field: str) -> str:
    if name.startswith("/"):
        try:
            found = os.stat(name)
        except OSError as error:
            raise RpcError(
                Code.NOT_FOUND, f"{field}: {name} in the guest: {error.strerror}", field=field
            ) from error
        if not stat.S_ISBLK(found.st_mode):
            raise RpcError(Code.INVALID_ARGUMENT, f"{field}: {name} is no block device", field=field)
        return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    if not os.path.isdir(f"/sys/dev/block/{name}"):
        raise RpcError(Code.NOT_FOUND, f"{field}: the guest has no block device {name}", field=field)
    return name


def read_table(cgroup: Cgroup) -> Table:
    """The limits in force."""
    table: Table = {}
    for text in cgroup.read("io.max"):
        for line in text.splitlines():
            device, *fields = line.split() or [""]
            values = dict(field.partition("=")[::2] for field in fields)
            for key, (name, _) in IO_FILES.items():
                if values.get(name, "").isdigit():
                    table.setdefault(device, {})[key] = int(values[name])
    for key, (_, file) in IO_FILES.items():
        for text in cgroup.read(file):
            for row in (line.split() for line in text.splitlines()):
                if len(row) == 2 and row[1].isdigit():
                    table.setdefault(row[0], {})[key] = int(row[1])
    return table


def write_table(cgroup: Cgroup, table: Table) -> None:
    """Raises OSError as the kernel has it; ENODEV is a partition."""
    unified = bool(cgroup.read("io.max"))
    for device, values in table.items():
        if unified:
            pairs = (f"{IO_FILES[key][0]}={value or 'max'}" for key, value in values.items())
            cgroup.write("io.max", f"{device} {' '.join(pairs)}\n")
            continue
        for key, value in values.items():
            cgroup.write(IO_FILES[key][1], f"{device} {value}\n")


def merged(one: Table, other: Table) -> Table:
    """Both; where they differ, the other."""
    return {device: {**one.get(device, {}), **other.get(device, {})} for device in {**one, **other}}


def before(cgroup: Cgroup, table: Table) -> Table:
    """What has to be written to undo ``table``: the limits in force on its devices, and 0 for none."""
    now = read_table(cgroup)
    return {
        device: {key: now.get(device, {}).get(key, 0) for key in values} for device, values in table.items()
    }
