"""Checkpoint and restore with CRIU, in a VM of its own from the image that has it."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from gcsagent.host.checkpoints import (
    delete_checkpoint,
    list_checkpoints,
    make_checkpoint,
    restore_container,
)
from gcsagent.host.client import Client
from gcsagent.host.streams import Stream
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.console import scan
from gcsagent.host.vm.launcher import VirtualMachine
from protocol.errors import Code, RpcError
from protocol.families.checkpoint import MakeCheckpoint, Restore
from protocol.families.stream import StreamName
from protocol.types import Status, Stdio, StreamMode, StreamSpec, Winsize
from tests.cases.killer import KILLER, kill_once, share_pids
from tests.cases.machines import PACE, Booted, build_image
from tests.cases.target import (
    PIPES,
    STREAM,
    Target,
    connect,
    event,
    executing,
    expect,
    remove,
    run,
    running,
    terminal,
)

pytestmark = pytest.mark.timeout(1300)
REPO = Path(__file__).resolve().parents[2]
ROOTFS = "/run/gcs/disks/rootfs"
LONG = 12 if os.environ.get("GCS_CHAOS") == "long" else 1
"""How often the agent is killed while it saves."""

BUILD_SECONDS, BOOT_SECONDS, END_SECONDS = 900.0, 240.0, 90.0

COUNTER = """
import socket, sys, threading
server = socket.create_server(("127.0.0.1", 0))
near = socket.create_connection(server.getsockname())
far, _ = server.accept()

def echo():
    for line in sys.stdin:
        sys.stderr.write("got " + line)
        sys.stderr.flush()

threading.Thread(target=echo, daemon=True).start()
number = 0
while True:
    near.sendall(b"%d " % number)
    sys.stdout.write("%d\\n" % int(far.recv(64)))
    if number % 1000 == 0:
        open("/count", "w").write(str(number))
    number += 1
