"""The console parser: boot stages, kernel trouble, and bytes from a guest that means harm."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcsagent.host.vm import consolelog
from gcsagent.host.vm.console import STAGES, BootFailure, ConsoleMonitor, LineSplitter, sanitize, scan
from gcsagent.host.vm.consolelog import ConsoleLog, follow, previous, read_log

BOOT = "".join(f"gcs-boot: {stage} {number}.25\r\n" for number, stage in enumerate(STAGES)).encode()


def monitor(data: bytes) -> ConsoleMonitor:
    console = ConsoleMonitor()
    console.feed(data)
    console.end()
    return console


def test_stages_with_their_uptimes() -> None:
    console = monitor(BOOT)
    assert console.ready
    assert console.last_stage == "ready"
    assert console.stages["init"] == 1.25
    assert console.stages["ready"] == 9.25
    assert console.failure is None


def test_a_stage_after_a_kernel_message_on_the_same_line() -> None:
    assert monitor(b"[    1.2] random: crng init donegcs-boot: modules 1.30\n").last_stage == "modules"


def test_stages_nobody_knows_do_not_count() -> None:
    console = monitor(b"gcs-boot: warp 1.0\ngcs-boot: ready\ngcs-boot: ready soon\n")
    assert console.last_stage == "none"
    assert not console.ready


def test_the_first_failure_counts() -> None:
    console = monitor(b"gcs-boot: init 1.0\ngcs-boot: FAILED disks: no x\ngcs-boot: FAILED disks: later\n")
    assert console.failure == BootFailure("disks", "no x")
    assert console.last_stage == "init"


@given(st.lists(st.integers(1, len(BOOT) - 1), max_size=20))
def test_any_split_gives_the_same_stages(cuts: list[int]) -> None:
    console = ConsoleMonitor()
    edges = [0, *sorted(cuts), len(BOOT)]
    for start, end in itertools.pairwise(edges):
        console.feed(BOOT[start:end])
    assert console.stages == monitor(BOOT).stages
    assert console.bytes_seen == len(BOOT)


@pytest.mark.parametrize(
    "kind,line",
    [
        ("panic", "[    2.084189] Kernel panic - not syncing: sysrq triggered crash"),
        ("bug", "BUG: kernel NULL pointer dereference, address: 0000000000000000"),
        ("bug", "kernel BUG at mm/slub.c:4000!"),
        ("oops", "Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI"),
        ("oops", "Oops: general protection fault, probably for non-canonical address 0x6b: 0000 [#1] SMP"),
        ("oops", "invalid opcode: 0000 [#1] PREEMPT SMP"),
        ("lockup", "watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [kworker/1:2:70]"),
        ("stall", "rcu: INFO: rcu_preempt self-detected stall on CPU"),
        ("stall", "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
        ("hung-task", "INFO: task runc:123 blocked for more than 120 seconds."),
        ("warning", "WARNING: CPU: 0 PID: 1 at kernel/fork.c:1 foo+0x1/0x2"),
        ("trace", "Call Trace:"),
        ("disk", "I/O error, dev vda, sector 0 op 0x0:(READ)"),
        ("disk", "erofs: (device vda): z_erofs_read_folio: read error -5 @ 355 of nid 1108929"),
        ("initramfs", "Initramfs unpacking failed: ZSTD-compressed data is truncated"),
        ("memory", "System is deadlocked on memory"),
    ],
)
def test_kernel_trouble_is_found(kind: str, line: str) -> None:
    (finding,) = scan(f"all is well\n{line}\nstill well\n")
    assert (finding.kind, finding.line) == (kind, line)


@pytest.mark.parametrize(
    "line",
    [
        "python3[12]: segfault at 0 ip 00007f sp 00007f error 4 in libc.so.6",
        "traps: a.out[13] general protection fault ip:401000 sp:7ffe error:0 in a.out",
        "Memory cgroup out of memory: Killed process 99 (sh) total-vm:1kB",
        "amd_pstate: the _CPC object is not present in SBIOS or ACPI disabled",
        '{"level": "warning", "message": "the agent ended"}',
        "BUGS are not insects",
        "erofs: (device vda): z_erofs_read_folio: read error -12 @ 355 of nid 1108929",
    ],
)
def test_what_a_container_does_is_no_kernel_trouble(line: str) -> None:
    assert scan(line) == []


def test_messages_lose_their_time_stamp() -> None:
    (finding,) = scan("[    2.084189][    T1] Kernel panic - not syncing: VFS: Unable to mount root fs")
    assert finding.message == "Kernel panic - not syncing: VFS: Unable to mount root fs"


def test_relevant_lines_start_before_the_first_trouble() -> None:
    lines = [f"line {number}" for number in range(50)]
    console = monitor("\n".join([*lines[:30], "Oops: 0000 [#1] SMP", *lines[30:]]).encode())
    around = ("line 27", "line 28", "line 29", "Oops: 0000 [#1] SMP", "line 30", "line 31")
    assert console.relevant_lines(6) == around
    assert monitor("\n".join(lines).encode()).relevant_lines(2) == ("line 48", "line 49")


def test_terminal_sequences_are_shown_not_obeyed() -> None:
    escape, bell, csi, override = chr(0x1B), chr(7), chr(0x9B), chr(0x202E)
    hostile = f"{escape}]0;owned{bell}{csi}2J{override}evil\ttab"
    assert sanitize(hostile) == r"\x1b]0;owned\x07\x9b2J\u202eevil" + "\ttab"


@given(st.binary(max_size=5000))
def test_no_byte_makes_an_unprintable_line(data: bytes) -> None:
    splitter = LineSplitter()
    for line in [*splitter.feed(data), *splitter.flush()]:
        assert line.replace("\t", "").isprintable()


def test_a_line_without_end_stays_bounded() -> None:
    console = ConsoleMonitor()
    for _ in range(200):
        console.feed(b"A" * 65536)
    assert max(map(len, console.lines())) == 2048
    assert len(console.lines()) <= 4000


def test_a_flood_of_trouble_stays_bounded_and_keeps_the_first() -> None:
    console = ConsoleMonitor()
    for number in range(10_000):
        console.feed(b"BUG: %d\n" % number)
    assert len(console.findings) == 200
    assert console.findings[0].line == "BUG: 0"
    assert console.lines()[-1] == "BUG: 9999"


def test_a_log_is_bounded_by_rotation(tmp_path: Path) -> None:
    log = ConsoleLog(tmp_path / "console.log", limit=100)
    for number in range(100):
        log.write(b"%02d\n" % number)
    log.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 200
    kept = read_log(tmp_path / "console.log").split()
    assert kept == [b"%02d" % number for number in range(100 - len(kept), 100)]
    assert len(kept) > 33


def test_following_a_log_through_its_rotations(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = ConsoleLog(path, limit=100)
    log.write(b"before ")

    async def scenario() -> bytes:
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        seen = b""
        number = 0
        async for data in follow(path, gone):
            seen += data
            if number < 50:
                log.write(b"%d " % number)
                number += 1
            elif not gone.done():
                gone.set_result(None)
        return seen

    seen = asyncio.run(scenario())
    log.close()
    assert previous(path).exists()
    assert seen.split() == [b"before", *(b"%d" % number for number in range(50))]


def test_a_log_that_cannot_be_rotated_costs_log_not_the_vm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ConsoleLog(tmp_path / "console.log", limit=100)
    log.write(b"x" * 90)

    def refuse(path: Path) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(consolelog, "_create", refuse)
        log.write(b"y" * 20)
    with (tmp_path / "another").open("wb"):
        log.write(b"z" * 20)
    assert (tmp_path / "another").read_bytes() == b"", "its descriptor was not the log's"
    shutil.rmtree(tmp_path)
    log.write(b"y" * 200)
    log.close()


def test_a_full_disk_costs_log_not_the_vm(tmp_path: Path) -> None:
    full = tmp_path / "full.log"
    full.symlink_to("/dev/full")
    log = ConsoleLog(full)
    log.write(b"lost")
    log.close()
    assert os.readlink(full) == "/dev/full"


OOM_REPORT = """\
[   33.231401] python3 invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0
[   33.231420] CPU: 0 UID: 0 PID: 377 Comm: python3 Not tainted 6.12.57+deb13-cloud-amd64 #1
[   33.231455] Hardware name: QEMU Standard PC (Q35 + ICH9, 2009)
[   33.231473] Call Trace:
[   33.231480]  <TASK>
[   33.240000] Memory cgroup out of memory: Killed process 377 (python3) total-vm:82104kB
"""


def test_what_the_kernel_shows_when_memory_runs_out_is_no_trouble() -> None:
    trace = "[   40.1] Call Trace:\n"
    assert scan(OOM_REPORT) == []
    assert [finding.kind for finding in scan(OOM_REPORT + "quiet\n" * 40 + trace)] == ["trace"]
    assert [finding.kind for finding in scan(OOM_REPORT + "BUG: bad page\n")] == ["bug"]
    monitor = ConsoleMonitor()
    monitor.feed((OOM_REPORT + "the end\n").encode())
    assert monitor.findings == []
    assert monitor.relevant_lines(1) == ("the end",)
