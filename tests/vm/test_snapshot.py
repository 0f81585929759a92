"""The VM is saved and goes on, and two more are made of the snapshot at once; and it stands still a while.

One container counts, into a spool and into a file on a disk that can be written to.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host import clock, storage
from gcsagent.host.client import Client
from gcsagent.host.spool import SpoolStream
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.errors import VmError
from gcsagent.host.vm.launcher import VirtualMachine
from gcsagent.host.vm.snapshotdir import Saved
from protocol.families.storage import Format
from protocol.families.stream import StreamName
from protocol.types import Status, Stdio, StreamMode, StreamSpec
from tests.cases import disks
from tests.cases.machines import Booted
from tests.cases.target import Target, connect, event, run, running
from tests.vm.test_storage import block, plugged, within

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
COUNTING = "i=0; cd /data; while :; do i=$((i + 1)); echo $i >new; mv new count; echo $i; sleep 0.1; done"
SPOOL = Stdio(stdout=StreamSpec(StreamMode.SPOOL, 256 << 10))


@dataclass
class Reader:
    """Reads numbers, each of which must be one more than the last."""

    stream: SpoolStream
    last: int
    rest: bytes = b""

    async def read_to(self, number: int) -> None:
        while self.last < number:
            data = await self.stream.read()
            assert data, "the spool has ended"
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                assert int(line) == self.last + 1
                self.last += 1


def near(found: clock.ClockOffset) -> bool:
    return abs(found.offset_ns) <= 2 * found.error_ns + 50_000_000


async def drawn(client: Client, container: str) -> bytes:
    """Random bytes, as a program in the container gets them."""
    done = await run(client, container, "head", "-c", "32", "/dev/urandom")
    assert len(done.stdout) == 32
    return done.stdout


async def _go_on_elsewhere(directory: Path, name: str, container: str, last: int, where: int) -> bytes:
    """A VM made from the snapshot; what it drew."""
    begun = time.monotonic()
    async with (
        await VirtualMachine.launch(VmConfig(name=name, snapshot=directory)) as vm,
        await Client.connect(vm.address, timeout=30) as client,
    ):
        print(f"{name} answered after {time.monotonic() - begun:.1f} s, at {vm.address}")
        assert near(await clock.measure(client))
        state = await client.container_state(container)
        assert state.status is Status.RUNNING
        spool = await client.attach_spool(
            container, "init", StreamName.STDOUT, offset=where, acknowledge=False
        )
        async with spool:
            reader = Reader(spool, last)
            await reader.read_to(last + 20)
        random = await drawn(client, container)
        counted = await run(client, container, "cat", "/data/count")
        assert int(counted.stdout) > last
        [mount] = await storage.list_mounts(client)
        assert mount.frozen_ms == 0
        assert [(disk.serial, disk.removable) for disk in await vm.disks()] == [
            ("data", True),
            ("rootfs", False),
        ]
        assert vm.booted_disks[0].path.suffix == ".erofs"
        return random


def test_saved_it_goes_on_here_and_twice_elsewhere(vm: Booted, tmp_path: Path) -> None:
    disk, directory = disks.empty(tmp_path / "disk"), tmp_path / "saved"

    async def story(machine: VirtualMachine, target: Target, client: Client) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(plugged(machine, data=disk))
            # Not tmp_path: a UNIX socket's path must be short.
            root = stack.enter_context(tempfile.TemporaryDirectory(prefix="gcs"))
            data = await storage.mount(client, block("data", "data", format=Format.ON_FIRST_USE))
            stack.push_async_callback(storage.unmount, client, "data")
            bind = {"destination": "/data", "source": data.target, "type": "bind", "options": ["bind"]}
            counter = await stack.enter_async_context(
                running(
                    *(target, client, "sh", "-c", COUNTING),
                    stdio=SPOOL,
                    spec=lambda spec: spec["mounts"].append(bind),
                )
            )
            out = counter.streams["stdout"]
            assert isinstance(out, SpoolStream)
            reader = Reader(out, 0)
            await reader.read_to(5)
            events = await stack.enter_async_context(await client.events())
            last, where = reader.last, out.position - len(reader.rest)

            begun = time.monotonic()
            saved = await machine.save(directory, progress=print)
            print(f"saved in {time.monotonic() - begun:.1f} s, stopped for {saved.stopped_seconds:.1f} s")
            assert Saved.load(directory).disks == saved.disks
            assert near(await clock.measure(client))
            told = await event(events, "guest.held", "")
            assert told.data["snapshot"] == "saved"
            assert (await event(events, "guest.resumed", "")).data["expired"] is False
            await reader.read_to(reader.last + 20)

            async with asyncio.TaskGroup() as group:
                drawing = (
                    group.create_task(drawn(client, counter.container)),
                    group.create_task(_go_on_elsewhere(directory, "one", counter.container, last, where)),
                    group.create_task(_go_on_by_name(Gcsctl(root), directory, counter.container)),
                )
            assert len({each.result() for each in drawing}) == 3
            await reader.read_to(reader.last + 5)

    within(vm, story)


@dataclass(frozen=True)
class Gcsctl:
    """Its VMs and snapshots are in a directory of their own."""

    root: str

    async def __call__(self, *words: str) -> Any:
        """What it prints with ``--json``, if anything."""
        own = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        own |= {"XDG_STATE_HOME": self.root, "XDG_DATA_HOME": self.root}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gcsagent.host", "--json", *words),
            env=os.environ | own,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode == 0, words
        return json.loads(out) if out else None


async def _go_on_by_name(gcsctl: Gcsctl, directory: Path, container: str) -> bytes:
    """A named VM made from the snapshot is saved itself, and another one made from that."""
    drew = []
    async with AsyncExitStack() as stack:
        a = await gcsctl("vm", "start", "a", "--from", str(directory))
        stack.push_async_callback(gcsctl, "vm", "stop", "a", "--timeout", "0.1")
        made = await gcsctl("vm", "snapshot", "create", "a", "again")
        assert await gcsctl("vm", "snapshot", "ls") == [made]
        assert (made["vm"], [disk["copied"] for disk in made["disks"]]) == ("a", [False, True])
        b = await gcsctl("vm", "start", "b", "--from", "again")
        stack.push_async_callback(gcsctl, "vm", "stop", "b", "--timeout", "0.1")
        assert (b["memory_mib"], b["state"]) == (1024, "running")
        assert await gcsctl("vm", "snapshot", "rm", "again") == {"snapshot": "again"}
        assert await gcsctl("vm", "snapshot", "ls") == []
        for vm in (a, b):
            async with await Client.connect(vm["address"]) as client:
                drew.append(await drawn(client, container))
    assert drew[0] != drew[1]
    return drew[0]


@contextmanager
def small(directory: Path) -> Iterator[Path]:
    """A file system that is soon full."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "small", directory], check=True, timeout=20)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True, timeout=20)


def test_what_cannot_be_saved_goes_on(vm: Booted, tmp_path: Path) -> None:
    async def story(machine: VirtualMachine, target: Target, client: Client) -> None:
        with small(tmp_path / "full") as full:
            with pytest.raises(VmError) as caught:
                await machine.save(full / "saved")
            assert "No space left" in str(caught.value)
            assert list(full.iterdir()) == []
        (tmp_path / "file").touch()
        with pytest.raises(VmError):
            await machine.save(tmp_path / "file" / "saved")
        assert near(await clock.measure(client))
        async with running(target, client) as box:
            assert (await run(client, box.container, "true")).exit.exit_code == 0

    within(vm, story)


def test_it_stands_still_and_goes_on_at_the_right_time(vm: Booted) -> None:
    async def story(machine: VirtualMachine, target: Target, client: Client) -> None:
        generation = (await client.ping()).generation
        async with await connect(target) as other, await other.events() as events:
            async with machine.standing_still("pause"):
                await asyncio.sleep(1.5)
            assert near(await clock.measure(client))
            assert (await client.ping()).generation == generation
            assert (await event(events, "guest.resumed", "")).data == {"snapshot": "pause", "expired": False}

    within(vm, story)
