"""Dialling: retry until the agent is up, and the hybrid-vsock handshake in all its bad forms."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gcsagent.host import transport
from gcsagent.host.client import Client
from gcsagent.host.errors import ConnectFailed, HandshakeFailed, NotReady
from gcsagent.host.transport import dial
from protocol.address import HybridAddress, UnixAddress, parse_dial
from tests.fakes.fake_agent import FakeAgent, raw_server


def test_connect_waits_until_the_agent_is_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        agent = FakeAgent(tmp_path / "s")
        connecting = asyncio.create_task(Client.connect(agent.address, timeout=10))
        await asyncio.sleep(0.1)
        assert not connecting.done()
        async with agent:
            await (await connecting).aclose()

    asyncio.run(scenario())


def test_connect_names_the_last_reason_when_time_is_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(ConnectFailed, match=r"no agent answered in 0\.2 s: .*No such file"):
            await Client.connect(f"unix:{tmp_path}/nowhere", timeout=0.2)

    asyncio.run(scenario())


def test_a_stale_socket_is_refused_and_retried(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))

    async def scenario() -> None:
        with pytest.raises(NotReady, match="refused"):
            await dial(UnixAddress(str(path)))

    asyncio.run(scenario())


def test_a_full_backlog_is_not_mistaken_for_a_connection(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
            listener.bind(str(path))
            listener.listen(0)
            first.connect(str(path))
            with pytest.raises(NotReady):
                await dial(UnixAddress(str(path)))

    asyncio.run(scenario())


def test_what_waiting_cannot_mend_fails_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def scenario() -> None:
        async with asyncio.timeout(1):
            with pytest.raises(ConnectFailed, match="too long"):
                await Client.connect("unix:/" + "x" * 200, timeout=30)
            with pytest.raises(ConnectFailed, match="Not a directory"):
                await Client.connect(f"unix:{tmp_path}/file/s", timeout=30)

    asyncio.run(scenario())


def test_not_an_address() -> None:
    async def scenario() -> None:
        with pytest.raises(ValueError, match="an address is"):
            await Client.connect("tcp:1.2.3.4")

    asyncio.run(scenario())


async def handshake(tmp_path: Path, answer: list[bytes], *, pause: float = 0, timeout: float = 5) -> bytes:
    """Dials a VMM's socket that sends ``answer`` piece by piece; what the socket holds after OK."""

    async def vmm(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"CONNECT 1024\n"
        for piece in answer:
            await asyncio.sleep(pause)
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
        await reader.read()

    async with raw_server(tmp_path / "s", vmm) as path:
        sock = await dial(HybridAddress(path), handshake_timeout=timeout)
        with sock:
            rest = b""
            while data := await asyncio.get_running_loop().sock_recv(sock, 100):
                rest += data
            return rest


def test_the_handshake_leaves_the_agents_bytes_alone(tmp_path: Path) -> None:
    assert asyncio.run(handshake(tmp_path, [b"OK 1073741824\nfirst bytes"])) == b"first bytes"


def test_an_answer_in_pieces(tmp_path: Path) -> None:
    pieces = [b"O", b"K 1", b"0", b"24", b"\n", b"x"]
    assert asyncio.run(handshake(tmp_path, pieces, pause=0.005)) == b"x"


@pytest.mark.parametrize(
    "answer", [b"NO 1024\n", b"OK\n", b"OK x\n", b"\n", b"ok 1\n", b"OK 99999999999\n", b"\x1b[31mOK 1\n"]
)
def test_a_wrong_answer_is_a_typed_error_and_not_retried(tmp_path: Path, answer: bytes) -> None:
    with pytest.raises(HandshakeFailed) as caught:
        asyncio.run(handshake(tmp_path, [answer]))
    assert "\x1b" not in str(caught.value)


def test_an_answer_without_end_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(HandshakeFailed):
        asyncio.run(handshake(tmp_path, [b"OK " + b"1" * 100_000]))


@pytest.mark.parametrize("half", [b"", b"O", b"OK 10"])
def test_closed_before_ok_is_not_ready(tmp_path: Path, half: bytes) -> None:
    with pytest.raises(NotReady, match="closed before OK"):
        asyncio.run(handshake(tmp_path, [half]))


def test_a_late_answer_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="not answered"):
        asyncio.run(handshake(tmp_path, [b"OK 1\n"], pause=5, timeout=0.1))


@pytest.mark.parametrize("how", [NotReady, asyncio.CancelledError])
def test_who_gives_up_does_not_hang_up_before_the_answer(tmp_path: Path, how: type[BaseException]) -> None:
    """A VMM may not survive it."""

    async def scenario() -> None:
        asked, given_up, hung_up = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def vmm(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            asked.set()
            await given_up.wait()
            assert not reader.at_eof()
            writer.write(b"OK 1\n")
            await writer.drain()
            assert await reader.read() == b""
            hung_up.set()

        async with raw_server(tmp_path / "s", vmm) as path:
            limit = 0.05 if how is NotReady else 60
            dialling = asyncio.create_task(dial(HybridAddress(path), handshake_timeout=limit))
            await asked.wait()
            if how is asyncio.CancelledError:
                dialling.cancel()
            with pytest.raises(how):
                await dialling
            given_up.set()
            async with asyncio.timeout(5):
                await hung_up.wait()

    asyncio.run(scenario())


@pytest.mark.parametrize("answers", [True, False])
def test_not_even_at_the_end_of_its_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """As when gcsctl is interrupted. Whose answer does not come is not waited for long."""
    monkeypatch.setattr(transport, "_LAST_SECONDS", 20.0 if answers else 0.05)
    asked, ending = threading.Event(), threading.Event()
    path, hung_up = tmp_path / "s", select.POLLHUP | select.POLLRDHUP
    seen: list[list[tuple[int, int]]] = []

    def vmm() -> None:
        host, _ = listener.accept()
        with host:
            assert host.recv(100) == b"CONNECT 7000\n"
            asked.set()
            ending.wait(20)
            poll = select.poll()
            poll.register(host, hung_up)
            seen.append(poll.poll(100 if answers else 20_000))
            if answers:
                host.sendall(b"OK 1\n")
                assert host.recv(1) == b""

    async def scenario() -> None:
        dialling = asyncio.create_task(dial(HybridAddress(str(path), 7000)))
        await asyncio.to_thread(asked.wait)
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling
        ending.set()

    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor() as threads:
        listener.bind(str(path))
        listener.listen()
        serving = threads.submit(vmm)
        asyncio.run(scenario())
        serving.result(20)
    assert [bool(each) for each in seen] == [not answers]


def test_a_client_over_hybrid_vsock_retries_until_the_guest_listens(tmp_path: Path) -> None:
    attempts = 0

    async def scenario() -> None:
        async with FakeAgent(tmp_path / "agent") as agent:

            async def vmm(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                nonlocal attempts
                attempts += 1
                assert await reader.readline() == b"CONNECT 7000\n"
                if attempts < 3:
                    return
                writer.write(b"OK 1\n")
                await _splice(agent, reader, writer)

            async with raw_server(tmp_path / "vmm", vmm) as path:
                client = await Client.connect(parse_dial(f"hvsock:{path}:7000"), timeout=10)
                await client.aclose()

    asyncio.run(scenario())
    assert attempts == 3


async def _splice(agent: FakeAgent, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    inner, outer = await asyncio.open_unix_connection(agent.path)
    try:
        outer.write(await reader.read(65536))
        writer.write(await inner.read(65536))
        await reader.read()
    finally:
        outer.close()
        await outer.wait_closed()
