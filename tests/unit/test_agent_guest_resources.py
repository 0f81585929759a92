"""CPUs, memory blocks and pressure: what is read from the kernel's files, and what is asked of it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent import uevents
from gcsagent.agent.call import Call
from gcsagent.agent.calls import CannotStart, Outcome
from gcsagent.agent.events import EventLog
from gcsagent.agent.guest import pressure as pressures
from gcsagent.agent.guest import sysfs
from gcsagent.agent.guest.pressure import PressureWatches
from gcsagent.agent.guest.resources import ResourceService
from gcsagent.agent.later import Later
from gcsagent.agent.logs import context
from protocol.errors import Code, RpcError
from protocol.families.guest import (
    CpuLists,
    MemoryBlocks,
    Online,
    PressureKind,
    PressureResource,
    WatchPressure,
)
from tests.fakes import watched_loop
from tests.fakes.fake_supervisor import FakeSupervisor

MEMINFO = (
    "MemTotal:        1000 kB\nMemFree:          10 kB\nMemAvailable:     900 kB\nHugePages_Total:   0\n"
)


def call() -> Call:
    return Call("guest.online", 10_000, context(logging.getLogger("test")))


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up /sys/devices/system: CPUs 0-1 run, 2-3 are there; block 32 of 0, 1, 32 is offline."""
    root = tmp_path / "system"
    (root / "cpu").mkdir(parents=True)
    for name, text in (("possible", "0-7"), ("present", "0-3"), ("online", "0-1")):
        (root / "cpu" / name).write_text(f"{text}\n")
    (root / "memory").mkdir()
    (root / "memory" / "block_size_bytes").write_text("8000000\n")
    for number, state in ((0, "online"), (1, "online"), (32, "offline")):
        (root / "memory" / f"memory{number}").mkdir()
        (root / "memory" / f"memory{number}" / "state").write_text(f"{state}\n")
    monkeypatch.setattr(sysfs, "SYSTEM", str(root))
    monkeypatch.setattr(sysfs.cpus, "__defaults__", (str(root),))
    monkeypatch.setattr(sysfs.memory_states, "__defaults__", (str(root),))
    return root


def test_what_there_is(system: Path, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO)
    assert sysfs.cpus(str(system)) == CpuLists("0-7", "0-3", "0-1")
    assert sysfs.memory(str(system), str(meminfo)) == MemoryBlocks(1000, 900, 128 << 20, "0-1", "32")
    nothing = sysfs.memory(str(tmp_path), str(meminfo))
    assert (nothing.block_bytes, nothing.online, nothing.offline) == (0, "", "")


@pytest.mark.parametrize("text", ["", "0", "0-2,7", "1,3,5-6"])
def test_lists_there_and_back(text: str) -> None:
    assert sysfs.ranges(sysfs.numbers(text)) == text


class Machine:
    """What the service needs of a registry; ``outcome`` is how the shell ends."""

    def __init__(self, outcome: Outcome | CannotStart, guest: bool = True) -> None:
        self.guest, self.caller, self.pressure = guest, self, Later(lambda: self)
        self.outcome = outcome
        self.asked: list[list[str]] = []

    async def run(self, argv: list[str], _timeout: float) -> Outcome:
        self.asked.append(argv)
        if isinstance(self.outcome, CannotStart):
            raise self.outcome
        return self.outcome

    def wanted(self) -> tuple[WatchPressure, ...]:
        return ()


DONE = Outcome(0, False, "")


def with_machine(
    body: Callable[[Machine, ResourceService], Awaitable[None]],
    outcome: Outcome | CannotStart = DONE,
    guest: bool = True,
) -> None:
    async def scenario() -> None:
        machine = Machine(outcome, guest)
        await body(machine, ResourceService(machine))  # type: ignore[arg-type]

    watched_loop.run(scenario())


def test_what_is_offline_is_put_online_and_nothing_else(system: Path) -> None:
    async def body(machine: Machine, service: ResourceService) -> None:
        await service.online(Online(), call())
        await service.online(Online(cpus="1,3"), call())
        await service.online(Online(memory="0,32"), call())
        await service.online(Online(cpus="0-1", memory="0-1"), call())
        files = [[path.removeprefix(f"{system}/") for path in argv[5:]] for argv in machine.asked]
        assert files == [
            ["cpu/cpu2/online", "cpu/cpu3/online", "memory/memory32/state"],
            ["cpu/cpu3/online"],
            ["memory/memory32/state"],
        ]

    with_machine(body)


