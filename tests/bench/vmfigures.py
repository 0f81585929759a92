"""The VM tier: what vsock, a small guest and its image add; baselines run in the same guest."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import statistics
import time
from collections.abc import AsyncIterator

from gcsagent.host.process import RemoteProcess
from gcsagent.host.spec import exec_spec
from gcsagent.host.transport import dial
from protocol.address import parse_dial
from protocol.families.process import Exec
from protocol.types import Stdio
from tests.bench import execs, streams
from tests.bench.figures import Measured, at_least, at_most, figure, in_turn
from tests.bench.host import BOX, PROGRAM
from tests.bench.vm import GUEST, PORT, RUNC, SEEN, Vm
from tests.cases.target import MIB, STREAM, executing, expect

AT_ONCE = 8
COUNT = 48 * MIB
CHUNK = 1 << 20
TIMEOUT = 120.0
FLOOR = 3
"""Samples of what the kernel's part of a relay costs."""

PAGE_KIB = 1024


OURS = {
    "supervisor": "import gcsagent.supervisor.main, gcsagent.__main__",
    "agent": "from gcsagent.agent.stdlib import load_later; load_later(); import gcsagent.agent.app",
}
LIST_MODULES = """
import sys
{ours}
loaded = [name for name, module in sys.modules.items() if type(module).__name__ != "StandIn"]
wanted = sorted(n for n in loaded if n.partition(".")[0] in sys.stdlib_module_names and n != "__main__")
print(" ".join(wanted))
"""
IMPORT_AND_WAIT = """
import sys
for name in sys.argv[1:]:
    try:
        __import__(name)
    except ImportError:
        pass
print("here", flush=True)
sys.stdin.read()
"""


