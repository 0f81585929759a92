"""Cases about limits: what was updated is in force, stays, and is what the statistics say."""

from __future__ import annotations

from typing import Any

import pytest

from gcsagent.host.client import Client
from protocol.errors import Code, RpcError
from protocol.usage import IoLimit
from tests.cases.target import MIB, OUTPUT, PIPES, Target, case, connect, expect, raw_call, refused, running

DISK = "d=$(ls /sys/block | grep -vE '^(loop|ram|zram)' | head -1); cat /sys/block/$d/dev; echo $d"


@case
async def updates_leave_what_they_do_not_name(target: Target) -> None:
    """One after the other, then all at once; the spec's own limits and a pause are left alone, too."""

    def limit(spec: dict[str, Any]) -> None:
        spec["linux"]["resources"] = {"memory": {"limit": 64 * MIB}, "cpu": {"shares": 512}}

    async with await connect(target) as client, running(target, client, spec=limit) as init:
        where = init.container
        share = _share(await client.container_stats(where))
        assert share is not None
        await client.update_container(where, cpus=0.5)
        await client.update_container(where, pids=50)
        await client.update_container(where, cpuset_cpus="0", cpuset_mems="0")
        await client.update_container(where, memory_reservation_bytes=16 * MIB)
        await client.pause_container(where)
        await client.update_container(where, memory_bytes=96 * MIB)
        await client.resume_container(where)
        found = await client.container_stats(where)
        assert (found.memory.limit, found.memory.reservation) == (96 * MIB, 16 * MIB)
        assert (found.cpu.limit, _share(found)) == (0.5, share)
        assert (found.cpu.cpuset_cpus, found.cpu.cpuset_mems, found.pids.limit) == ("0", "0", 50)
        await client.update_container(where, cpu_shares=1024, cpus=-1, pids=-1, memory_bytes=-1)
        found = await client.container_stats(where)
        assert (found.memory.limit, found.pids.limit, found.cpu.limit) == (None, None, None)
        assert (_share(found) or 0) > share
        assert (found.memory.reservation, found.cpu.cpuset_cpus) == (16 * MIB, "0")


def _share(found: Any) -> int | None:
    """v1 has shares, v2 a weight: both grow."""
    value: int | None = found.cpu.shares if found.cpu.weight is None else found.cpu.weight
    return value


@case
async def an_update_that_fails_changes_nothing(target: Target) -> None:
    """Limits that are fine come with one that is not, whoever finds that out."""
    async with await connect(target) as client, running(target, client) as init:
        where = init.container
        await client.update_container(where, memory_bytes=96 * MIB, pids=50)
        before = await client.container_stats(where)
        for field, value, code in (
            ("cpuset_cpus", "0-4095", Code.INVALID_ARGUMENT),
            ("cpuset_mems", "4095", Code.INVALID_ARGUMENT),
            ("cpuset_cpus", "x", Code.INVALID_ARGUMENT),
            ("cpu_shares", 1, Code.INVALID_ARGUMENT),
            ("memory_swap_bytes", 64 * MIB, Code.INVALID_ARGUMENT),
        ):
            arguments = {"container": where, "pids": 7, "memory_bytes": 80 * MIB, field: value}
            with refused(code, field=field):
                await raw_call(target, "container.update", arguments)
        for device, code, field in (
            ("/dev/null", Code.INVALID_ARGUMENT, "io[0].device"),
            ("/dev/no-such-disk", Code.NOT_FOUND, "io[0].device"),
            ("4000:9", Code.NOT_FOUND, "io[0].device"),
        ):
            with refused(code, field=field):
                await client.update_container(where, pids=7, io=[IoLimit(device, read_bps=MIB)])
        after = await client.container_stats(where)
        assert (after.memory.limit, after.pids.limit) == (before.memory.limit, before.pids.limit)
        assert (after.cpu.cpuset_cpus, after.io.limits) == (before.cpu.cpuset_cpus, before.io.limits)


