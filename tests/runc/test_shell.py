"""The debug shell on this machine: past a stopped agent, into real containers, and nothing left of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.client import Client
from gcsagent.host.dialogue import Dialogue
from gcsagent.host.errors import ConnectionBroken, HostError
from gcsagent.host.shell import NoShell, Shell, connect, listing
from gcsagent.host.transport import dial
from protocol.address import UnixAddress
from protocol.errors import Code, RemoteProtocolError, RpcError
from protocol.families.diagnostics import AskLogs, LogEntry
from protocol.families.shell import MAX_SHELLS, CloseInput, ShellEnd, ShellExit, ShellRef
from protocol.framing import Request, encode
from protocol.method import Empty
from protocol.types import Winsize
from tests.cases.agents import RunningAgent, children, eventually
from tests.cases.shells import (
    IDLE_FDS,
    SLEEP,
    Shelled,
    command_of,
    container,
    ended,
    expect_line,
    is_gone,
    output_of,
    start,
    stopped,
)
from tests.cases.target import Target, expect, refused

# -- what it is for -------------------------------------------------------------------------------


def test_it_answers_while_the_agent_is_stopped(shelled: Shelled) -> None:
    async def scene() -> None:
        with stopped(shelled.agent):
            async with await shelled.open("sh", "-c", "echo $TERM; pwd; exit 42", term="vt100") as shell:
                out, record = await output_of(shell)
            assert (out.split(), record.exit_code, record.reason) == (
                [b"vt100", os.path.expanduser("~root").encode()],
                42,
                ShellEnd.EXITED,
            )
            script = "id -u; hostname; echo pid $$; cat /proc/1/comm; head -1 /etc/os-release; exit 7"
            async with await shelled.open("sh", "-c", script, container="box") as shell:
                assert Path(f"/proc/{shell.pid}").exists(), "the pid is the machine's"
                out, record = await output_of(shell)
            uid, host, own, init, system = out.decode().splitlines()
            assert (uid, host, init, record.exit_code) == ("0", "box", "sleep", 7)
            assert own.startswith("pid ")
            assert own != f"pid {shell.pid}", "it has a number of its own in there"
            assert system == Path(shelled.target.rootfs, "etc/os-release").read_text().splitlines()[0]

    shelled.run(scene)


def test_the_log_says_who_did_what_and_how_it_ended(shelled: Shelled) -> None:
    async def scene() -> None:
        async with await Client.connect(shelled.target.address) as client:
            with stopped(shelled.agent):
                async with await shelled.open("sh", "-c", "exit 42", container="box") as shell:
                    await output_of(shell)
                with refused(Code.NOT_FOUND):
                    await shelled.open(container="nobody")
            lines: list[LogEntry] = []
            last = 0
            while not lines or "nobody" not in str(lines[-1].fields):
                page = await client.call("agent.logs", AskLogs(last, 1000, follow=True))
                last = page.entries[-1].seq
                lines += [each for each in page.entries if each.name == "shell"]
            about = [each for each in lines if each.fields.get("shell") == shell.ident]
            assert [each.message for each in about] == ["shell opened", "shell closed"]
            assert (
                about[0].fields.items()
                >= {
                    "container": "box",
                    "argv": "sh -c exit 42",
                    "peer": f"unix:pid={os.getpid()},uid=0",
                    "client": "tests",
                    "pid": shell.pid,
                }.items()
            )
            assert about[1].fields.items() >= {"exit_code": 42, "reason": "exited"}.items()
            assert lines[-1].message == "shell refused"
            assert "nobody" in lines[-1].fields["error"]

    shelled.run(scene)


def test_a_terminal_that_resizes_and_takes_ctrl_c(shelled: Shelled) -> None:
    async def scene() -> None:
        for where in (None, "box"):
            size = Winsize(11, 33)
            wanted: dict[str, Any] = {"container": where, "winsize": size, "term": "dumb"}
            async with await shelled.open("bash", "--norc", **wanted) as shell:
                seen = bytearray()
                await shell.stream.write(b"stty size; echo -$-\n")
                await expect_line(shell.stream, rb"11 33", seen)
                assert b"m" in await expect_line(shell.stream, rb"-[a-zA-Z]*i[a-zA-Z]*", seen), (
                    "no job control"
                )
                await shell.resize(Winsize(50, 120))
                await shell.stream.write(b"stty size; cat\n")
                await expect_line(shell.stream, rb"50 120", seen)
                await shell.stream.write(b"here\n")
                await expect_line(shell.stream, rb"here", seen)
                await expect_line(shell.stream, rb"here", seen)
                await shell.stream.write(b"\x03")
                await expect(shell.stream, rb"\^C\r\n.*# ", seen)
                await shell.stream.write(b"echo status $?; exit 3\n")
                await expect_line(shell.stream, rb"status 130", seen)
                assert (await output_of(shell))[1].exit_code == 3

    shelled.run(scene)


def test_a_home_that_is_not_there_is_no_obstacle(shelled: Shelled) -> None:
    async def scene() -> None:
        async with await shelled.open("pwd", env={"HOME": "/nowhere"}) as shell:
            assert (await output_of(shell))[0] == b"/\r\n"

    shelled.run(scene)


def test_all_output_comes_and_is_counted(shelled: Shelled) -> None:
    async def scene() -> None:
        async with await shelled.open("sh", "-c", "stty raw; head -c 3000000 /dev/zero") as shell:
            out, record = await output_of(shell)
        assert (len(out), record.bytes) == (3_000_000, 3_000_000)

    shelled.run(scene)


def test_on_pipes_the_input_ends_where_it_is_told_to(shelled: Shelled) -> None:
    async def scene() -> None:
        before = await settled(shelled)
        for where in (None, "box"):
            async with await shelled.open("cat", container=where, terminal=False) as shell:
                async with await connect(shelled.address, "tests") as client:
                    end = CloseInput(shell.ident, 6)
                    await client.call("shell.close_input", end)  # told before it has come
                await shell.resize(Winsize(1, 1))  # of no consequence
                await shell.stream.write(b"abc\x04")
                assert await shell.stream.read() == b"abc\x04"
                await shell.stream.write(b"de")
                assert (await output_of(shell))[0] == b"de"
            async with await shelled.open(
                "sh", "-c", "exec 0<&-; echo closed; sleep 100000", terminal=False
            ) as deaf:
                assert await deaf.stream.read() == b"closed\n"
                await deaf.stream.write(b"x" * 1_000_000)
                await deaf.end_input()
                await deaf.kill()
                assert (await output_of(deaf))[1].reason is ShellEnd.KILLED
        async with (
            await shelled.open(*SLEEP) as shell,
            await connect(shelled.address, "tests") as client,
        ):
            with refused(Code.FAILED_PRECONDITION, field="shell"):
                await client.call("shell.close_input", CloseInput(shell.ident, 0))
        assert await settled(shelled) == before

    shelled.run(scene)


def test_it_gets_into_a_paused_container_and_one_in_a_user_namespace(shelled: Shelled) -> None:
    def mapped(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"].append({"type": "user"})
        mapping = [{"containerID": 0, "hostID": 200_000, "size": 65_536}]
        spec["linux"] |= {"uidMappings": mapping, "gidMappings": mapping}

    async def scene() -> None:
        async with (
            container(shelled, "mapped", spec=mapped) as pid,
            await Client.connect(shelled.target.address) as client,
        ):
            await client.pause_container("mapped")
            script = "id -u; head -1 /proc/self/uid_map; cat /proc/1/comm"
            async with await shelled.open("sh", "-c", script, container="mapped") as shell:
                out, _ = await output_of(shell)
            assert out.split() == [b"0", b"0", b"200000", b"65536", b"sleep"]
            assert not is_gone(pid)
            await client.resume_container("mapped")

    shelled.run(scene)


# -- the end of a shell ---------------------------------------------------------------------------


def test_the_time_limit_hangs_up_and_then_kills(shelled: Shelled) -> None:
    async def scene() -> None:
        words = "trap 'echo goodbye; exit 9' HUP; while :; do sleep 100000 & wait; done"
        async with await shelled.open("sh", "-c", words, timeout_ms=300) as shell:
            out, record = await output_of(shell)
        assert (out, record.exit_code, record.reason) == (b"goodbye\r\n", 9, ShellEnd.TIMEOUT)
        deaf = "trap '' HUP; sleep 100000 & echo $!; while :; do wait; done"
        async with await shelled.open("sh", "-c", deaf, container="box", timeout_ms=300) as shell:
            _, record = await output_of(shell)
            assert (record.signal, record.reason) == (signal.SIGKILL, ShellEnd.TIMEOUT)
            assert is_gone(shell.pid)
        assert 2000 <= record.duration_ms < 10_000

    shelled.run(scene)


def test_closing_the_connection_hangs_up_and_nothing_is_left(shelled: Shelled) -> None:
    async def scene() -> None:
        async with await shelled.open("true") as shell:
            await output_of(shell)
        before = await settled(shelled)
        deaf = "trap '' HUP; sleep 100000 & echo child $!; echo pid $$; wait"
        shell = await shelled.open("bash", "-c", deaf)
        child = int((await expect_line(shell.stream, rb"child [0-9]+", bytearray())).split()[1])
        async with await connect(shelled.address, "tests") as client:
            waiting = asyncio.create_task(client.call("shell.wait", ShellRef(shell.ident)))
            await shell.aclose()
            record: ShellExit = await waiting
        assert (record.reason, record.signal) == (ShellEnd.HANGUP, signal.SIGKILL)
        assert eventually(lambda: is_gone(child) and is_gone(shell.pid))
        for terminal in (True, False, True):  # the host is gone amid output that nobody takes
            shell = await shelled.open("yes", container="box", terminal=terminal)
            await expect(shell.stream, rb"y\r?\n", bytearray())
            await shell.aclose()
            assert await asyncio.to_thread(eventually, lambda pid=shell.pid: is_gone(pid))
        assert await settled(shelled) == before

    shelled.run(scene)


async def settled(shelled: Shelled) -> tuple[int, list[int]]:
    """What the server holds once no shell is there and every connection of ours is through."""
    async with await connect(shelled.address, "tests") as client:
        await ended(client)
    await asyncio.to_thread(eventually, lambda: shelled.holdings()[0] == IDLE_FDS)
    return shelled.holdings()


def test_it_ends_with_its_container(shelled: Shelled) -> None:
    def shared(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"] = [each for each in spec["linux"]["namespaces"] if each["type"] != "pid"]

    async def scene() -> None:
        for change in (None, shared):
            async with container(shelled, "brief", **({"spec": change} if change else {})) as init:
                async with await shelled.open("sleep", "100000", container="brief") as shell:
                    os.kill(init, signal.SIGKILL)
                    _, record = await output_of(shell)
                assert record.reason is ShellEnd.CONTAINER
                assert is_gone(shell.pid)

    shelled.run(scene)


def test_shells_are_listed_and_can_be_ended(shelled: Shelled) -> None:
    async def scene() -> None:
        async with (
            await shelled.open("sleep", "100000", container="box") as shell,
            await connect(shelled.address, "another") as client,
        ):
            [found] = (await listing(client)).shells
            assert (found.shell, found.pid, found.container, found.argv, found.client) == (
                shell.ident,
                shell.pid,
                "box",
                ("sleep", "100000"),
                "tests",
            )
            await client.call("shell.kill", ShellRef(shell.ident))
            _, record = await output_of(shell)
            assert (record.exit_code, record.reason) == (129, ShellEnd.KILLED)
            assert (await listing(client)).shells == ()
            assert await client.call("shell.wait", ShellRef(shell.ident)) == record
            with refused(Code.FAILED_PRECONDITION, field="shell"):
                await shell.resize(Winsize(1, 1))
            with refused(Code.NOT_FOUND, field="shell"):
                await client.call("shell.wait", ShellRef("nobody"))

    shelled.run(scene)


def test_the_servers_death_ends_its_shells_and_the_next_connection_starts_another(shelled: Shelled) -> None:
    async def scene() -> None:
        deaf = "trap '' HUP; echo ready; while :; do read x; done"
        async with (
            await shelled.open("sh", "-c", deaf) as one,
            await shelled.open("sh", "-c", deaf, container="box") as other,
        ):
            for shell in (one, other):
                await expect_line(shell.stream, rb"ready", bytearray())
            before, pids = shelled.server, (one.pid, other.pid)
            os.kill(before, signal.SIGKILL)
            with pytest.raises(ConnectionBroken, match="was ended, and this one with it"):
                await one.wait()
        assert await asyncio.to_thread(eventually, lambda: all(map(is_gone, (before, *pids))))
        async with await shelled.open("sh", "-c", "exit 5", container="box") as shell:
            assert (await output_of(shell))[1].exit_code == 5
        assert shelled.server not in (0, before)
        zombies = [pid for pid in children(shelled.agent.pid) if not command_of(pid)]
        assert zombies == []

    shelled.run(scene)
    assert "the debug shell's process failed, and its shells with it" in shelled.agent.log_tail()


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL])
def test_shells_end_with_the_supervisor(tmp_path: Path, rootfs: str, way: signal.Signals) -> None:
    """Without pivot_root the container's root is not that of its mount namespace."""
    running = RunningAgent("--shell", f"unix:{tmp_path / 'shell'}", "--no-pivot", "--watchdog", "off")
    try:
        target = Target(running.address, rootfs, box="box", pace=1.0, execs=1)
        shelled = Shelled(running, UnixAddress(str(tmp_path / "shell")), target)

        async def scene() -> None:
            await start(target, "box", *SLEEP)
            script = "trap '' HUP; test -e /.dockerenv -o -e /etc/os-release && cat /etc/hostname; read x"
            async with await shelled.open("sh", "-c", script, container="box") as shell:
                await expect_line(shell.stream, rb"demo", bytearray())
                server, agent = shelled.server, running.agent_pid
                os.kill(running.pid, way)
                with contextlib.suppress(HostError, RpcError):
                    await shell.wait()
                pids = (shell.pid, server, agent)
                assert await asyncio.to_thread(eventually, lambda: all(map(is_gone, pids)), 40.0)

        shelled.run(scene)
        assert running.wait() == (0 if way == signal.SIGTERM else -way)
    finally:
        running.destroy()


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, code, details",
    [
        ({"container": "nobody"}, Code.NOT_FOUND, {"field": "container"}),
        ({"container": "../box"}, Code.INVALID_ARGUMENT, {"field": "container"}),
        ({"container": "box", "argv": ["nonesuch"]}, Code.NOT_FOUND, {"exec_error": "not_found"}),
        ({"argv": ["/nowhere/sh"]}, Code.NOT_FOUND, {"exec_error": "not_found"}),
        ({"argv": ["/etc/passwd"]}, Code.PERMISSION_DENIED, {"exec_error": "not_executable"}),
        ({"argv": ["/"]}, Code.PERMISSION_DENIED, {"exec_error": "not_executable"}),
        ({"argv": ["a\0b"]}, Code.INVALID_ARGUMENT, {"field": "argv"}),
        ({"argv": [""]}, Code.INVALID_ARGUMENT, {"field": "argv"}),
        ({"argv": "sh"}, Code.INVALID_ARGUMENT, {"field": "argv"}),
        ({"argv": ["x"] * 1025}, Code.INVALID_ARGUMENT, {"field": "argv"}),
        ({"env": {"A=B": "c"}}, Code.INVALID_ARGUMENT, {"field": "env"}),
        ({"term": "; rm"}, Code.INVALID_ARGUMENT, {"field": "term"}),
        ({"winsize": {"rows": 65536, "cols": 1}}, Code.INVALID_ARGUMENT, {"field": "winsize.rows"}),
        ({"winsize": {"rows": -1, "cols": 1}}, Code.INVALID_ARGUMENT, {"field": "winsize.rows"}),
        ({"timeout_ms": 0}, Code.INVALID_ARGUMENT, {"field": "timeout_ms"}),
    ],
)
def test_what_cannot_be_opened(
    shelled: Shelled, wanted: dict[str, Any], code: Code, details: dict[str, str]
) -> None:
    async def scene() -> None:
        with refused(code, **details):
            await shelled.raw(("shell.open", wanted))

    shelled.run(scene)


