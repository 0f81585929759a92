"""gcsctl run and exec, and what is said of a wrong command line."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import Code
from tests.fakes.fake_agent import FakeAgent, Script
from tests.gcsctl_process import MORE, SECONDS, Done, gcsctl, refusing, with_agent

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


# -- the command line -------------------------------------------------------------------------------


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
    "unknown command": (("frobnicate",), "there is no command 'frobnicate'"),
    "misspelt": (("delte",), "there is no command 'delte'; is it `delete`?"),
    "another tool's": (("ls",), "is it `ps`?"),
    "misspelt below": (("vm", "strat"), "is it `start`?"),
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
    assert time.monotonic() - started < 9, "an agent was waited for: that is 10 s"


@pytest.mark.parametrize(
    "command",
    [
        *("clock", "entropy", "resources", "online", "pressure", "shutdown", "vm grow"),
        *(
            "info",
            "ping",
            "events",
            "run",
            "create",
            "start",
            "state",
            "wait",
            "stop",
            "kill",
            "delete",
            "ps",
        ),
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