@case
async def an_update_cut_off_by_its_deadline_changes_nothing(target: Target) -> None:
    async with await connect(target) as client, running(target, client) as init:
        await client.update_container(init.container, pids=50)
        with refused(Code.DEADLINE_EXCEEDED):
            await raw_call(
                target, "container.update", {"container": init.container, "pids": 7, "deadline_ms": 1}
            )
        assert (await client.container_stats(init.container)).pids.limit == 50
        await client.update_container(init.container, pids=51)
        assert (await client.container_stats(init.container)).pids.limit == 51


@case
async def limits_on_a_device_stay_until_they_are_taken_away(target: Target) -> None:
    """Whole disks only; other updates, which the runtime makes, leave them alone."""
    async with (
        await connect(target) as client,
        running(target, client, "sh", "-c", DISK + "; sleep 100000", stdio=OUTPUT) as init,
    ):
        where = init.container
        number, name = (await expect(init.streams["stdout"], b"(?s).*\\n.*\\n")).decode().split()
        await client.update_container(where, io=[IoLimit(number, read_bps=MIB, write_iops=70)])
        await client.update_container(where, pids=50)
        await client.update_container(where, io=[IoLimit(f"/dev/{name}", write_bps=2 * MIB)], cpus=0.5)
        found = await client.container_stats(where)
        assert found.io.limits == (IoLimit(number, MIB, 2 * MIB, None, 70),)
        assert (found.pids.limit, found.cpu.limit) == (50, 0.5)
        await client.update_container(where, io=[IoLimit(number, 0, 0, 0, 0)])
        assert (await client.container_stats(where)).io.limits == ()


@case
async def what_the_kernel_cannot_limit_is_one_error_that_names_it(target: Target) -> None:
    """Weights of I/O and limits on swap are the kernel's choice: it has them, or says so."""
    async with await connect(target) as client, running(target, client) as init:
        where = init.container
        before = await client.container_stats(where)
        weighs = await _try(client, where, "io_weight", 200)
        after = (await client.container_stats(where)).io.weight
        assert weighs is (before.io.weight is not None)
        assert not weighs or after not in (None, before.io.weight)
        await client.update_container(where, memory_bytes=64 * MIB)
        if await _try(client, where, "memory_swap_bytes", 96 * MIB):
            assert (await client.container_stats(where)).memory.swap_limit == 32 * MIB
        else:
            assert before.memory.swap_limit is None


async def _try(client: Client, container: str, field: str, value: int) -> bool:
    """Whether this kernel can; if not, it says so in the one way there is."""
    try:
        await client.update_container(container, **{field: value})  # type: ignore[arg-type]
    except RpcError as error:
        if (error.code, error.details["field"]) != (Code.UNIMPLEMENTED, field):
            raise
        return False
    return True


@case
async def the_memory_of_a_container_is_told_by_kind(target: Target) -> None:
    """10 MiB of its own, 6 MiB of page cache in a file of its tmpfs, faults it had to take for them."""
    # Of huge pages one fault may take the lot.
    code = (
        "import mmap, sys; held = mmap.mmap(-1, 10 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "held.madvise(mmap.MADV_NOHUGEPAGE)\n"
        "held.write(b'x' * (10 << 20))\n"
        "open('/dev/shm/f', 'wb').write(b'y' * (6 << 20))\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    async with (
        await connect(target) as client,
        running(target, client, "python3", "-c", code, stdio=PIPES) as init,
    ):
        await expect(init.streams["stdout"], b"ready\n")
        memory = (await client.container_stats(init.container)).memory
        kinds = (memory.anon, memory.shmem, memory.file, memory.working_set, memory.current)
        anon, shmem, file, working_set, current = (kind or 0 for kind in kinds)
        assert anon >= 10 * MIB
        assert file >= shmem >= 6 * MIB
        assert anon + shmem <= working_set <= current
        assert (memory.page_faults or 0) >= 10 * MIB // 4096
        assert memory.major_faults is not None
        assert memory.oom_kills == 0
        assert pytest.approx(current - working_set, abs=4 * MIB) == memory.inactive_file