"""
"""Counts by way of a TCP connection to itself, as fast as it is read; writes to its root; answers stdin."""


@pytest.fixture(scope="module")
def criu_vm(rootfs_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    log = tmp_path_factory.mktemp("vm") / "console"
    config = VmConfig(name="criu", image=build_image("--with", "criu"), rootfs=rootfs_image, console_log=log)
    with asyncio.Runner() as runner:
        machine = runner.run(asyncio.wait_for(VirtualMachine.launch(config), BOOT_SECONDS))
        try:
            yield Booted(machine, runner)
            runner.run(asyncio.wait_for(_power_off(machine), END_SECONDS))
            assert scan(log.read_text(errors="replace")) == []
        finally:
            machine.destroy()


async def _power_off(machine: VirtualMachine) -> None:
    async with await Client.connect(machine.address) as client:
        assert await client.list_containers() == ()
        assert await list_checkpoints(client) == ()
        await client.shutdown()
        ended = await machine.wait()
    assert (ended.clean, ended.status, ended.findings) == (True, 0, ()), ended


Test = Callable[[Target, Client], Awaitable[None]]


def in_vm(vm: Booted, test: Test) -> None:
    async def go() -> None:
        target = Target(vm.machine.address, ROOTFS, box="none", pace=vm.pace, execs=1)
        async with asyncio.timeout(15 * PACE[vm.machine.accel.name]), await connect(target) as client:
            await test(target, client)

    vm.runner.run(go())


async def read_to_end(stream: Stream, total: int) -> bytes:
    stream.finish_at(total)
    found = bytearray()
    while data := await stream.read():
        found += data
    return bytes(found)


def numbers_from_zero(data: bytes) -> None:
    """All of them, in order, each once."""
    whole = data[: data.rindex(b"\n") + 1]
    count = whole.count(b"\n")
    assert whole == b"".join(b"%d\n" % number for number in range(count))


async def _a_counter_goes_on(target: Target, client: Client) -> None:
    """Its stream, its input, its TCP connection, its files and its limits do."""
    command = ("python3", "-I", "-S", "-u", "-c", COUNTER)
    async with (
        await client.events() as events,
        running(target, client, *command, stdio=PIPES, labels={"a": "b"}) as init,
    ):
        name, seen = init.container, bytearray()
        await client.update_container(name, pids=55)
        await init.streams["stdin"].write(b"one\n")
        await expect(init.streams["stderr"], b"got one\n")
        while len(seen) < 30_000:
            seen += await init.streams["stdout"].read()
        ended = asyncio.ensure_future(event(events, "stream.end", name, "init"))
        reading = asyncio.ensure_future(_read_on(init.streams["stdout"], seen))
        about = await make_checkpoint(
            client, MakeCheckpoint(name, "counter", tcp_established=True), deadline=100.0
        )
        assert (await client.container_state(name)).status is Status.STOPPED
        record = await client.wait_container(name)
        assert (record.signal, record.streams["stdout"]) == (9, about.streams["stdout"])
        init.streams["stdout"].finish_at(about.streams["stdout"])
        await reading
        await ended
        assert len(seen) == about.streams["stdout"]
        numbers_from_zero(bytes(seen))
        [listed] = await list_checkpoints(client)
        assert listed == about
        assert (about.container, about.overlay, about.leave_running) == (name, True, False)
        assert about.size_bytes > 1_000_000
        assert about.criu_version.startswith("4.")
    try:
        await restore_container(client, Restore("counter"), deadline=100.0)
        state = await client.container_state(name)
        assert (state.status, state.labels) == (Status.RUNNING, {"a": "b"})
        async with (
            await client.attach(name, stream=StreamName.STDOUT) as out,
            await client.attach(name, stream=StreamName.STDERR) as err,
            await client.attach(name, stream=StreamName.STDIN) as stdin,
        ):
            assert (out.offset, err.offset, stdin.offset) == (len(seen), len(b"got one\n"), len(b"one\n"))
            goal = len(seen) + 50_000
            while len(seen) < goal:
                seen += await out.read()
            await stdin.write(b"two\n")
            await expect(err, b"got two\n")
        numbers_from_zero(bytes(seen))
        stats = await client.container_stats(name)
        assert stats.pids.limit == 55
        there = await run(client, name, "cat", "/count", "/proc/self/cgroup")
        assert re.match(rb"[0-9]+0::/", there.stdout), there
    finally:
        await remove(client, name)
        await delete_checkpoint(client, "counter")


async def _read_on(stream: Stream, seen: bytearray) -> None:
    while data := await stream.read():
        seen += data


def test_a_counter_goes_on_after_its_container_was_deleted(criu_vm: Booted) -> None:
    in_vm(criu_vm, _a_counter_goes_on)


LINES = "n=0; while read line; do n=$((n + 1)); echo $n $line; echo $n >/n; done; echo end $n"


async def _a_copy_runs_beside_the_one_that_was_left_running(target: Target, client: Client) -> None:
    """Each has the input that was in the pipe, the namespaces and the files for itself."""
    async with running(target, client, "sh", "-c", LINES, stdio=PIPES) as init:
        await init.streams["stdin"].write(b"a\n")
        await expect(init.streams["stdout"], b"1 a\n")
        await client.pause_container(init.container)
        await init.streams["stdin"].write(b"b\n")
        while (await client.process_state(init.container, "init")).streams["stdin"].bytes < 4:
            pass  # each question is a round trip
        wanted = MakeCheckpoint(init.container, "lines", leave_running=True, path="/run/elsewhere")
        about = await make_checkpoint(client, wanted, deadline=100.0)
        assert (about.path, about.streams) == ("/run/elsewhere", {"stdin": 4, "stdout": 4, "stderr": 0})
        assert (await client.container_state(init.container)).status is Status.PAUSED
        with pytest.raises(RpcError, match="there already") as caught:
            await make_checkpoint(client, MakeCheckpoint(init.container, "x", path="/run/elsewhere"))
        assert caught.value.code is Code.ALREADY_EXISTS
        try:
            await restore_container(client, Restore(path="/run/elsewhere", container="copy"), deadline=100.0)
            async with (
                await client.attach("copy", stream=StreamName.STDIN) as stdin,
                await client.attach("copy", stream=StreamName.STDOUT) as out,
            ):
                assert (stdin.offset, out.offset) == (4, 4)
                await expect(out, b"^2 b\n")
                await stdin.write(b"c\n")
                await expect(out, b"^3 c\n")
            await client.close_stdin("copy", "init")
            assert (await client.wait_container("copy", deadline=60.0)).exit_code == 0
            assert (await client.process_state("copy", "init")).streams["stdin"].bytes == 6
        finally:
            await remove(client, "copy")
        await client.resume_container(init.container)
        await expect(init.streams["stdout"], b"^2 b\n")
        await init.streams["stdin"].write(b"d\n")
        await expect(init.streams["stdout"], b"^3 d\n")
        await delete_checkpoint(client, "lines")
        with pytest.raises(RpcError, match="no checkpoint"):
            await restore_container(client, Restore(path="/run/elsewhere"))
        await _refusals(target, client, init.container)


def test_a_copy_runs_beside_the_one_that_was_left_running(criu_vm: Booted) -> None:
    in_vm(criu_vm, _a_copy_runs_beside_the_one_that_was_left_running)


async def _refusals(target: Target, client: Client, name: str) -> None:
    """What cannot be saved is said, and the container goes on."""
    async with executing(client, name, "python3", "-I", "-S", "-c", LISTEN) as process:
        await expect(process.streams["stdout"], b"ready\n")
        with pytest.raises(RpcError, match=process.process) as caught:
            await make_checkpoint(client, MakeCheckpoint(name, "no"))
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert caught.value.details["processes"] == [process.process]
    with pytest.raises(RpcError) as caught:
        await restore_container(client, Restore("nobody"))
    assert caught.value.code is Code.NOT_FOUND
    with pytest.raises(RpcError) as caught:
        await make_checkpoint(client, MakeCheckpoint(name, "no", path="/nowhere/at/all"))
    assert (caught.value.code, caught.value.details["field"]) == (Code.NOT_FOUND, "path")


LISTEN = "import time; print('ready', flush=True); time.sleep(1000)"

SOCKETS = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
near = socket.create_connection(server.getsockname())
far, _ = server.accept()
print("ready", flush=True)
print("ready", file=sys.stderr, flush=True)
sys.stdin.readline()
print("went on", flush=True)
"""


