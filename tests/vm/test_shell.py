"""The debug shell over vsock, in a guest whose agent stands still."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from gcsagent.host.errors import AgentSilent
from gcsagent.host.shell import Shell, shell_address
from gcsagent.host.vm.config import VmConfig, VmExit
from gcsagent.host.vm.launcher import VirtualMachine
from protocol.errors import Code
from protocol.families.diagnostics import AskLogs, LogEntry
from protocol.families.shell import OpenShell, ShellEnd, ShellExit
from protocol.method import Empty
from protocol.types import Winsize
from tests.cases.machines import PACE
from tests.cases.shells import expect_line, output_of
from tests.cases.target import Target, connect, creation, refused

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
BOOT_SECONDS, SECONDS = 240.0, 180.0
ROOTFS = "/run/gcs/disks/rootfs"
CONNECT = "import socket; s = socket.socket(socket.AF_VSOCK); s.connect((1, 1025)); print('got', s.recv(1))"


async def run(machine: VirtualMachine, *argv: str, container: str | None = None) -> tuple[str, ShellExit]:
    wanted = OpenShell(container, argv)
    async with await Shell.open(shell_address(machine.address), wanted, client_name="tests") as shell:
        out, record = await output_of(shell)
    return out.decode().replace("\r\n", "\n"), record


async def gcsctl(machine: VirtualMachine, *words: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gcsagent.host", "--address", machine.address, *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def stop_the_agent(machine: VirtualMachine, client: Client) -> int:
    """By the first shell there is; returns its pid."""
    agent = (await client.info()).agent_pid
    out, record = await run(machine, "sh", "-c", f"kill -STOP {agent}; cat /proc/1/comm; id -u; exit 42")
    assert (out.split()[1:], record.exit_code, record.reason) == (["0"], 42, ShellEnd.EXITED)
    with pytest.raises(AgentSilent):
        await client.call("agent.ping", Empty(), deadline=2.0)
    return agent


async def in_the_guest(machine: VirtualMachine) -> None:
    wanted = OpenShell(None, ("busybox", "sh"), term="dumb", winsize=Winsize(11, 33))
    async with await Shell.open(shell_address(machine.address), wanted) as shell:
        seen = bytearray()
        await shell.stream.write(b"stty size; tty\n")
        await expect_line(shell.stream, rb"11 33", seen)
        await expect_line(shell.stream, rb"/dev/pts/[0-9]+", seen)
        await shell.resize(Winsize(50, 120))
        await shell.stream.write(b"stty size; exit 7\n")
        await expect_line(shell.stream, rb"50 120", seen)
        assert (await output_of(shell))[1].exit_code == 7


async def in_the_container(machine: VirtualMachine) -> None:
    out, record = await run(machine, "sh", "-c", "hostname; cat /proc/1/comm; exit 3", container="web")
    assert (out, record.exit_code) == ("web\nsleep\n", 3)
    with refused(Code.NOT_FOUND, exec_error="not_found") as caught:
        await run(machine, "nonesuch", container="web")
    assert "without a container has the guest's own" in caught.value.message
    assert await gcsctl(machine, "shell", "web", "--", "sh", "-c", "hostname; exit 42") == (42, "web\n", "")
    code, _, err = await gcsctl(machine, "shell", "--timeout", "0.5", "web", "--", "sleep", "100000")
    assert (code, err) == (129, "gcsctl: the shell was ended: its time limit of 0.5 s has passed\n")


async def logged(client: Client) -> list[LogEntry]:
    page = await client.call("agent.logs", AskLogs(limit=1000))
    return [entry for entry in page.entries if entry.name == "shell"]


def _last_is_over(entries: list[LogEntry]) -> bool:
    return bool(entries) and "-CONT" in str(entries[-1].fields) and entries[-1].message == "shell closed"


async def story(machine: VirtualMachine) -> VmExit:
    target = Target(machine.address, ROOTFS, box="", pace=PACE[machine.accel.name], execs=1)
    async with await connect(target) as client:
        await client.create_container(creation(target, "web", ("sleep", "100000")))
        await client.start_container("web")
        agent = await stop_the_agent(machine, client)
        await in_the_guest(machine)
        await in_the_container(machine)
        out, _ = await run(machine, "python3", "-c", CONNECT)
        assert out == "got b''\n", "a peer in the guest itself"
        await run(machine, "kill", "-CONT", str(agent))
        assert (await client.ping()).generation == 1
        entries = await logged(client)
        # The agent gets to what was logged while it stood still after its first answers.
        while not _last_is_over(entries):
            entries = await logged(client)
    about = {(entry.message, entry.fields.get("container"), entry.fields.get("reason")) for entry in entries}
    assert {
        ("shell opened", "web", None),
        ("shell closed", None, "exited"),
        ("shell closed", "web", "timeout"),
        ("shell refused", "web", None),
        ("a peer that is not the host was refused a shell", None, None),
    } <= about
    assert all(
        entry.fields.get("peer", "").startswith("vsock:2:") for entry in entries if "shell " in entry.message
    )
    wanted = OpenShell("web", ("sleep", "100000"))
    async with await Shell.open(shell_address(machine.address), wanted) as left:
        assert left.pid > 1
        return await machine.powerdown(60)


def test_it_answers_while_the_agent_is_stopped(built_image: Path, rootfs_image: Path, tmp_path: Path) -> None:
    console = tmp_path / "console"
    config = VmConfig(
        name="shell",
        image=built_image,
        rootfs=rootfs_image,
        console_log=console,
        shell=True,
        cmdline=("gcs.watchdog=off",),
    )

    async def scene() -> VmExit:
        async with asyncio.timeout(BOOT_SECONDS):
            machine = await VirtualMachine.launch(config)
        try:
            async with asyncio.timeout(SECONDS):
                return await story(machine)
        finally:
            print("\n".join(machine.console.lines()[-60:]))
            machine.destroy()

    ended = asyncio.run(scene())
    assert (ended.clean, ended.reason, ended.findings) == (True, "the guest powered off", ())
    assert '"name": "shell", "message": "shell opened"' in console.read_text(errors="replace")