def test_a_container_that_has_ended_has_none(shelled: Shelled) -> None:
    async def scene() -> None:
        async with (
            container(shelled, "over", "sleep", "100000") as init,
            await Client.connect(shelled.target.address) as client,
        ):
            with stopped(shelled.agent):  # nobody notes its end
                os.kill(init, signal.SIGKILL)
                assert eventually(lambda: is_gone(init))
                with refused(Code.FAILED_PRECONDITION, field="container"):
                    await shelled.open(container="over")
            await client.wait_container("over")
            with refused(Code.FAILED_PRECONDITION, field="container"):
                await shelled.open(container="over")

    shelled.run(scene)


def test_two_hundred_opens_are_bounded_and_leave_nothing(shelled: Shelled) -> None:
    async def scene() -> None:
        before = await settled(shelled)
        found = await asyncio.gather(
            *(shelled.open("sleep", "100000") for _ in range(200)), return_exceptions=True
        )
        opened = [each for each in found if isinstance(each, Shell)]
        errors = [each for each in found if not isinstance(each, Shell)]
        try:
            assert len(opened) == MAX_SHELLS
            for error in errors:
                assert isinstance(error, RpcError), error
                assert (error.code, error.details["limit"]) == (Code.RESOURCE_EXHAUSTED, "max_shells"), error
        finally:
            for shell in opened:
                await shell.aclose()
        assert await settled(shelled) == before

    shelled.run(scene)


