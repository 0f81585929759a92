"""What is made of the kernel's log, whatever processes and cgroups call themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gcsagent.agent.kmsg import KernelLog, Kill, KillLog
from tests.cases.descriptors import descriptors, settled_descriptors

TOTALS = "total-vm:82104kB, anon-rss:39552kB, file-rss:6636kB, shmem-rss:0kB, UID:0 pgtables:136kB"


def record(text: str, priority: int = 6) -> bytes:
    """As /dev/kmsg gives it: what is unprintable, and backslashes, as \\xNN."""
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in text.encode()
    )
    return f"{priority},582,12178784451,-;{escaped}\n SUBSYSTEM=x\n".encode()


def announced(
    pid: int, command: str = "python3", cgroup: str = "/gcs/web", limit: str = "/gcs/web", cpuset: str = "web"
) -> bytes:
    constraint = "MEMCG" if limit else "NONE"
    where = f"oom_memcg={limit}" if limit else "global_oom"
    return record(
        f"oom-kill:constraint=CONSTRAINT_{constraint},nodemask=(null),cpuset={cpuset},mems_allowed=0,{where},"
        f"task_memcg={cgroup},task={command},pid={pid},uid=0"
    )


def killed(pid: int, command: str = "python3", machine: bool = False, priority: int = 3) -> bytes:
    prefix = "Out of memory" if machine else "Memory cgroup out of memory"
    return record(f"{prefix}: Killed process {pid} ({command}) {TOTALS} oom_score_adj:0", priority)


def kills(*records: bytes) -> list[Kill]:
    log = KillLog()
    for each in records:
        log.take_record(each)
    return list(log.kills.values())


def test_both_lines_are_one_kill() -> None:
    web = Kill(7, "python3", False, "/gcs/web", "/gcs/web")
    assert kills(announced(7), killed(7)) == [web]
    assert kills(announced(7)) == [web]


def test_without_the_first_line_pid_and_scope_are_known() -> None:
    assert kills(killed(7)) == [Kill(7, "python3", False)]
    assert kills(killed(7, machine=True)) == [Kill(7, "python3", True)]


def test_the_whole_machine_and_a_limit_above() -> None:
    assert kills(announced(7, limit="", cgroup="/gcs/a"), killed(7, machine=True)) == [
        Kill(7, "python3", True, "", "/gcs/a")
    ]
    assert kills(announced(7, limit="/gcs"), killed(7)) == [Kill(7, "python3", False, "/gcs", "/gcs/web")]


def test_a_group_goes_together() -> None:
    group = record("Tasks in /gcs/web are going to be killed due to memory.oom.group set", 3)
    found = kills(announced(7), killed(7), group, killed(7), killed(8, "sh"), killed(9, "cat"))
    assert [(each.pid, each.command, each.cgroup) for each in found] == [
        (7, "python3", "/gcs/web"),
        (8, "sh", "/gcs/web"),
        (9, "cat", "/gcs/web"),
    ]
    later = kills(announced(7), group, killed(8), announced(20, cgroup="/gcs/b"), killed(21))
    assert later[-1] == Kill(21, "python3", False)


@pytest.mark.parametrize(
    "command",
    [
        ",pid=1,uid=0",
        "x) total-vm:",
        "a b",
        "(sh)",
        "\n3,1,1,-;x",
        "\\x41",
        "",
        "ä\x1b[2J",
        "task=x,pid=9",
    ],
)
def test_a_command_may_be_anything(command: str) -> None:
    assert kills(announced(7, command), killed(7, command)) == [
        Kill(7, command, False, "/gcs/web", "/gcs/web")
    ]


def test_a_command_that_is_not_utf8() -> None:
    text = killed(7, "A").replace(b"(A)", rb"(\xff)")
    assert kills(text) == [Kill(7, "\ufffd", False)]


@pytest.mark.parametrize("name", ["x,task=init,pid=1,uid=0", "y,task_memcg=/gcs/other,task=z", "a\nb"])
def test_a_cgroup_in_a_container_does_not_change_who_was_killed(name: str) -> None:
    [kill] = kills(announced(7, cgroup=f"/gcs/web/{name}"), killed(7))
    assert (kill.pid, kill.command, kill.machine) == (7, "python3", False)


def test_what_user_space_writes_is_not_believed() -> None:
    assert kills(record(f"Out of memory: Killed process 1 (init) {TOTALS}", 3 | 1 << 3)) == []
    assert kills(b"12,5,5,-;" + announced(7).partition(b";")[2]) == []


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b";",
        b"x,1,2,-;oom-kill:",
        b"6,1,2",
        b"6,1,2,-;oom-kill:constraint=,pid=,uid=",
        record("Out of memory: Killed process 99999999999999999999999999999 (x"),
        record("oom-kill:constraint=CONSTRAINT_NONE," + "," * 8000),
        record("out of memory" * 600),
        bytes(range(256)),
    ],
)
def test_rubbish_is_passed_over(junk: bytes) -> None:
    assert kills(junk, announced(7)) == kills(announced(7))


def test_it_keeps_so_many_and_no_more() -> None:
    found = kills(*(killed(pid) for pid in range(1, 200)))
    assert [each.pid for each in found] == list(range(136, 200))


def test_a_log_that_cannot_be_read_has_no_kills(tmp_path: Path) -> None:
    log = KernelLog(str(tmp_path / "missing"))
    log.read()
    assert (log.fd, log.kills) == (-1, {})


def test_a_log_that_fails_is_let_go(tmp_path: Path) -> None:
    before = settled_descriptors()
    log = KernelLog(str(tmp_path))  # reading a directory is EISDIR
    log.read()
    assert log.fd == -1
    assert descriptors() == before


def test_the_log_of_this_machine_is_read_to_its_end_and_goes_on() -> None:
    log = KernelLog()
    log.read()
    assert log.fd >= 0, "needs root"
    with pytest.raises(BlockingIOError):
        os.read(log.fd, 8192)
    os.close(log.fd)
