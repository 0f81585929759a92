"""gcsctl under signals and on a terminal: nothing is left, and the terminal is as it was."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import os
import signal
import struct
import termios
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.cli.signals import Signals
from gcsagent.host.vm.errors import Interrupted
from gcsagent.host.vm.running import ending_on_signals
from protocol.method import Empty
from protocol.types import Event
from tests.fakes.fake_agent import FakeAgent, Script, exit_record
from tests.gcsctl_process import SECONDS, running, until, with_agent

# -- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_go_to_the_process(tmp_path: Path, number: signal.Signals) -> None:
    async def body(agent: FakeAgent) -> None:
        script = Script(runs_until_killed=True)
        script.install(agent)
        async with running(agent, "run", "--rm", "--rootfs", "/r", "--", "x") as process:
            await until(lambda: agent.named("process.wait"))
            process.send_signal(number)
            assert await process.wait() == 143
        assert script.killed_by == [number.name]
        assert len(agent.named("container.delete")) == 1

    with_agent(tmp_path, body)


def test_a_hangup_that_nohup_has_ignored_stays_ignored(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        script = Script(runs_until_killed=True)
        script.install(agent)

        def nohup() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        argv = ("run", "--rm", "--rootfs", "/r", "--", "x")
        async with running(agent, *argv, preexec_fn=nohup) as process:
            await until(lambda: agent.named("process.wait"))
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 143
        assert script.killed_by == ["SIGTERM"]

    with_agent(tmp_path, body)


def test_handlers_of_an_outer_block_are_there_again_behind_an_inner_one() -> None:
    """`vm run`: what has removed the VM on SIGTERM must do so while it is powered down, too."""
    before = signal.getsignal(signal.SIGTERM)

    async def scenario() -> None:
        with ending_on_signals():
            with Signals():
                pass
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(SECONDS)

    with pytest.raises(Interrupted):
        asyncio.run(scenario())
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_forwarding_ends_in_order_while_it_still_waits_for_an_agent(
    tmp_path: Path, number: signal.Signals
) -> None:
    async def scenario() -> None:
        here = tmp_path / "here.sock"
        nobody = f"unix:{tmp_path}/gcs.sock"
        argv = ("--wait", "600", "--address", nobody, "forward", f"{here}:web:80")
        async with asyncio.timeout(SECONDS), running(None, *argv) as process:
            await until(here.exists)
            process.send_signal(number)
            assert await process.wait() == 0
        assert not here.exists()

    asyncio.run(scenario())


def test_the_third_ctrl_c_kills(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        script = Script(runs_until_killed=True)
        script.install(agent)
        taken: list[int | str] = []

        def kill(params: Any) -> Any:
            taken.append(params.signal)
            return script._kill(params) if params.signal == "SIGKILL" else Empty()

        agent.handlers["process.kill"] = kill
        async with running(agent, "run", "--rm", "--rootfs", "/r", "--", "x") as process:
            await until(lambda: agent.named("process.wait"))
            for count in (1, 2, 3):
                process.send_signal(signal.SIGINT)
                await until(functools.partial(lambda wanted: len(taken) == wanted, count))
            await process.wait()
        assert taken == ["SIGINT", "SIGINT", "SIGKILL"]

    with_agent(tmp_path, body)


@pytest.mark.parametrize("stuck", ["container.create", "container.start"])
def test_interrupted_before_it_runs_nothing_is_left(tmp_path: Path, stuck: str) -> None:
    async def body(agent: FakeAgent) -> None:
        Script().install(agent)
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow(params: Any) -> Any:
            begun.set()
            await go_on.wait()
            return {"pid": 1}

        agent.handlers[stuck] = slow
        async with running(agent, "run", "--rootfs", "/r", "--", "x") as process:
            await begun.wait()
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
            assert agent.named("container.delete") == []
            go_on.set()
            assert await process.wait() == 143
            assert process.stderr is not None
            assert await process.stderr.read() == b""
        assert [call["force"] for call in agent.named("container.delete")] == [True]

    with_agent(tmp_path, body)


def test_ctrl_c_ends_events_quietly(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["events.subscribe"] = lambda params: {"last": 0, "dropped": 0}
        async with running(agent, "events", "-f") as process:
            await until(lambda: agent.subscribers)
            agent.publish(Event(1, "process.exited", 0, "c", "init", {"exit_code": 5, "\x1b]0;t\x07": "\n"}))
            assert process.stdout is not None
            line = await process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            assert process.stderr is not None
            assert await process.stderr.read() == b""
        assert line == rb"1970-01-01T00:00:00Z process.exited c/init exit_code=5 \x1b]0;t\x07=\n" + b"\n"

    with_agent(tmp_path, body)


# -- the terminal ---------------------------------------------------------------------------------


class Terminal:
    """A pty whose inner side is gcsctl's standard input, output and error."""

    def __init__(self, rows: int, cols: int) -> None:
        self.outer, self.inner = os.openpty()
        self.resize(rows, cols)
        self.before = termios.tcgetattr(self.inner)

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.inner)[3] & (termios.ICANON | termios.ECHO)

    @property
    def is_restored(self) -> bool:
        return termios.tcgetattr(self.inner) == self.before

    def popen(self) -> dict[str, int]:
        return {"stdin": self.inner, "stdout": self.inner, "stderr": self.inner}

    def close(self) -> None:
        os.close(self.outer)
        os.close(self.inner)