async def _nobody_is_attached(target: Target, client: Client) -> None:
    """What nobody has taken moves along: out of a pipe, out of a log. What is refused changes nothing."""
    spool = StreamSpec(StreamMode.SPOOL, limit=1 << 20)
    stdio = Stdio(stdin=STREAM, stdout=STREAM, stderr=spool)
    script = f"seq 1 1000; seq 1 2000 >&2; exec python3 -I -S -c '{SOCKETS}'"
    async with running(target, client, "sh", "-c", script, stdio=stdio, attached=False) as init:
        name, spoken = init.container, b"".join(b"%d\n" % n for n in range(1, 1001)) + b"ready\n"
        logged = b"".join(b"%d\n" % n for n in range(1, 2001)) + b"ready\n"
        async with await client.attach(name, stream=StreamName.STDOUT) as out:
            first = await out.read(100)
        while (await client.process_state(name, "init")).streams["stderr"].bytes < len(logged):
            pass  # each question is a round trip
        with pytest.raises(RpcError) as caught:
            await make_checkpoint(client, MakeCheckpoint(name, "log"), deadline=100.0)
        error = caught.value
        assert error.code is Code.FAILED_PRECONDITION, error
        assert any("tcp-established" in line for line in error.details["criu_errors"]), error.details
        assert await list_checkpoints(client) == ()
        state = await client.container_state(name)
        assert state.status is Status.RUNNING
        wanted = MakeCheckpoint(name, "log", tcp_established=True)
        about = await make_checkpoint(client, wanted, deadline=100.0)
        assert about.streams["stdout"] >= len(first)
        assert about.streams["stderr"] == 0
    await restore_container(client, Restore("log", labels={"new": "label"}), deadline=100.0)
    try:
        assert (await client.container_state(name)).labels == {"new": "label"}
        async with (
            await client.attach(name, stream=StreamName.STDOUT) as out,
            await client.attach(name, stream=StreamName.STDIN) as stdin,
        ):
            got = bytearray()
            while len(got) < len(spoken) - out.offset:
                got += await out.read()
            assert spoken[out.offset :] == bytes(got)
            await stdin.write(b"go\n")
            await expect(out, b"went on\n")
        async with await client.attach(name, stream=StreamName.STDERR, offset=50) as err:
            assert await read_to_end(err, len(logged)) == logged[50:]
        assert (await client.wait_container(name, deadline=60.0)).exit_code == 0
    finally:
        await remove(client, name)
        await delete_checkpoint(client, "log")