async def pss(vm: Vm, *pids: int) -> float:
    """KiB, as smaps_rollup has it."""
    text = await vm.output("busybox", "cat", *(f"/proc/{pid}/smaps_rollup" for pid in pids))
    return float(sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")))


@figure(
    "memory-vm",
    tier="vm",
    what="agent and supervisor, idle, in the image: PSS",
    target=at_most(24),
    unit="MiB",
    scale=1.0,
    samples=3,
)
async def memory(vm: Vm, samples: int) -> Measured:
    """Before the driver has come: it is a Python as well, and would share pages."""
    pids = 1, (await vm.client.info()).agent_pid
    return Measured([await pss(vm, *pids) / PAGE_KIB for _ in range(samples)])


@figure(
    "memory-ratio-vm",
    tier="vm",
    what="the same, all four sharing pages",
    baseline="two bare interpreters with only the stdlib modules ours import",
    target=at_most(1.25),
    unit="MiB",
    samples=3,
)
async def memory_ratio(vm: Vm, samples: int) -> Measured:
    pids = 1, (await vm.client.info()).agent_pid
    measured = Measured()
    async with contextlib.AsyncExitStack() as stack:
        bare = [await stack.enter_async_context(_bare(vm, ours)) for ours in OURS.values()]
        for _ in range(samples):
            measured.ours.append(await pss(vm, *pids) / PAGE_KIB)
            measured.baseline.append(await pss(vm, *bare) / PAGE_KIB)
    return measured


@contextlib.asynccontextmanager
async def _bare(vm: Vm, ours: str) -> AsyncIterator[int]:
    """The pid of an interpreter in the guest with what ``ours`` imports of the standard library."""
    names = (await vm.output("python3", "-P", "-c", LIST_MODULES.format(ours=ours))).split()
    command = ("chroot", SEEN, "python3", "-P", "-c", IMPORT_AND_WAIT, *names)
    stdio = Stdio(STREAM, STREAM)
    async with executing(vm.client, GUEST, *command, stdio=stdio) as process:
        await expect(process.streams["stdout"], rb"here\n")
        yield process.pid


@figure(
    "exec-vm",
    tier="vm",
    what="exec of `true` in the VM, request to exit, output attached",
    baseline="`runc exec` of the same in the guest, into a pipe",
    target=at_most(1.05),
    scale=1000,
    samples=8,
)
async def exec_true(vm: Vm, samples: int) -> Measured:
    argv = [*RUNC, "exec", BOX, "true"]
    return await in_turn(samples, lambda: execs.one(vm.client), lambda: vm.timed("run", argv=argv))


@figure(
    "exec-8-vm",
    tier="vm",
    what="8 at once in the VM, until the last has ended",
    baseline="8 `runc exec` at once in the guest",
    target=at_most(1.05),
    scale=1000,
    samples=3,
)
async def exec_at_once(vm: Vm, samples: int) -> Measured:
    argv = [*RUNC, "exec", BOX, "true"]
    return await in_turn(
        samples,
        lambda: execs.at_once(vm.client, AT_ONCE),
        lambda: vm.timed("run", argv=argv, count=AT_ONCE),
        seconds=60,
    )


@contextlib.asynccontextmanager
async def serving(vm: Vm) -> AsyncIterator[None]:
    """bytes.c at the other end of vsock connections, in the box."""
    args = (PROGRAM, "serve", str(PORT), str(COUNT))
    async with executing(vm.client, BOX, *args) as server:
        await expect(server.streams["stdout"], rb"listening\n")
        yield


async def plainly(vm: Vm, way: bytes) -> float:
    """Bytes a second over a vsock connection of its own, to a program that runs, as ours does."""
    sock = await dial(parse_dial(vm.plain_address))
    sock.setblocking(True)
    sock.settimeout(TIMEOUT)
    with sock:
        return await asyncio.to_thread(_move, sock, way)


def _move(sock: socket.socket, way: bytes) -> float:
    buffer = bytearray(CHUNK)
    began = time.perf_counter()
    sock.sendall(way)
    if way in (b"z", b"s"):
        left = COUNT
        while left > 0 and (count := sock.recv_into(buffer)):
            left -= count
    else:
        for _ in range(COUNT // CHUNK):
            sock.sendall(buffer)
        left = 0 if sock.recv(1) else COUNT
    if left:
        raise RuntimeError(f"{left} of {COUNT} bytes are missing")
    return COUNT / (time.perf_counter() - began)


async def to_reader(vm: Vm) -> float:
    """Into a reader that runs: until it has seen the last byte."""
    spec = exec_spec(args=("sh", "-c", f"echo ready; exec {PROGRAM} drain {COUNT}"))
    params = Exec(BOX, streams.new_name("in"), spec, Stdio(STREAM, STREAM))
    process = await RemoteProcess.exec(vm.client, params)
    await expect(process.streams["stdout"], rb"ready\n")
    data = bytes(CHUNK)
    began = time.perf_counter()
    for _ in range(COUNT // CHUNK):
        await process.streams["stdin"].write(data)
    await expect(process.streams["stdout"], rb"%d\n" % COUNT)
    took = time.perf_counter() - began
    await streams.leave(vm.client, process)
    return COUNT / took


@figure(
    "stdout-vm",
    tier="vm",
    what="stdout in the VM, 48 MiB, container to host client over vsock",
    baseline="a C program writing zeros to a vsock connection",
    target=at_least(0.85),
    unit="MiB/s",
    scale=1 / MIB,
    samples=9,
)
async def stdout(vm: Vm, samples: int) -> Measured:
    async with serving(vm):
        measured = await in_turn(
            samples, lambda: streams.at_once(vm.client, 1, COUNT), lambda: plainly(vm, b"z")
        )
        floor = await in_turn(FLOOR, lambda: plainly(vm, b"s"), lambda: plainly(vm, b"z"))
    value = statistics.median(floor.values)
    measured.notes.append(f"the same pipes and splices in a C program get {value:.2f} of the baseline")
    return measured


@figure(
    "stdin-vm",
    tier="vm",
    what="stdin in the VM, 48 MiB, host client to container",
    baseline="a C program reading from a vsock connection",
    target=at_least(0.85),
    unit="MiB/s",
    scale=1 / MIB,
    samples=9,
)
async def stdin(vm: Vm, samples: int) -> Measured:
    async with serving(vm):
        return await in_turn(samples, lambda: to_reader(vm), lambda: plainly(vm, b"d"))


@figure(
    "ready-vm",
    tier="vm",
    what="supervisor's start to READY, in the VM",
    baseline="`python3 -c 'import asyncio, msgpack'`",
    target=at_most(1.5),
    scale=1000,
    samples=7,
)
async def ready(vm: Vm, samples: int) -> Measured:
    agent = [
        "python3",
        "-P",
        "-m",
        "gcsagent",
        "--listen",
        "unix:/run/bench/x.sock",
        "--state",
        "/run/bench/x",
    ]
    bare = ["python3", "-P", "-c", "import asyncio, msgpack"]
    return await in_turn(
        samples, lambda: vm.timed("ready", argv=agent), lambda: vm.timed("run", argv=bare), seconds=60
    )


@figure(
    "initramfs",
    tier="vm",
    what="compressed initramfs",
    target=at_most(16),
    unit="MB",
    samples=1,
)
async def initramfs(vm: Vm, _samples: int) -> Measured:
    sizes = json.loads((vm.image / "manifest.json").read_text())["sizes"]
    parts = sorted(sizes["parts"].items(), key=lambda part: -part[1]["packed"])
    told = ", ".join(f"{name} {size['packed'] / 1e6:.2f}" for name, size in parts)
    return Measured([sizes["initramfs"] / 1e6], notes=[f"in MB: {told}"])