def test_the_port_has_no_other_methods_and_the_agents_has_not_these(shelled: Shelled) -> None:
    async def scene() -> None:
        for method in ("agent.info", "container.list", "stream.attach", "no.such"):
            with refused(Code.UNIMPLEMENTED):
                await shelled.raw((method, {"container": "box"}))
        async with await Client.connect(shelled.target.address) as client:
            with refused(Code.UNIMPLEMENTED) as caught:
                await client.call("shell.list", Empty())
            assert "--shell" in caught.value.message
        with pytest.raises(NoShell, match="is an agent"):
            await connect(UnixAddress(shelled.agent.socket_path), "tests")
        with pytest.raises(NoShell, match=r"gcs\.shell=on"):
            await connect(UnixAddress(shelled.agent.socket_path + ".none"), "tests")

    shelled.run(scene)


def test_who_breaks_the_contract_is_told_and_cut_off(shelled: Shelled) -> None:
    async def told(data: bytes, greeting: bool = True) -> str:
        dialogue = Dialogue(await dial(shelled.address))
        try:
            if greeting:
                await dialogue.hello("bad")
            await asyncio.get_running_loop().sock_sendall(dialogue.sock, data)
            with pytest.raises(RemoteProtocolError) as caught:
                await dialogue.message()
            return caught.value.message
        finally:
            dialogue.close()

    async def scene() -> None:
        question = encode(Request(1, "shell.list", {}))
        assert "not allowed in state FRESH" in await told(question, greeting=False)
        assert "byte 0xc1" in await told(b"\x94\x00\x01\xc1\xc1")
        early = encode(Request(1, "shell.open", {"argv": ["sleep", "100000"]})) + b"x"
        assert "nothing may follow" in await told(early)

    shelled.run(scene)
