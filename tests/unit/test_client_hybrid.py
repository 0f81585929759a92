"""The hybrid handshake going wrong on later connections, of the debug shell, and as gcsctl says it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from gcsagent.host.errors import ConnectFailed, HandshakeFailed
from gcsagent.host.shell import NoShell, Shell
from gcsagent.host.transport import dial
from protocol.address import parse_dial
from protocol.families.agent import Pong
from protocol.families.shell import OpenShell
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.fake_vmm import CLOSED, HALF, LATE, WRONG, Answer, FakeVmm
from tests.gcsctl_process import gcsctl

SHELL_PORT = 1025


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late OK is given up after 0.1 s, not five."""
    assert dial.__kwdefaults__ is not None
    monkeypatch.setitem(dial.__kwdefaults__, "handshake_timeout", 0.1)


def scenario(tmp_path: Path, body: Callable[[FakeAgent, FakeVmm], Awaitable[None]]) -> None:
    async def inner() -> None:
        async with FakeAgent(tmp_path / "agent") as agent, FakeVmm(tmp_path / "vmm", agent.path) as vmm:
            agent.handlers["agent.ping"] = lambda params: Pong(1, 5, 0)
            async with asyncio.timeout(20):
                await body(agent, vmm)

    asyncio.run(inner())


@pytest.mark.usefixtures("impatient")
def test_a_stream_is_attached_once_the_vmm_lets_it_through(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, vmm: FakeVmm) -> None:
        async def output(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"all of it")
            await writer.drain()
            await reader.read()

        agent.streams["stdout"] = output
        async with await Client.connect(vmm.address()) as client:
            vmm.script = [CLOSED, HALF, LATE]
            stream = await client.attach("web")
            assert (vmm.script, len(vmm.ports)) == ([], 5)
            assert await stream.read() == b"all of it"
            stream.close()

    scenario(tmp_path, body)


def test_a_stream_refused_by_the_vmm_costs_the_control_connection_nothing(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, vmm: FakeVmm) -> None:
        async with await Client.connect(vmm.address()) as client:
            vmm.script = [WRONG]
            with pytest.raises(HandshakeFailed, match="'NO 1024' to CONNECT"):
                await client.attach("web")
            assert (await client.ping()).uptime_ms == 5
            assert (len(vmm.ports), len(agent.connections)) == (2, 1)

    scenario(tmp_path, body)


@pytest.mark.usefixtures("impatient")
def test_a_stream_that_the_vmm_never_lets_through_is_given_up(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, vmm: FakeVmm) -> None:
        async with await Client.connect(vmm.address(), timeout=1) as client:
            vmm.script = [LATE] * 100
            with pytest.raises(ConnectFailed, match=r"no agent answered in 1 s: .*CONNECT is not answered"):
                await client.attach("web")

    scenario(tmp_path, body)


@pytest.mark.usefixtures("impatient")
def test_a_lost_control_connection_is_made_again_through_a_vmm_that_stumbles(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, vmm: FakeVmm) -> None:
        async with await Client.connect(vmm.address()) as client:
            vmm.script = [HALF, LATE, CLOSED]
            agent.drop_all()
            assert (await client.ping()).uptime_ms == 5
            assert (vmm.script, len(vmm.ports)) == ([], 5)

    scenario(tmp_path, body)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "answer, kind, words",
    [
        (WRONG, HandshakeFailed, "'NO 1024' to CONNECT"),
        (CLOSED, NoShell, "closed before OK"),
        (HALF, NoShell, "closed before OK"),
        (LATE, NoShell, "CONNECT is not answered in 0.1 s"),
    ],
)
def test_a_debug_shell_is_tried_once(
    tmp_path: Path, answer: Answer, kind: type[ConnectFailed], words: str
) -> None:
    async def body(agent: FakeAgent, vmm: FakeVmm) -> None:
        vmm.script = [answer]
        with pytest.raises(kind, match=words) as caught:
            await Shell.open(parse_dial(vmm.address(SHELL_PORT)), OpenShell(None, ()))
        assert isinstance(caught.value, NoShell) == ("not allowed there" in str(caught.value))
        assert (vmm.ports, agent.connections) == ([SHELL_PORT], [])

    scenario(tmp_path, body)


@pytest.mark.parametrize(
    "answer, words",
    [
        (WRONG, ("answered 'NO 1024' to CONNECT", "give the VMM's vsock socket as hvsock:PATH")),
        (b"\x1b[31mOK\n", ("to CONNECT", "hvsock:PATH")),
        (b"220 mail.example.org SMTP server ready\r\n", ("to CONNECT", "hvsock:PATH")),
        (CLOSED, ("no agent answered in 0.5 s", "nothing listens on that port", "gcsctl vm ls")),
        (HALF, ("no agent answered in 0.5 s", "closed before OK", "gcsctl vm ls")),
        (LATE, ("no agent answered in 0.5 s", "no answer yet", "gcsctl vm ls")),
        (b"OK 1\n", ("no agent answered in 0.5 s", "before saying hello", "gcsctl vm ls")),
        (b"OK 1\n\xc1", ("byte 0xc1", "see that the address is an agent's")),
    ],
)
@pytest.mark.parametrize("command", [["ps"], ["--json", "ping"]])
def test_gcsctl_says_it_in_one_line(
    tmp_path: Path, command: list[str], answer: Answer, words: tuple[str, ...]
) -> None:
    async def body(agent: FakeAgent, vmm: FakeVmm) -> None:
        vmm.script = [answer] * 1000
        started = time.monotonic()
        done = await gcsctl(None, "--address", vmm.address(), "--wait", "0.5", *command)
        assert time.monotonic() - started < 10
        assert (done.code, done.out, done.err.count("\n")) == (125, "", 1)
        assert [word for word in words if word not in done.err] == [], done.err
        assert done.err[:-1].isprintable()

    scenario(tmp_path, body)


@pytest.mark.parametrize(
    "answer, words", [(WRONG, "hvsock:PATH"), (CLOSED, "vm start --shell"), (HALF, "vm start --shell")]
)
def test_so_it_does_of_the_debug_shell(tmp_path: Path, answer: Answer, words: str) -> None:
    async def body(agent: FakeAgent, vmm: FakeVmm) -> None:
        vmm.script = [answer]
        done = await gcsctl(None, "--address", vmm.address(), "shell", "--", "true")
        assert (done.code, done.out, done.err.count("\n"), words in done.err) == (125, "", 1, True), done.err
        assert vmm.ports == [SHELL_PORT]

    scenario(tmp_path, body)
