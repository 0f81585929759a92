"""The vsock device is unplugged and plugged again with a fresh daemon: for hosts, a mere pause."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import signal
import socket
import struct
import termios
import time
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from gcsagent.host.spool import SpoolStream
from gcsagent.host.vm.launcher import VirtualMachine
from protocol.address import HybridAddress, parse_dial
from protocol.types import Stdio, StreamMode, StreamSpec
from tests.cases import pattern
from tests.cases.machines import Booted
from tests.cases.target import MIB, Target, connect, run, running

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
REPLUGS = 2
SIZE, SEED = 4 * MIB, 31
SPOOL = Stdio(stdout=StreamSpec(StreamMode.SPOOL, 256 << 10))
STEADY = "trap 'exit 7' TERM; while :; do sleep 1; done"


async def _replug_under_load(machine: VirtualMachine, target: Target) -> list[float]:
    """Seconds from each replug's beginning until a host was answered again."""
    write = pattern.command(f"write(1, {SEED}, {SIZE})")
    async with (
        await connect(target) as client,
        running(target, client, "sh", "-c", STEADY) as steady,
        running(target, client, *write, stdio=SPOOL) as writer,
    ):
        ending = asyncio.create_task(steady.wait())
        reader = _Reader(writer)
        pauses = []
        for number in range(1, REPLUGS + 1):
            await reader.read_to(SIZE * number // (REPLUGS + 1))
            pauses.append(await _replug(machine, client, hung=number == REPLUGS))
            answered = await run(client, steady.container, "sh", "-c", "echo over; exit 5")
            assert (answered.exit.exit_code, answered.stdout) == (5, b"over\n")
        await reader.read_to(SIZE)
        assert (await writer.wait()).exit_code == 0
        assert await reader.out.read() == b""
        assert (reader.digest.hexdigest(), reader.out.dropped) == (pattern.digest(SEED, SIZE), 0)
        state = await client.process_state(steady.container, steady.process)
        assert (state.pid, state.exit, ending.done()) == (steady.pid, None, False)
        await steady.kill("TERM")
        assert (await ending).exit_code == 7
    return pauses


class _Reader:
    """Reads a spool as far as it is told; what lies beyond fills every buffer on the way."""

    def __init__(self, writer: RemoteProcess) -> None:
        out = writer.streams["stdout"]
        assert isinstance(out, SpoolStream)
        self.out = out
        self.digest = hashlib.sha256()

    async def read_to(self, position: int) -> None:
        while self.out.position < position:
            data = await self.out.read(min(65536, position - self.out.position))
            assert data
            self.digest.update(data)


async def _replug(machine: VirtualMachine, client: Client, *, hung: bool) -> float:
    address, daemon = machine.address, machine.daemon_pid
    generation = (await client.ping()).generation
    if hung and daemon is not None:
        os.kill(daemon, signal.SIGSTOP)
    begun = time.monotonic()
    await machine.replug_vsock()
    plugged = time.monotonic() - begun
    assert (await client.ping()).generation == generation
    answered = time.monotonic() - begun
    assert machine.address == address
    if daemon is not None:
        assert machine.daemon_pid not in (None, daemon)
        assert not Path(f"/proc/{daemon}").exists()
    print(f"replugged in {plugged:.2f} s, answered after {answered:.2f} s, load {os.getloadavg()[0]}")
    return answered


def _hang_up(machine: VirtualMachine, *, paused: bool) -> None:
    """A host dials and is gone before the guest can answer. A paused VM's daemon does not get to CONNECT."""
    address = parse_dial(machine.address)
    assert isinstance(address, HybridAddress)
    with socket.socket(socket.AF_UNIX) as host:
        host.connect(address.path)
        if not paused:
            host.send(b"CONNECT %d\n" % address.port)
            until = time.monotonic() + 5
            while _unread(host) and time.monotonic() < until:
                pass


def _unread(sock: socket.socket) -> int:
    (size,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    assert isinstance(size, int)
    return size


async def _lose_daemon(machine: VirtualMachine, target: Target, *, paused: bool) -> None:
    replugged = asyncio.Event()
    machine.guest.on_vsock_changed = replugged.set
    async with await connect(target) as client, running(target, client, "sh", "-c", STEADY) as steady:
        generation = (await client.ping()).generation
        daemon = machine.daemon_pid
        if paused:
            await machine.pause()
        _hang_up(machine, paused=paused)
        if paused:
            await machine.resume()
            await replugged.wait()
        while not replugged.is_set():  # the guest was faster
            await client.ping()
            _hang_up(machine, paused=False)
        assert machine.daemon_pid not in (None, daemon)
        assert (await client.ping()).generation == generation
        answered = await run(client, steady.container, "echo", "over")
        assert answered.stdout == b"over\n"


@pytest.mark.parametrize("paused", [False, True])
def test_a_host_that_hangs_up_does_not_keep_the_others_out(vm: Booted, paused: bool) -> None:
    """vhost-device-vsock goes deaf of it (0.3.0); the kernel's vhost-vsock does not."""
    if vm.machine.daemon_pid is not None:
        target = Target(vm.machine.address, ROOTFS, box="", pace=vm.pace, execs=1)
        vm.runner.run(asyncio.wait_for(_lose_daemon(vm.machine, target, paused=paused), 10 * vm.pace))


def test_a_fresh_daemon_behind_the_same_address(vm: Booted) -> None:
    target = Target(vm.machine.address, ROOTFS, box="", pace=vm.pace, execs=1)
    pauses = vm.runner.run(_replug_under_load(vm.machine, target))
    assert len(pauses) == REPLUGS