def tty_agent(agent: FakeAgent) -> tuple[bytearray, asyncio.Event]:
    """Scripts a terminal process that greets and then runs until the event is set; gets what is typed."""
    typed, leave = bytearray(), asyncio.Event()

    async def tty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"prompt> ")
        while data := await reader.read(100):
            typed.extend(data)

    async def wait(params: Any) -> Any:
        await leave.wait()
        return exit_record(6, tty=8)

    agent.handlers |= {
        "container.create": lambda params: {"pid": 1},
        "container.start": lambda params: {"pid": 1},
        "container.delete": lambda params: {},
        "process.wait": wait,
        "process.resize": lambda params: Empty(),
        "events.subscribe": lambda params: {"last": 0, "dropped": 0},
        "process.state": lambda params: {
            "container": "c",
            "process": "init",
            "status": "stopped",
            "pid": 1,
            "streams": {"tty": {"mode": "stream", "bytes": 8, "ended": True}},
        },
    }
    agent.streams["tty"] = tty
    return typed, leave


@dataclass(frozen=True, slots=True)
class Scene:
    """gcsctl at a terminal; ``typed`` is what the agent's process has got, which ``leave`` ends."""

    agent: FakeAgent
    terminal: Terminal
    process: asyncio.subprocess.Process
    typed: bytearray
    leave: asyncio.Event


def on_terminal(tmp_path: Path, body: Callable[[Scene], Awaitable[None]]) -> None:
    async def scenario(agent: FakeAgent) -> None:
        terminal = Terminal(33, 111)
        typed, leave = tty_agent(agent)
        argv = ("run", "--rm", "-it", "--rootfs", "/r", "--", "sh")
        try:
            async with running(agent, *argv, **terminal.popen()) as process:
                await until(lambda: terminal.is_raw)
                await body(Scene(agent, terminal, process, typed, leave))
                assert terminal.is_restored
        finally:
            terminal.close()

    with_agent(tmp_path, scenario)


def test_a_terminal_is_raw_typed_into_and_restored(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        os.write(scene.terminal.outer, b"ls\r\x03\x04")
        await until(lambda: bytes(scene.typed) == b"ls\r\x03\x04")
        scene.leave.set()
        assert await scene.process.wait() == 6
        assert os.read(scene.terminal.outer, 100) == b"prompt> "
        (created,) = scene.agent.named("container.create")
        assert created["stdio"]["terminal"] is True
        assert created["stdio"]["winsize"] == {"rows": 33, "cols": 111}
        assert created["spec"]["process"]["terminal"] is True

    on_terminal(tmp_path, body)


def test_the_terminals_size_follows(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        scene.terminal.resize(20, 50)
        scene.process.send_signal(signal.SIGWINCH)  # the kernel sends it only to a foreground process group
        wanted = {"container", "process", "winsize"}
        await until(lambda: scene.agent.named("process.resize")[-1:])
        await until(lambda: scene.agent.named("process.resize")[-1]["winsize"] == {"rows": 20, "cols": 50})
        assert set(scene.agent.named("process.resize")[-1]) >= wanted
        scene.leave.set()
        await scene.process.wait()

    on_terminal(tmp_path, body)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_restores_the_terminal_and_removes_the_container(
    tmp_path: Path, number: signal.Signals
) -> None:
    async def body(scene: Scene) -> None:
        scene.process.send_signal(number)
        assert await scene.process.wait() == 128 + number
        assert len(scene.agent.named("container.delete")) == 1

    on_terminal(tmp_path, body)


def test_a_terminal_is_raw_again_when_gcsctl_goes_on(tmp_path: Path) -> None:
    """Whoever stopped it gave the terminal to a shell meanwhile."""

    async def body(scene: Scene) -> None:
        termios.tcsetattr(scene.terminal.inner, termios.TCSANOW, scene.terminal.before)
        scene.process.send_signal(signal.SIGCONT)
        await until(lambda: scene.terminal.is_raw)
        scene.leave.set()
        assert await scene.process.wait() == 6

    on_terminal(tmp_path, body)


def test_a_misbehaving_agent_restores_the_terminal(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        for served in scene.agent.connections:
            served.writer.write(b"\xc1\xc1\xc1")
        assert await scene.process.wait() == 125
        shown = os.read(scene.terminal.outer, 1000)
        assert b"gcsctl:" in shown
        assert b"Traceback" not in shown

    on_terminal(tmp_path, body)
