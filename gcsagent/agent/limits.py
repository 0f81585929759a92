"""container.update: other limits for a container that is there; all of them, or none.

The runtime gets what it can change, and the agent writes the rest (:mod:`gcsagent.agent.io_limits`).
What was in force is written down beforehand, and put back when something fails: the runtime stops at the
first file that refuses, and leaves what it had changed until then.
"""

from __future__ import annotations

import contextlib
from typing import Any

from gcsagent.agent import changes, io_limits, limit_files
from gcsagent.agent.call import Call
from gcsagent.agent.calls import Outcome
from gcsagent.agent.changes import Change
from gcsagent.agent.container import Container
from gcsagent.agent.registry import Registry
from protocol.checks import UNLIMITED, cpu_list
from protocol.errors import Code, RpcError
from protocol.families.container import UpdateContainer
from protocol.method import Empty

UPDATE = "update"

PERIOD_US = 100_000
"""The kernel's default period for CPU limits (sched-bwc.rst); the quota is the part of it that is allowed."""

_ONLINE = {"cpuset_cpus": "/sys/devices/system/cpu/online", "cpuset_mems": "/sys/devices/system/node/online"}


class LimitService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def update(self, params: UpdateContainer, call: Call) -> Empty:
        """What is wrong with the limits is said before anything is changed."""
        container = self._registry.get(params.container)
        async with container.changing:
            container.check("update")
            fields = _fields(params)
            limit_files.require(container.cgroup, [*fields, *(["io"] if params.io else [])])
            wanted = resources(params, _memory_limit(container))
            table = io_limits.wanted_table(params.io)
            detail: dict[str, Any] = {
                "before": limit_files.snapshot(container.cgroup, fields),
                "io_before": io_limits.before(container.cgroup, table),
                "io": io_limits.merged(container.io_limits, table),
            }
            container.change = Change(UPDATE, call.mark, detail)
            try:
                container.save()
                _write_own(container, params)
                _write_io(container, table)
                if wanted:
                    await container.runtime.update(container.ident, wanted, call.timeout)
                    _write_io(container, detail["io"])
            except BaseException:
                _undo(container, detail)
                changes.end(self._registry, container)
                raise
            call.commit()
            container.io_limits = detail["io"]
            changes.end(self._registry, container)
        return Empty()


def settle(container: Container, change: Change, outcome: Outcome | None) -> bool:
    """Finishes what an earlier agent had begun, its runtime call having ended; returns whether it is done.

    Without an outcome the runtime had not been asked, or had failed.
    """
    if outcome is None or outcome.status != 0:
        _undo(container, change.detail)
        return False
    with contextlib.suppress(OSError, RpcError):
        _write_io(container, change.detail["io"])
    container.io_limits = change.detail["io"]
    return True


def _undo(container: Container, detail: dict[str, Any]) -> None:
    limit_files.restore(container.cgroup, detail["before"])
    with contextlib.suppress(OSError, RpcError):
        _write_io(container, io_limits.merged(container.io_limits, detail["io_before"]))


def _write_own(container: Container, params: UpdateContainer) -> None:
    """What runtimes differ in: crun cannot take these limits away, and knows one file for a weight."""
    if params.pids == UNLIMITED:
        container.cgroup.write("pids.max", "max\n")
    if params.cpus == UNLIMITED:
        unified = bool(container.cgroup.read("cpu.max"))
        container.cgroup.write(
            *(("cpu.max", f"max {PERIOD_US}\n") if unified else ("cpu.cfs_quota_us", "-1\n"))
        )
    if params.io_weight is not None:
        limit_files.write_io_weight(container.cgroup, params.io_weight)


def _write_io(container: Container, table: io_limits.Table) -> None:
    """Raises INVALID_ARGUMENT with the kernel's reason."""
    try:
        io_limits.write_table(container.cgroup, table)
    except OSError as error:
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"io: the kernel refuses a limit on {', '.join(table)} ({error.strerror}); give whole disks,"
            " not partitions",
            field="io",
            errno=error.errno,
        ) from error


def _fields(params: UpdateContainer) -> list[str]:
    """The limits that are named, but for ``io``. Raises INVALID_ARGUMENT when there are none at all."""
    fields = [name for name in limit_files.FILES if getattr(params, name) is not None]
    if not fields and not params.io:
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"nothing to update: give {', '.join(limit_files.FILES)} or io",
            field="memory_bytes",
        )
    for name, path in _ONLINE.items():
        _check_online(name, getattr(params, name), path)
    return fields


def _check_online(field: str, wanted: str | None, path: str) -> None:
    """With v1 runc's words for it would be EINVAL; v2 takes it and lets it run anywhere."""
    if wanted is None:
        return
    try:
        with open(path, encoding="ascii") as file:
            online = file.read().strip()
    except OSError:
        return
    missing = cpu_list(wanted) - cpu_list(online)
    if missing:
        raise RpcError(
            Code.INVALID_ARGUMENT, f"{field}: the guest has {online}, and no {min(missing)}", field=field
        )


def _memory_limit(container: Container) -> int | None:
    for name in limit_files.FILES["memory_bytes"]:
        for text in container.cgroup.read(name):
            return int(text) if text.strip().isdigit() and int(text) < 1 << 62 else None
    return None


def resources(params: UpdateContainer, memory_limit: int | None) -> dict[str, Any]:
    """The limits as ``linux.resources`` of the OCI runtime spec. Raises INVALID_ARGUMENT.

    ``memory_limit`` is the one in force: a runtime computes v2's limit on swap from both.
    """
    memory = {
        "limit": params.memory_bytes,
        "reservation": params.memory_reservation_bytes,
        "swap": params.memory_swap_bytes,
    }
    if params.memory_swap_bytes is not None and params.memory_swap_bytes != UNLIMITED:
        memory["limit"] = limit = memory_limit if params.memory_bytes is None else params.memory_bytes
        if limit is None or limit == UNLIMITED or limit > params.memory_swap_bytes:
            raise RpcError(
                Code.INVALID_ARGUMENT,
                "memory_swap_bytes: is memory and swap together, so it needs a limit on memory that is not"
                " larger: give memory_bytes with it",
                field="memory_swap_bytes",
            )
    cpu = {"shares": params.cpu_shares, "cpus": params.cpuset_cpus, "mems": params.cpuset_mems}
    if params.cpus is not None and params.cpus != UNLIMITED:
        cpu |= {"period": PERIOD_US, "quota": round(params.cpus * PERIOD_US)}
    wanted: dict[str, dict[str, Any]] = {
        "memory": memory,
        "cpu": cpu,
        "pids": {"limit": None if params.pids == UNLIMITED else params.pids},
    }
    given = {kind: _given(values) for kind, values in wanted.items()}
    return {kind: values for kind, values in given.items() if values}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
