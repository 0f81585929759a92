"""What is told of kills, with and without the kernel's log, from a made-up cgroup."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from gcsagent.agent.cgroups import Cgroup, CgroupMounts
from gcsagent.agent.container import Container
from gcsagent.agent.events import EventLog
from gcsagent.agent.kernfs import KernelFiles
from gcsagent.agent.kmsg import KernelLog
from gcsagent.agent.oom import OomWatch
from gcsagent.agent.process import Process
from gcsagent.agent.process_dir import ContainerDir
from gcsagent.agent.runtime import Runtime
from protocol.schema import from_wire
from protocol.types import Oom, OomScope, OomVictim, Stdio
from tests.unit.test_agent_kmsg import announced, killed

INIT, EXEC = 101, 102


class Bench:
    """A v2 container ``web`` with init and one exec; nothing it reads is the kernel's. In a running loop."""

    def __init__(self, tmp_path: Path) -> None:
        self.cgroup = tmp_path / "cgroup/gcs/web"
        self.cgroup.mkdir(parents=True)
        (tmp_path / "mounts").write_text(f"none {tmp_path}/cgroup cgroup2 rw 0 0\n")
        mounts = CgroupMounts(str(tmp_path / "mounts"))
        directory = ContainerDir(str(tmp_path), "web")
        directory.create()
        cgroup = Cgroup(mounts, "/gcs/web")
        self.container = Container(
            "web", directory, cgroup, cast(Runtime, None), auto_delete=False, labels={}
        )
        self.container.owns_pids = False
        for ident, pid in (("init", INIT), ("p", EXEC)):
            process = Process("web", ident, ("sh",), Stdio(), False)
            process.pid = pid
            self.container.processes[ident] = process
        self.events = EventLog()
        self.log = KernelLog(str(tmp_path / "no log"))
        self.watch = OomWatch(self.events, self.log, KernelFiles())
        self.count(0, 0)

    def count(self, kills: int, limits: int) -> None:
        (self.cgroup / "memory.events").write_text(f"low 0\noom {limits}\noom_kill {kills}\n")

    def ends(self, ident: str, killed: bool = True) -> tuple[bool, Oom | None]:
        return self.watch.blame(self.container, self.container.processes[ident], killed)

    def told(self) -> list[Oom]:
        return [from_wire(Oom, event.data) for event in self.events.all() if event.type == "container.oom"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    async def make() -> Bench:
        return Bench(tmp_path)

    return asyncio.run(make())


def test_without_a_log_a_sigkill_nobody_sent_is_put_down_to_the_count(bench: Bench) -> None:
    bench.count(1, 1)
    victim, oom = bench.ends("p")
    assert victim
    assert oom == Oom(OomScope.CONTAINER, "/gcs/web", "/gcs/web", 1, 1, (OomVictim(EXEC, "p"),))
    assert bench.told() == [oom]
    assert bench.ends("init") == (False, oom)


def test_without_a_log_what_was_killed_from_here_is_no_victim(bench: Bench) -> None:
    bench.count(1, 1)
    bench.container.processes["p"].killed = True
    assert bench.ends("p") == (False, None)
    [oom] = bench.told()
    assert (oom.new, oom.victims) == (1, ())
    assert bench.ends("init") == (True, oom)


def test_one_kill_is_not_blamed_for_two_ends(bench: Bench) -> None:
    bench.count(1, 1)
    bench.watch.look(bench.container)
    [oom] = bench.told()
    assert bench.ends("p") == (True, oom)
    assert bench.ends("init") == (False, oom)
    assert bench.told() == [oom]


def test_an_end_of_its_own_is_no_victims_whatever_was_counted(bench: Bench) -> None:
    bench.count(3, 1)
    assert bench.ends("p", killed=False) == (False, None)
    victim, oom = bench.ends("init", killed=False)
    assert not victim
    assert bench.told() == [oom]


@pytest.mark.parametrize(
    "limit, scope", [("max\n", OomScope.MACHINE), ("1000000\n", OomScope.UNKNOWN)], ids=["none", "one above"]
)
def test_without_a_log_the_counters_tell_whose_memory_it_was(
    bench: Bench, limit: str, scope: OomScope
) -> None:
    (bench.cgroup.parent / "memory.max").write_text(limit)
    bench.count(1, 1)
    bench.watch.look(bench.container)
    bench.count(2, 1)
    bench.watch.look(bench.container)
    assert [(each.scope, each.kills, each.new) for each in bench.told()] == [
        (OomScope.CONTAINER, 1, 1),
        (scope, 2, 1),
    ]


def test_the_log_names_them_and_the_last_ones_count(bench: Bench) -> None:
    """What it says of earlier kills, and of another container, is left alone."""
    for record in (announced(7), killed(7), announced(9, cgroup="/gcs/other"), announced(EXEC, "a) ,b")):
        bench.log.take_record(record)
    bench.log.take_record(announced(8, "sh", cgroup="/gcs/web/inner", limit="/gcs/web/inner"))
    bench.count(2, 2)
    bench.watch.look(bench.container)
    [oom] = bench.told()
    assert oom.victims == (OomVictim(EXEC, "p", "a) ,b"), OomVictim(8, "", "sh"))
    assert (oom.scope, oom.limit_cgroup) == (OomScope.CONTAINER, "/gcs/web/inner")
    assert list(bench.log.kills) == [9]
    assert bench.ends("p") == (True, oom)


@pytest.mark.parametrize("written", ["behind", "before", "rubbish"])
def test_a_successor_says_nothing_twice(bench: Bench, written: str) -> None:
    """The event comes before the file: a kill in between leaves a file that knows less."""
    file = Path(bench.container.directory.path, "oom.json")
    bench.count(1, 1)
    bench.watch.look(bench.container)
    old = file.read_text()
    bench.count(4, 2)
    bench.watch.look(bench.container)
    file.write_text({"behind": old, "before": file.read_text(), "rubbish": "{"}[written])
    told = bench.told()
    bench.container.oom.__init__()  # type: ignore[misc]
    bench.watch.restore(bench.container, list(bench.events.all()))
    bench.watch.look(bench.container)
    assert bench.told() == told
    assert bench.container.oom.told == 4
    bench.count(5, 3)
    bench.watch.look(bench.container)
    assert [each.new for each in bench.told()] == [1, 3, 1]


def test_an_earlier_container_of_that_id_has_no_part_in_it(bench: Bench) -> None:
    bench.count(3, 3)
    bench.watch.look(bench.container)
    bench.events.publish("container.deleted", "web")
    Path(bench.container.directory.path, "oom.json").unlink()
    bench.container.oom.__init__()  # type: ignore[misc]
    bench.watch.restore(bench.container, list(bench.events.all()))
    assert bench.container.oom.told == 0