def test_output_that_nobody_took_moves_along(criu_vm: Booted) -> None:
    in_vm(criu_vm, _nobody_is_attached)


async def _terminals(target: Target, client: Client) -> None:
    script = "echo ready; while read line; do echo got $line $(stty size); done"
    async with running(target, client, "sh", "-c", script, stdio=terminal(20, 60)) as init:
        name, tty = init.container, init.streams["tty"]
        await expect(tty, b"ready\r\n")
        await tty.write(b"one\n")
        await expect(tty, b"got one 20 60\r\n")
        await init.resize(Winsize(33, 44))
        about = await make_checkpoint(client, MakeCheckpoint(name, "tty"), deadline=100.0)
        assert about.streams["tty"] == tty.position
    await restore_container(client, Restore("tty"), deadline=100.0)
    try:
        async with await client.attach(name, stream=StreamName.TTY) as tty:
            assert tty.offset == about.streams["tty"]
            await tty.write(b"two\n")
            await expect(tty, b"got two 33 44\r\n")
    finally:
        await remove(client, name)
        await delete_checkpoint(client, "tty")


def test_a_terminal_goes_on(criu_vm: Booted) -> None:
    in_vm(criu_vm, _terminals)


async def _killed_agents(target: Target, client: Client) -> None:
    """The agent is killed while it saves, and while it restores: the same requests give the one answer."""
    supervisor = (await client.info()).supervisor_pid
    command = ("python3", "-I", "-S", "-c", KILLER % supervisor)
    async with (
        running(target, client, *command, stdio=PIPES, spec=share_pids) as killer,
        running(target, client, "sh", "-c", LINES, stdio=PIPES, attached=False) as init,
    ):
        name = init.container
        async with await client.attach(name, stream=StreamName.STDIN) as stdin:
            await stdin.write(b"a\n")
        last = LONG - 1
        for number in range(LONG):
            wanted = MakeCheckpoint(name, "killed", leave_running=number < last)
            ident = f"save-{number}"
            saving = asyncio.ensure_future(make_checkpoint(client, wanted, deadline=100.0, request_id=ident))
            await (until_frozen(client, name) if number % 2 == 0 else asyncio.sleep(0))
            await kill_once(client, killer)
            about = await saving
            assert [each.checkpoint for each in await list_checkpoints(client)] == ["killed"]
            assert await make_checkpoint(client, wanted, request_id=ident) == about
            status = (await client.container_state(name)).status
            assert status is (Status.RUNNING if number < last else Status.STOPPED)
            if number < last:
                await delete_checkpoint(client, "killed")
        await remove(client, name)
        back = Restore("killed", container="back")
        restoring = asyncio.ensure_future(restore_container(client, back, deadline=100.0, request_id="back"))
        await asyncio.sleep(0)
        await kill_once(client, killer)
        made = await restoring
        assert (await restore_container(client, back, request_id="back")).pid == made.pid
        assert (await client.container_state("back")).status is Status.RUNNING
        try:
            async with (
                await client.attach("back", stream=StreamName.STDOUT) as out,
                await client.attach("back", stream=StreamName.STDIN) as stdin,
            ):
                assert (out.offset, stdin.offset) == (0, 2)
                await expect(out, b"1 a\n")
                await kill_once(client, killer)
                await stdin.write(b"b\n")
                await expect(out, b"2 b\n")
        finally:
            await remove(client, "back")
            await delete_checkpoint(client, "killed")


async def until_frozen(client: Client, name: str) -> None:
    while (await client.container_state(name)).status is Status.RUNNING:
        pass  # each question is a round trip


def test_the_agent_is_killed_while_it_saves_and_restores(criu_vm: Booted) -> None:
    in_vm(criu_vm, _killed_agents)