def test_the_shell_writes_each_file_its_word(tmp_path: Path, system: Path) -> None:
    """The script itself, by a real shell: on CPUs 1, on memory online, and it ends at the first refusal."""

    async def body(machine: Machine, service: ResourceService) -> None:
        await service.online(Online(), call())
        [argv] = machine.asked
        for number in (2, 3):
            (system / "cpu" / f"cpu{number}").mkdir()
        shell = await asyncio.create_subprocess_exec(*argv[1:], stderr=asyncio.subprocess.PIPE)
        assert await shell.wait() == 0
        assert (system / "cpu/cpu2/online").read_text() == "1\n"
        assert (system / "memory/memory32/state").read_text() == "online\n"
        failing = await asyncio.create_subprocess_exec(
            *argv[1:5], "/nowhere/online", str(tmp_path / "x"), stderr=asyncio.subprocess.PIPE
        )
        _, words = await failing.communicate()
        assert failing.returncode == 1
        assert b"/nowhere/online" in words
        assert not (tmp_path / "x").exists()

    async def scenario() -> None:
        machine = Machine(Outcome(0, False, ""))
        await body(machine, ResourceService(machine))  # type: ignore[arg-type]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "outcome, code",
    [
        (Outcome(1, False, "sh: write error: Device or resource busy"), Code.INTERNAL),
        (Outcome(-9, True, ""), Code.DEADLINE_EXCEEDED),
    ],
)
def test_a_kernel_that_will_not(system: Path, outcome: Outcome, code: Code) -> None:
    async def body(_machine: Machine, service: ResourceService) -> None:
        with pytest.raises(RpcError) as caught:
            await service.online(Online(), call())
        assert caught.value.code is code
        assert outcome.stderr in caught.value.message

    with_machine(body, outcome)


def test_a_guest_without_the_shell_says_so(system: Path) -> None:
    async def body(_machine: Machine, service: ResourceService) -> None:
        with pytest.raises(RpcError, match="cannot put CPUs or memory online: /bin/busybox cannot") as caught:
            await service.online(Online(), call())
        assert (caught.value.code, caught.value.details["errno"]) == (Code.UNAVAILABLE, errno.ENOENT)

    missing = CannotStart("/bin/busybox", os.strerror(errno.ENOENT), errno.ENOENT)
    with_machine(body, missing)


def test_outside_a_guest_nothing_is_put_online(system: Path) -> None:
    async def body(machine: Machine, service: ResourceService) -> None:
        with pytest.raises(RpcError) as caught:
            await service.online(Online(), call())
        assert (caught.value.code, machine.asked) == (Code.FAILED_PRECONDITION, [])

    with_machine(body, guest=False)


def test_what_is_to_come_is_waited_for(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    monkeypatch.setattr(uevents, "_socket", ours.dup)

    async def body(machine: Machine, service: ResourceService) -> None:
        for absent, field in (
            (Online(cpus="3-4", wait_ms=20), "cpus"),
            (Online(memory="33", wait_ms=0), "memory"),
        ):
            with pytest.raises(RpcError) as caught:
                await service.online(absent, call())
            assert (caught.value.code, caught.value.details["field"]) == (Code.NOT_FOUND, field)
        waiting = asyncio.ensure_future(service.online(Online(cpus="4", wait_ms=5000), call()))
        await asyncio.sleep(0)
        theirs.send(b"add@/devices/x\0ACTION=add\0SUBSYSTEM=net\0")
        (system / "cpu" / "present").write_text("0-4\n")
        theirs.send(b"add@/devices/system/cpu/cpu4\0ACTION=add\0SUBSYSTEM=cpu\0SEQNUM=7\0")
        await asyncio.wait_for(waiting, 5)
        assert machine.asked[-1][5:] == [f"{system}/cpu/cpu4/online"]

    with ours, theirs:
        with_machine(body)


# -- pressure ---------------------------------------------------------------------------------------


class Kernel:
    """Pipes instead of pressure files: readable stands for EPOLLPRI."""

    def __init__(self) -> None:
        self.supervisor, self.events = FakeSupervisor(), EventLog()
        self.watches = PressureWatches(self.supervisor.client, self.events)

    async def settle(self) -> None:
        await self.supervisor.client.call("list", {})


def with_kernel(tmp_path: Path, body: Callable[[Kernel, Path], Awaitable[None]]) -> None:
    async def scenario() -> None:
        kernel = Kernel()
        kernel.supervisor.answers["list"] = []
        file = tmp_path / "memory"
        file.write_text("")
        try:
            await body(kernel, file)
        finally:
            for each in kernel.watches.wanted():
                kernel.watches.end(each.watch)
            await kernel.settle()
            kernel.supervisor.close()

    watched_loop.run(scenario())


def refusal(begin: Callable[[], Any]) -> Code:
    with pytest.raises(RpcError) as caught:
        begin()
    return caught.value.code


class Trigger:
    """An ordinary file cannot be in an epoll: the real one is tested in tests/runc and tests/vm."""

    def __init__(self, fd: int, pressed: Callable[[], None], gone: Callable[[], None]) -> None:
        self.fd, self.pressed, self.gone = fd, pressed, gone

    def read(self) -> str:
        return os.pread(self.fd, 4096, 0).decode()

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def any_file_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressures, "Trigger", Trigger)


