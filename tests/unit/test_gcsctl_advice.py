"""Every way gcsctl can fail: one line on stderr that says what to do next, without waiting for nothing."""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.cli.advice import with_advice
from gcsagent.host.cli.common import UsageError
from gcsagent.host.errors import AgentSilent, ConnectFailed, HostError
from gcsagent.host.image.errors import Damaged, ImageError, Unsupported
from gcsagent.host.vm.errors import Interrupted, VmError
from protocol.errors import Code, ProtocolError, RpcError
from tests.fakes.fake_agent import FakeAgent
from tests.gcsctl_process import gcsctl, refusing, running, with_agent

ARGS = argparse.Namespace(command_name="gcsctl state", vm=None)


def kinds(base: type[Exception]) -> Iterator[type[Exception]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def advice(error: BaseException, args: argparse.Namespace = ARGS) -> str:
    line = with_advice("it failed", error, args)
    assert line.startswith("it failed")
    return line.removeprefix("it failed")


@pytest.mark.parametrize("code", Code)
def test_each_code_of_the_contract_has_its_advice(tmp_path: Path, code: Code) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["container.state"] = refusing(code, "it is so")
        done = await gcsctl(agent, "state", "web")
        assert (done.code, done.out, done.err.count("\n")) == (125, "", 1)
        assert done.err.startswith("gcsctl: it is so (")
        assert len(done.err) > len("gcsctl: it is so (...)\n")

    with_agent(tmp_path, body)


@pytest.mark.parametrize(
    "kind",
    [*kinds(HostError), *kinds(VmError), *kinds(ProtocolError), HostError],
    ids=lambda kind: kind.__name__,
)
def test_each_failure_of_this_side_has_its_advice(kind: type[Exception]) -> None:
    error = kind.__new__(kind)
    says_it = issubclass(kind, (UsageError, ImageError)) and kind not in (Damaged, Unsupported)
    assert bool(advice(error)) == (not says_it)


def test_what_says_what_to_do_is_left_alone() -> None:
    assert with_advice("see `gcsctl ps`", RpcError(Code.NOT_FOUND, "x"), ARGS) == "see `gcsctl ps`"


@pytest.mark.parametrize(
    "command, found",
    [("gcsctl storage trim", "storage ls"), ("gcsctl checkpoint rm", "checkpoint ls"), ("gcsctl logs", "ps")],
)
def test_what_is_not_found_is_listed_by(command: str, found: str) -> None:
    args = argparse.Namespace(command_name=command, vm="dev")
    assert f"`gcsctl --vm dev {found}`" in advice(RpcError(Code.NOT_FOUND, "x"), args)


@pytest.mark.parametrize("details", [{"field": "spec.root.path"}, {"errno": 2}])
def test_a_path_that_is_not_there_is_one_of_the_guest(details: dict[str, Any]) -> None:
    args = argparse.Namespace(command_name="gcsctl run", vm="dev")
    told = advice(RpcError(Code.NOT_FOUND, "x", **details), args)
    assert "in the guest, not on this host" in told
    assert "`gcsctl --vm dev run --help`" in told
    assert "lists what there is" not in told


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOSPC, errno.EIO])
def test_what_the_system_refuses(number: int) -> None:
    for failed in (ConnectFailed("unix:/x: no"), VmError("no state directory")):
        failed.__cause__ = OSError(number, os.strerror(number))
        assert ("root" in advice(failed)) == (number in (errno.EACCES, errno.EPERM))
    assert advice(OSError(number, os.strerror(number)))


def test_a_silent_agent_is_looked_into() -> None:
    assert "`gcsctl stacks`" in advice(AgentSilent("agent.ping", 5))
    assert advice(Interrupted.__new__(Interrupted))


@pytest.mark.parametrize(
    "address, words",
    [
        ("unix:/no/such/socket", "gcsagent --listen unix:/no/such/socket"),
        ("hvsock:/no/such/socket:5", "`gcsctl vm ls`"),
    ],
)
def test_a_socket_that_is_not_there_is_not_waited_for(address: str, words: str) -> None:
    started = time.monotonic()
    done = asyncio.run(gcsctl(None, "--address", address, "ping"))
    assert time.monotonic() - started < 5
    assert (done.code, done.out, done.err.count("\n")) == (125, "", 1)
    assert "there is no such socket" in done.err
    assert words in done.err


def test_with_wait_it_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "gcs.sock"
        async with running(None, "--address", f"unix:{path}", "--wait", "20", "ps") as process:
            assert process.stderr is not None
            agent = FakeAgent(path)
            agent.handlers["container.list"] = lambda params: {"containers": []}
            async with agent:
                out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
        assert out.startswith(b"CONTAINER")

    asyncio.run(scenario())


def test_nobody_behind_the_socket(tmp_path: Path) -> None:
    """A dead supervisor's socket refuses; so does, for a moment, that of one that is being started."""
    path = tmp_path / "gcs.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    done = asyncio.run(gcsctl(None, "--address", f"unix:{path}", "--wait", "0.3", "ping"))
    assert (done.code, done.out, done.err.count("\n")) == (125, "", 1)
    assert "no agent answered in 0.3 s" in done.err
    assert "Connection refused" in done.err
    assert "see that the agent runs" in done.err


def test_what_is_no_agent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
            await reader.read()
            writer.close()

        path = tmp_path / "ssh.sock"
        async with await asyncio.start_unix_server(answer, path):
            done = await gcsctl(None, "--address", f"unix:{path}", "ping")
        assert (done.code, done.err.count("\n")) == (125, 1)
        assert "see that the address is an agent's" in done.err

    asyncio.run(scenario())


# -- colours --------------------------------------------------------------------------------------

COLOURED = "\x1b[31mgcsctl:\x1b[0m no agent to talk to"


@pytest.mark.parametrize(
    "settings, coloured",
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals(settings: dict[str, str], coloured: bool) -> None:
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "GCS_ADDRESS")}
    main, side = os.openpty()
    with os.fdopen(main, "rb", buffering=0) as seen:
        try:
            argv = [sys.executable, "-m", "gcsagent.host", "ps"]
            env = {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm", **settings}
            done = subprocess.run(argv, env=env, stderr=side, stdout=subprocess.PIPE, timeout=20, check=False)
        finally:
            os.close(side)
        assert (done.returncode, done.stdout) == (125, b"")
        assert seen.read(65536).decode().startswith(COLOURED if coloured else COLOURED[5:12] + COLOURED[16:])
