"""gcsctl as a user meets it: a real process against a scripted agent."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.cli.common import describe_oom
from protocol.errors import Code, RpcError
from protocol.families.agent import Pong
from protocol.method import Empty
from protocol.types import Event, Oom, OomScope, OomVictim, Reason
from tests.fakes.fake_agent import FakeAgent, Script, exit_record

SECONDS = 20.0
MORE = "`gcsctl agent-logs --tail 20` has more"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@contextlib.asynccontextmanager
async def running(
    agent: FakeAgent | None, *argv: str, **popen: Any
) -> AsyncIterator[asyncio.subprocess.Process]:
    """gcsctl with ``argv``, killed if the test leaves it behind."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GCS_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment |= {"GCS_ADDRESS": agent.address} if agent is not None else {}
    pipe = asyncio.subprocess.PIPE
    streams = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, **popen}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gcsagent.host", *argv, env=environment, **streams
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def gcsctl(agent: FakeAgent | None, *argv: str, data: bytes | None = None) -> Done:
    popen = {} if data is None else {"stdin": subprocess.PIPE}
    async with asyncio.timeout(SECONDS), running(agent, *argv, **popen) as process:
        out, err = await process.communicate(data)
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())


def with_agent(tmp_path: Path, body: Callable[[FakeAgent], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with FakeAgent(tmp_path / "gcs.sock") as agent:
            await body(agent)

    asyncio.run(scenario())


def refusing(code: Code, message: str, **details: Any) -> Callable[[Any], Any]:
    def refuse(params: Any) -> Any:
        raise RpcError(code, message, **details)

    return refuse


def container_state(params: Any) -> dict[str, Any]:
    init = {
        "container": "c",
        "process": "init",
        "status": "stopped",
        "pid": 42,
        "args": ["sh", "-c", "echo \x1b[31mred"],
        "exit": {
            "exit_code": 137,
            "signal": 9,
            "reason": "signalled",
            "pid": 42,
            "started_at_ns": 1,
            "exited_at_ns": 2,
        },
    }
    return {
        "container": "c",
        "status": "stopped",
        "pid": 42,
        "bundle": "/b",
        "created_at_ns": 1,
        "processes": [init],
    }


# -- run and exec ---------------------------------------------------------------------------------


def test_run_shows_the_output_and_returns_the_exit_code(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        Script(stdout=b"to out\n", stderr=b"to err\n", code=7).install(agent)
        done = await gcsctl(agent, "run", "--rootfs", "/r", "--id", "web", "--", "sh", "-c", "x")
        assert done == Done(7, "to out\n", "to err\n")
        (created,) = agent.named("container.create")
        assert created["container"] == "web"
        assert created["spec"]["process"]["args"] == ["sh", "-c", "x"]
        assert created["spec"]["root"] == {"path": "/r", "readonly": False}
        assert created["stdio"]["stdin"] == {"mode": "null"}
        assert agent.named("container.delete") == []

    with_agent(tmp_path, body)


@pytest.mark.parametrize("code", [0, 255, 137])
def test_exit_codes_pass_through(tmp_path: Path, code: int) -> None:
    async def body(agent: FakeAgent) -> None:
        Script(code=code).install(agent)
        assert (await gcsctl(agent, "run", "--rm", "--rootfs", "/r", "--", "x")).code == code
        assert [call["force"] for call in agent.named("container.delete")] == [True]

    with_agent(tmp_path, body)


@pytest.mark.parametrize("code", [-1, 256, 1 << 40])
def test_an_exit_code_no_process_has_is_255(tmp_path: Path, code: int) -> None:
    async def body(agent: FakeAgent) -> None:
        Script(code=code).install(agent)
        assert (await gcsctl(agent, "run", "--rootfs", "/r", "--", "x")).code == 255

    with_agent(tmp_path, body)


def test_detached_prints_the_id_and_keeps_a_log(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        Script(runs_until_killed=True).install(agent)
        done = await gcsctl(agent, "run", "-d", "--rm", "--id", "web", "--rootfs", "/r", "--", "x")
        assert done == Done(0, "web\n", "")
        (created,) = agent.named("container.create")
        assert created["auto_delete"] is True
        assert created["stdio"]["stdout"] == {"mode": "spool", "when_full": "drop_oldest"}
        assert agent.named("stream.attach") == []
        done = await gcsctl(agent, "--json", "run", "-d", "--rootfs", "/r", "--", "x")
        document = json.loads(done.out)
        assert document["pid"] == 42
        assert len(document["container"]) == 12

    with_agent(tmp_path, body)


def test_a_log_beside_the_output_is_a_tee(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        Script(stdout=b"shown").install(agent)
        assert await gcsctl(agent, "run", "--log", "--rootfs", "/r", "--", "x") == Done(0, "shown", "")
        stdout = agent.named("container.create")[0]["stdio"]["stdout"]
        assert stdout == {"mode": "spool", "when_full": "drop_oldest", "tee": True}

    with_agent(tmp_path, body)


def test_exec_detached_with_a_log_is_not_forgotten(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        Script().install(agent)
        assert (await gcsctl(agent, "exec", "-d", "--log", "web", "--", "x")).code == 0
        assert (await gcsctl(agent, "exec", "-d", "web", "--", "x")).code == 0
        logged, plain = agent.named("process.exec")
        assert logged["stdio"]["stdout"] == {"mode": "spool", "when_full": "drop_oldest"}
        assert (logged["auto_delete"], plain["auto_delete"]) == (False, True)
        assert plain["stdio"]["stdout"] == {"mode": "null"}

    with_agent(tmp_path, body)


def test_fifos_are_not_attached_to(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        Script(stderr=b"seen").install(agent)
        fifos = "--fifo", "stdin=/run/in", "--fifo", "stdout=/run/out"
        done = await gcsctl(agent, "run", *fifos, "--rootfs", "/r", "--", "x")
        assert done == Done(0, "", "seen")
        stdio = agent.named("container.create")[0]["stdio"]
        assert stdio["stdin"] == {"mode": "fifo", "path": "/run/in"}
        assert stdio["stdout"] == {"mode": "fifo", "path": "/run/out"}
        assert [each["stream"] for each in agent.named("stream.attach")] == ["stderr"]

    with_agent(tmp_path, body)


def test_stdin_is_piped_through_to_its_end(tmp_path: Path) -> None:
    data = os.urandom(600_000).hex()

    async def body(agent: FakeAgent) -> None:
        script = Script(echo=True)
        script.install(agent)
        done = await gcsctl(agent, "run", "-i", "--rootfs", "/r", "--", "cat", data=data.encode())
        assert done == Done(0, data, "")
        assert script.stdin_end == len(data)
        assert agent.named("container.create")[0]["stdio"]["stdin_once"] is True

    with_agent(tmp_path, body)


def test_exec_sends_only_what_was_given_and_forgets_the_process(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        Script(stdout=b"x", code=3).install(agent)
        done = await gcsctl(agent, "exec", "-e", "A=1", "-u", "5:6", "-w", "/w", "web", "--", "ls", "-l")
        assert done == Done(3, "x", "")
        (sent,) = agent.named("process.exec")
        assert sent["spec"] == {
            "args": ["ls", "-l"],
            "terminal": False,
            "env": ["A=1"],
            "cwd": "/w",
            "user": {"uid": 5, "gid": 6},
        }
        assert agent.named("process.delete") == [{"container": "web", "process": sent["process"]}]

    with_agent(tmp_path, body)


@pytest.mark.parametrize("kind, code", [("not_found", 127), ("not_executable", 126), ("else", 125), (5, 125)])
def test_what_cannot_be_executed(tmp_path: Path, kind: Any, code: int) -> None:
    async def body(agent: FakeAgent) -> None:
        Script().install(agent)
        agent.handlers["process.exec"] = refusing(Code.NOT_FOUND, "no 'x' in there", exec_error=kind)
        done = await gcsctl(agent, "exec", "web", "--", "x")
        assert (done.code, done.out) == (code, "")
        assert done.err.startswith("gcsctl: no 'x' in there (")

    with_agent(tmp_path, body)


def test_a_container_that_does_not_start_is_removed(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        Script().install(agent)
        agent.handlers["container.start"] = refusing(Code.INTERNAL, "no", runtime_error="runc: oops")
        done = await gcsctl(agent, "run", "--rootfs", "/r", "--id", "web", "--", "x")
        assert done == Done(125, "", f"gcsctl: no: runc: oops ({MORE})\n")
        assert agent.named("container.delete") == [{"container": "web", "force": True}]

    with_agent(tmp_path, body)


@pytest.mark.parametrize(
    "message, runtime, line",
    [
        ("the runtime failed: create: one two", "one\n\ttwo\n", "the runtime failed: create: one two"),
        ("failed: " + "x" * 1000, "x" * 4000, "failed: " + "x" * 1000),
        ("no such program", "exec: one\n two", "no such program: exec: one two"),
        ("no such program", " \n", "no such program"),
    ],
)
def test_the_runtimes_words_are_said_once(tmp_path: Path, message: str, runtime: str, line: str) -> None:
    async def body(agent: FakeAgent) -> None:
        Script().install(agent)
        agent.handlers["process.exec"] = refusing(Code.INTERNAL, message, runtime_error=runtime)
        assert await gcsctl(agent, "exec", "web", "--", "x") == Done(125, "", f"gcsctl: {line} ({MORE})\n")

    with_agent(tmp_path, body)


def test_lost_output_is_not_passed_off_as_success(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"half")
            writer.write_eof()
            await reader.read()

        Script(stdout=b"half and half").install(agent)
        agent.streams["stdout"] = cut
        done = await gcsctl(agent, "run", "--rootfs", "/r", "--", "x")
        assert (done.code, done.out) == (125, "half")
        assert done.err.startswith("gcsctl: stdout: the connection ended after 4 of 13 bytes")

    with_agent(tmp_path, body)


def test_closed_and_full_standard_descriptors(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        Script(stdout=b"hello", code=3).install(agent)
        line = '"$0" -m gcsagent.host run -i --rootfs /r -- x'
        codes = {"<&- >&-": 3, "2>&- >&-": 3, ">/dev/full": 125}
        for redirection, code in codes.items():
            environment = {**os.environ, "GCS_ADDRESS": agent.address, "PYTHONPATH": os.getcwd()}
            shell = await asyncio.create_subprocess_exec(
                "/bin/sh", "-c", f"{line} {redirection}", sys.executable, env=environment
            )
            async with asyncio.timeout(SECONDS):
                assert await shell.wait() == code, redirection

    with_agent(tmp_path, body)


def test_json_puts_the_exit_record_on_stderr(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        Script(stdout=b"mine", code=4).install(agent)
        done = await gcsctl(agent, "exec", "--json", "web", "--", "x")
        assert (done.code, done.out) == (4, "mine")
        assert json.loads(done.err)["exit_code"] == 4

    with_agent(tmp_path, body)


# -- signals --------------------------------------------------------------------------------------


async def until(condition: Callable[[], object]) -> None:
    """Polls: what is waited for happens in another process."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


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


def on_terminal(
    tmp_path: Path,
    body: Callable[
        [FakeAgent, Terminal, asyncio.subprocess.Process, bytearray, asyncio.Event], Awaitable[None]
    ],
) -> None:
    async def scenario(agent: FakeAgent) -> None:
        terminal = Terminal(33, 111)
        typed, leave = tty_agent(agent)
        argv = ("run", "--rm", "-it", "--rootfs", "/r", "--", "sh")
        try:
            async with running(agent, *argv, **terminal.popen()) as process:
                await until(lambda: terminal.is_raw)
                await body(agent, terminal, process, typed, leave)
                assert terminal.is_restored
        finally:
            terminal.close()

    with_agent(tmp_path, scenario)


def test_a_terminal_is_raw_typed_into_and_restored(tmp_path: Path) -> None:
    async def body(
        agent: FakeAgent,
        terminal: Terminal,
        process: asyncio.subprocess.Process,
        typed: bytearray,
        leave: asyncio.Event,
    ) -> None:
        os.write(terminal.outer, b"ls\r\x03\x04")
        await until(lambda: bytes(typed) == b"ls\r\x03\x04")
        leave.set()
        assert await process.wait() == 6
        assert os.read(terminal.outer, 100) == b"prompt> "
        (created,) = agent.named("container.create")
        assert created["stdio"]["terminal"] is True
        assert created["stdio"]["winsize"] == {"rows": 33, "cols": 111}
        assert created["spec"]["process"]["terminal"] is True

    on_terminal(tmp_path, body)


def test_the_terminals_size_follows(tmp_path: Path) -> None:
    async def body(
        agent: FakeAgent,
        terminal: Terminal,
        process: asyncio.subprocess.Process,
        typed: bytearray,
        leave: asyncio.Event,
    ) -> None:
        terminal.resize(20, 50)
        process.send_signal(signal.SIGWINCH)  # the kernel sends it only to a foreground process group
        wanted = {"container", "process", "winsize"}
        await until(lambda: agent.named("process.resize")[-1:])
        await until(lambda: agent.named("process.resize")[-1]["winsize"] == {"rows": 20, "cols": 50})
        assert set(agent.named("process.resize")[-1]) >= wanted
        leave.set()
        await process.wait()

    on_terminal(tmp_path, body)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_restores_the_terminal_and_removes_the_container(
    tmp_path: Path, number: signal.Signals
) -> None:
    async def body(
        agent: FakeAgent,
        terminal: Terminal,
        process: asyncio.subprocess.Process,
        typed: bytearray,
        leave: asyncio.Event,
    ) -> None:
        process.send_signal(number)
        assert await process.wait() == 128 + number
        assert len(agent.named("container.delete")) == 1

    on_terminal(tmp_path, body)


def test_a_misbehaving_agent_restores_the_terminal(tmp_path: Path) -> None:
    async def body(
        agent: FakeAgent,
        terminal: Terminal,
        process: asyncio.subprocess.Process,
        typed: bytearray,
        leave: asyncio.Event,
    ) -> None:
        for served in agent.connections:
            served.writer.write(b"\xc1\xc1\xc1")
        assert await process.wait() == 125
        shown = os.read(terminal.outer, 1000)
        assert b"gcsctl: " in shown
        assert b"Traceback" not in shown

    on_terminal(tmp_path, body)


# -- the other commands ---------------------------------------------------------------------------

EVIL = "echo \x1b[31mred"
PROCESS = {
    "pid": 213,
    "ns_pid": 7,
    "ppid": 1,
    "uid": 0,
    "process": "sh-1",
    "state": "S",
    "command": "sh",
    "running": True,
    "created_by_runtime": True,
    "zombie": False,
    "threads": 1,
    "started_at_ns": 1_764_000_000_000_000_000,
    "cpu_us": 1_250_000,
    "rss_bytes": 3 << 19,
}


def test_ps_of_a_container_asks_until_it_has_all(tmp_path: Path) -> None:
    dead = {"running": False, "created_by_runtime": False, "zombie": True, "process": "", "state": "Z"}
    pages = {
        0: {"processes": [PROCESS], "left_out": 1},
        213: {"processes": [{**PROCESS, **dead, "pid": 214, "ns_pid": 0, "rss_bytes": 0}]},
    }

    async def body(agent: FakeAgent) -> None:
        agent.handlers["container.processes"] = lambda params: pages[params.after]
        done = await gcsctl(agent, "ps", "c")
        assert done.code == 0, done.err
        header, one, two = (line.split() for line in done.out.splitlines())
        assert " ".join(header) == "PID NSPID PPID UID PROCESS STATE AGE CPU RSS COMMAND"
        assert " ".join(one[:6] + one[7:]) == "213 7 1 0 sh-1 S 1.25 1.5 MiB sh"
        assert " ".join(two[:7] + two[8:]) == "214 - 1 0 - Z zombie 1.25 0 B sh"
        document = json.loads((await gcsctl(agent, "ps", "--json", "c")).out)
        assert [(each["pid"], each["zombie"]) for each in document] == [(213, False), (214, True)]

    with_agent(tmp_path, body)


def test_wait_kill_delete_start(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers |= {
            "container.wait": lambda params: exit_record(137, signal=9),
            "container.kill": lambda params: Empty(),
            "container.delete": lambda params: {},
            "container.start": lambda params: {"pid": 8},
            "container.pause": lambda params: Empty(),
            "container.resume": lambda params: Empty(),
        }
        assert await gcsctl(agent, "pause", "c") == Done(0, "", "")
        assert await gcsctl(agent, "resume", "c") == Done(0, "", "")
        assert agent.named("container.pause") == agent.named("container.resume") == [{"container": "c"}]
        assert await gcsctl(agent, "wait", "c") == Done(137, "", "")
        done = await gcsctl(agent, "wait", "--json", "c")
        assert (done.code, json.loads(done.out)["signal"]) == (137, 9)
        assert await gcsctl(agent, "kill", "-s", "usr1", "c") == Done(0, "", "")
        assert await gcsctl(agent, "kill", "-s", "9", "c") == Done(0, "", "")
        assert [call["signal"] for call in agent.named("container.kill")] == ["USR1", 9]
        assert await gcsctl(agent, "delete", "--force", "c") == Done(0, "", "")
        assert agent.named("container.delete") == [{"container": "c", "force": True}]
        assert json.loads((await gcsctl(agent, "--json", "start", "c")).out) == {"container": "c", "pid": 8}

    with_agent(tmp_path, body)


OOM = Oom(OomScope.CONTAINER, "/gcs/c", "/gcs/c", 3, 1, (OomVictim(42, "init", "sh \x1b[2J"),))


def test_want_of_memory_is_said_in_one_line(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        killed = dataclasses.replace(exit_record(137, signal=9), reason=Reason.OOM, oom=OOM)
        agent.handlers["container.wait"] = lambda params: killed
        what = "the limit of /gcs/c was reached; 1 killed: init (pid 42), 3 so far\n"
        wanted = Done(137, "", f"gcsctl: c was killed for want of memory: {what}")
        assert await gcsctl(agent, "wait", "c") == wanted
        agent.handlers["container.wait"] = lambda params: dataclasses.replace(exit_record(6), oom=OOM)
        wanted = Done(6, "", f"gcsctl: processes of c were killed for want of memory: {what}")
        assert await gcsctl(agent, "wait", "c") == wanted
        done = await gcsctl(agent, "wait", "--json", "c")
        assert (done.err, json.loads(done.out)["oom"]["victims"][0]["pid"]) == ("", 42)

    with_agent(tmp_path, body)


def test_a_signal_goes_to_init_to_an_exec_or_to_all(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers |= {"container.kill": lambda _: Empty(), "process.kill": lambda _: Empty()}
        assert await gcsctl(agent, "kill", "-a", "-s", "rtmin+3", "c") == Done(0, "", "")
        assert await gcsctl(agent, "kill", "-p", "p1", "c") == Done(0, "", "")
        assert agent.named("container.kill") == [{"container": "c", "signal": "RTMIN+3", "all": True}]
        assert agent.named("process.kill") == [{"container": "c", "process": "p1", "signal": "SIGTERM"}]
        done = await gcsctl(agent, "kill", "-a", "-p", "p1", "c")
        assert (done.code, done.out) == (125, "")
        assert "--all" in done.err

    with_agent(tmp_path, body)


@pytest.mark.parametrize(
    "oom, shown",
    [
        (OOM, "the limit of /gcs/c was reached; 1 killed: init (pid 42), 3 so far"),
        (Oom(OomScope.MACHINE, "/gcs/c", "", 1, 1), "the whole guest ran out; 1 killed"),
        (Oom(OomScope.ANCESTOR, "/gcs/c", "/gcs", 1, 1), "the limit of /gcs was reached; 1 killed"),
        (Oom(cgroup="/gcs/c", kills=2, new=2), "in /gcs/c; 2 killed"),
        (
            Oom(cgroup="/c", kills=2, new=2, victims=(OomVictim(7, "", "cat"), OomVictim(8))),
            "in /c; 2 killed: cat (pid 7), a process (pid 8)",
        ),
    ],
)
def test_whose_memory_it_was_is_named(oom: Oom, shown: str) -> None:
    assert describe_oom(oom) == shown


def test_what_the_guest_says_cannot_drive_the_terminal(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers |= {
            "container.list": lambda params: {"containers": [container_state(None)]},
            "container.state": container_state,
            "container.processes": lambda params: {"processes": [{**PROCESS, "command": EVIL}]},
            "container.start": refusing(Code.INTERNAL, "evil \x1b]52;c;x\x07\nsecond line \u202e"),
        }
        for argv in (("ps",), ("ps", "c"), ("state", "c")):
            done = await gcsctl(agent, *argv)
            assert done.code == 0
            assert r"echo \x1b[31mred" in done.out
            assert "\x1b" not in done.out
        done = await gcsctl(agent, "start", "c")
        assert done.err == f"gcsctl: evil \\x1b]52;c;x\\x07\\nsecond line \\u202e ({MORE})\n"
        document = json.loads((await gcsctl(agent, "--json", "ps")).out)
        assert document[0]["processes"][0]["args"][2] == "echo \x1b[31mred"

    with_agent(tmp_path, body)


def test_state_shows_what_the_runtime_says_and_where_it_differs(tmp_path: Path) -> None:
    view = {"status": "paused", "pid": 4, "created_at_ns": 10**9, "init_started_at_ns": 2 * 10**9}

    async def body(agent: FakeAgent) -> None:
        agent.handlers["container.state"] = lambda params: {
            **container_state(None),
            "runtime_view": {**view, "differences": ["the agent has it as running, the runtime as paused"]},
        }
        done = await gcsctl(agent, "state", "c")
        assert agent.named("container.state") == [{"container": "c", "ask_runtime": True}]
        lines = dict(line.split(":", 1) for line in done.out.splitlines() if "process" not in line)
        assert lines["runtime says"].strip() == "paused, pid 4, created 1970-01-01T00:00:01Z"
        assert lines["init made"].strip() == "1970-01-01T00:00:02Z"
        assert lines["DIFFERENCE"].strip() == "the agent has it as running, the runtime as paused"

    with_agent(tmp_path, body)


def test_ping(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["agent.ping"] = lambda params: Pong(3, 5000, 200)
        done = await gcsctl(agent, "ping")
        assert done.out.startswith(f"{agent.address}: up 5.0 s, generation 3, loop lag 0.2 ms, round trip ")
        document = json.loads((await gcsctl(agent, "ping", "--json")).out)
        assert (document["generation"], document["loop_lag_us"]) == (3, 200)

    with_agent(tmp_path, body)


def test_attach_needs_streams(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["process.state"] = lambda params: container_state(None)["processes"][0]
        done = await gcsctl(agent, "attach", "c")
        assert done.code == 125
        assert "no streams to attach to" in done.err

    with_agent(tmp_path, body)


BAD_LINES = {
    "no address": (("ps",), "set GCS_ADDRESS"),
    "bad address": (("--address", "tcp:x", "ps"), "an address is"),
    "both": (("--address", "unix:/x", "--vm", "y", "ps"), "not both"),
    "slash in id": (("--address", "unix:/x", "state", "../x"), "must be letters"),
    "empty id": (("--address", "unix:/x", "state", ""), "must not be empty"),
    "long id": (("--address", "unix:/x", "state", "a" * 300), "at most 128"),
    "bad signal": (("--address", "unix:/x", "kill", "-s", "no/pe", "c"), "signal's name or number"),
    "bad size": (("--address", "unix:/x", "update", "--memory", "64T", "c"), "like 64M"),
    "no cpu": (("--address", "unix:/x", "update", "--cpus", "nan", "c"), "from 0.01 to 8192"),
    "bad cpu list": (("--address", "unix:/x", "update", "--cpuset-cpus", "2-1", "c"), "like 0-2,7"),
    "bad device": (("--address", "unix:/x", "update", "--io-read-bps", "vda:1", "c"), "MAJOR:MINOR"),
    "no update": (("--address", "unix:/x", "update", "c"), "nothing to update"),
    "signal 0": (("--address", "unix:/x", "kill", "-s", "0", "c"), "between 1 and 64"),
    "half a user": (("--address", "unix:/x", "exec", "-u", "root:", "c", "--", "x"), "USER:GROUP"),
    "no command": (("--address", "unix:/x", "exec", "c"), "give a command"),
    "no such stream": (("--address", "unix:/x", "run", "--fifo", "tty=/x", "--", "x"), "STREAM=PATH"),
    "no log here": (("--address", "unix:/x", "exec", "--log", "c", "--", "x"), "--log goes with -d"),
    "unknown command": (("frobnicate",), "invalid choice"),
    "unknown option": (("--address", "unix:/x", "ps", "--frobnicate"), "unrecognized"),
    "cannot exist": (("--address", "unix:/dev/null/x", "ps"), "Not a directory"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_mistakes_are_one_line_and_125(name: str) -> None:
    argv, expected = BAD_LINES[name]
    started = time.monotonic()
    done = asyncio.run(gcsctl(None, *argv))
    assert done.code == 125
    assert done.out == ""
    assert done.err.startswith("gcsctl: ")
    assert done.err.count("\n") == 1
    assert expected in done.err
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "command",
    [
        *("info", "ping", "events", "run", "create", "start", "state", "wait", "kill", "delete", "ps"),
        *("exec", "attach", "vm run", "pause", "resume", "stats", "update", "restore"),
        *("checkpoint create", "checkpoint ls", "checkpoint rm"),
        *("image ls", "image inspect", "image load", "image rm"),
    ],
)
def test_help_has_an_example(command: str) -> None:
    done = asyncio.run(gcsctl(None, *command.split(), "--help"))
    assert done.code == 0
    assert "example: gcsctl" in done.out
    assert command.split()[-1] in done.out.partition("example: ")[2]


CHECKPOINT = {
    "checkpoint": "web-1",
    "container": "web",
    "path": "/run/gcs/checkpoints/web-1",
    "created_at_ns": 1,
    "size_bytes": 3 << 20,
    "leave_running": True,
}


def test_checkpoints(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers |= {
            "container.checkpoint": lambda params: CHECKPOINT,
            "container.restore": lambda params: {"pid": 8},
            "checkpoint.list": lambda params: {"checkpoints": [CHECKPOINT]},
            "checkpoint.delete": lambda params: Empty(),
        }
        made = await gcsctl(agent, "checkpoint", "create", "--leave-running", "--file-locks", "web", "web-1")
        assert made == Done(0, "web-1\n", "")
        [wanted] = agent.named("container.checkpoint")
        assert (wanted["container"], wanted["checkpoint"]) == ("web", "web-1")
        chosen = ("leave_running", "tcp_established", "ext_unix_sk", "shell_job", "file_locks")
        assert [wanted[name] for name in chosen] == [True, False, False, False, True]
        done = await gcsctl(agent, "checkpoint", "ls")
        assert re.search(r"web-1 +web +3.0 MiB .* /run/gcs/checkpoints/web-1\n", done.out), done
        done = await gcsctl(agent, "checkpoint", "ls", "--json")
        assert json.loads(done.out)[0]["size_bytes"] == 3 << 20
        assert await gcsctl(agent, "restore", "--id", "b", "web-1") == Done(0, "", "")
        assert await gcsctl(agent, "restore", "--path", "/srv/web-1") == Done(0, "", "")
        first, second = agent.named("container.restore")
        assert (first["checkpoint"], first["container"]) == ("web-1", "b")
        assert (second["path"], "container" in second) == ("/srv/web-1", False)
        done = await gcsctl(agent, "restore")
        assert (done.code, "NAME, or --path" in done.err) == (125, True)
        assert await gcsctl(agent, "checkpoint", "rm", "web-1") == Done(0, "", "")
        assert agent.named("checkpoint.delete") == [{"checkpoint": "web-1"}]

    with_agent(tmp_path, body)


def test_stats(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        found = {
            "container": "c",
            "time_ns": 1,
            "memory": {
                "current": 3 << 20,
                "limit": 1 << 30,
                "peak": 2048,
                "swap": 1 << 20,
                "swap_limit": 2 << 20,
            },
            "cpu": {"usage_us": 1_500_000, "throttled_us": 250_000, "limit": 0.5},
            "pids": {"current": 2},
            "memory_pressure": {"some_avg10": 0.25},
            "io": {"limits": [{"device": "8:0", "write_bps": 1 << 20, "write_iops": 70}]},
        }
        agent.handlers["container.stats"] = lambda params: found
        shown = await gcsctl(agent, "stats", "c")
        assert [line.split() for line in shown.out.splitlines()] == [
            ["WHAT", "NOW", "LIMIT", "PEAK", "PRESSURE"],
            ["memory", "3.0", "MiB", "1.0", "GiB", "2.0", "KiB", "0.2", "%"],
            ["working", "set", "-", "-", "-", "-"],
            ["swap", "1.0", "MiB", "2.0", "MiB", "-", "-"],
            ["cpu", "1.500", "s,", "throttled", "0.250", "s", "0.5", "CPUs", "-", "-"],
            ["pids", "2", "-", "-", "-"],
            ["read", "-", "-", "-", "-"],
            ["written", "-", "8:0", "1.0", "MiB/s,", "8:0", "70/s", "-", "-"],
        ]
        document = json.loads((await gcsctl(agent, "stats", "--json", "c")).out)
        assert document["memory"]["swap_limit"] == 2 << 20
        assert document["io_pressure"] is None

    with_agent(tmp_path, body)


def test_update(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["container.update"] = lambda params: Empty()
        assert await gcsctl(agent, "update", "--memory", "64M", "--cpus", "0.5", "c") == Done(0, "", "")
        assert await gcsctl(agent, "update", "--pids", "7", "--memory", "2048k", "c") == Done(0, "", "")
        assert agent.named("container.update") == [
            {"container": "c", "memory_bytes": 64 << 20, "cpus": 0.5, "io": []},
            {"container": "c", "memory_bytes": 2 << 20, "pids": 7, "io": []},
        ]
        argv = "--memory-swap -1 --memory-reservation 1M --cpu-shares 512 --cpuset-cpus 0-1 --cpuset-mems 0"
        argv += " --pids -1 --io-weight 100 --io-read-bps 8:0:1M --io-read-iops /dev/vdb:5"
        argv += " --io-write-bps 8:0:0 --io-write-iops 8:0:7"
        done = await gcsctl(agent, "update", "--json", *argv.split(), "c")
        assert done.code == 0
        assert agent.named("container.update")[2] == {
            "container": "c",
            "memory_swap_bytes": -1,
            "memory_reservation_bytes": 1 << 20,
            "cpu_shares": 512,
            "cpuset_cpus": "0-1",
            "cpuset_mems": "0",
            "pids": -1,
            "io_weight": 100,
            "io": [
                {"device": "8:0", "read_bps": 1 << 20, "write_bps": 0, "write_iops": 7},
                {"device": "/dev/vdb", "read_iops": 5},
            ],
        }
        assert json.loads(done.out)["pids"] == -1

    with_agent(tmp_path, body)