def trigger(watches: PressureWatches, ident: str = "w") -> Any:
    return watches._watches[ident][1]


def test_watches_are_the_kernels_and_the_supervisors(tmp_path: Path, any_file_watched: None) -> None:
    async def body(kernel: Kernel, file: Path) -> None:
        wanted = WatchPressure("w", PressureResource.MEMORY, PressureKind.FULL, 5000, 500_000, "web")
        kernel.watches.begin(wanted, str(file))
        assert file.read_bytes() == b"full 5000 500000\0"
        kernel.watches.begin(wanted, str(file))
        assert kernel.watches.wanted() == (wanted,)
        await kernel.settle()
        assert list(kernel.supervisor.held) == ["pressure/w/memory/full/5000/500000/web"]
        other = WatchPressure("w")
        assert refusal(lambda: kernel.watches.begin(other, str(file))) is Code.ALREADY_EXISTS
        file.write_text("some avg10=1.50 avg60=0.00 avg300=0.00 total=77\nfull avg10=0.25 total=5\n")
        trigger(kernel.watches).pressed()
        told = kernel.events.get(1)
        assert (told.type, told.container) == ("memory.pressure", "web")
        assert told.data["some_avg10"] == 1.5
        assert (told.data["full_total_us"], told.data["watch"], told.data["kind"]) == (5, "w", "full")
        kernel.watches.end("w")
        await kernel.settle()
        assert (kernel.supervisor.held, kernel.watches.wanted()) == ({}, ())
        assert refusal(lambda: kernel.watches.end("w")) is Code.NOT_FOUND

    with_kernel(tmp_path, body)


def test_a_successor_goes_on_with_them(tmp_path: Path, any_file_watched: None) -> None:
    async def body(kernel: Kernel, file: Path) -> None:
        wanted = WatchPressure("w", PressureResource.IO, container="web")
        kernel.watches.begin(wanted, str(file))
        await kernel.settle()
        kernel.supervisor.held["pressure/of a later agent"] = os.open(file, os.O_RDONLY)
        successor = PressureWatches(kernel.supervisor.client, kernel.events)
        await successor.take_up([*kernel.supervisor.held, "listen/unix:x"])
        assert successor.wanted() == (wanted,)
        file.write_text("some avg10=1.50 total=77\n")
        trigger(successor).pressed()
        assert kernel.events.get(1).type == "io.pressure"
        await kernel.settle()
        assert list(kernel.supervisor.held) == ["pressure/w/io/some/150000/1000000/web"]
        successor.end("w")

    with_kernel(tmp_path, body)


def test_one_whose_cgroup_is_gone_ends(tmp_path: Path, any_file_watched: None) -> None:
    async def body(kernel: Kernel, file: Path) -> None:
        kernel.watches.begin(WatchPressure("w", container="web"), str(file))
        trigger(kernel.watches).gone()
        await kernel.settle()
        assert (kernel.watches.wanted(), kernel.supervisor.held, kernel.events.last) == ((), {}, 0)

    with_kernel(tmp_path, body)


def test_watches_are_bounded_and_refused_with_a_reason(
    tmp_path: Path, any_file_watched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(kernel: Kernel, file: Path) -> None:
        assert refusal(lambda: kernel.watches.begin(WatchPressure("a"), f"{file}x")) is Code.UNIMPLEMENTED
        monkeypatch.setattr(pressures, "MOST", 1)
        kernel.watches.begin(WatchPressure("a"), str(file))
        assert refusal(lambda: kernel.watches.begin(WatchPressure("b"), str(file))) is Code.RESOURCE_EXHAUSTED
        kernel.watches.end("a")

        def refuse(_fd: int, _data: bytes) -> int:
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr(os, "write", refuse)
        assert refusal(lambda: kernel.watches.begin(WatchPressure("b"), str(file))) is Code.INVALID_ARGUMENT
        monkeypatch.undo()

    with_kernel(tmp_path, body)
