"""The monitor client against a QEMU that answers, refuses, stays silent, talks nonsense, or goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gcsagent.host.vm.errors import QmpClosed, QmpError
from gcsagent.host.vm.qmp import QmpClient, QmpEvent

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'
Answer = Callable[[dict[str, Any]], bytes]


def answered(command: dict[str, Any], value: object = None) -> bytes:
    return json.dumps({"return": value or {}, "id": command["id"]}).encode() + b"\n"


def talk(answer: Answer, body: Callable[[QmpClient, list[QmpEvent]], Awaitable[None]]) -> None:
    """Runs `body` with a client whose QEMU greets, accepts the handshake, then answers with `answer`."""

    async def peer(sock: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        writer.write(GREETING)
        async for line in reader:
            command = json.loads(line)
            handshake = command["execute"] == "qmp_capabilities"
            reply = answered(command) if handshake else answer(command)
            if reply == b"close":
                break
            writer.write(reply)
        writer.close()

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        serving = asyncio.create_task(peer(theirs))
        events: list[QmpEvent] = []
        client = await QmpClient.open(ours, events.append, timeout=5)
        try:
            await body(client, events)
        finally:
            client.close()
            # A client that leaves with unread bytes resets the connection.
            with contextlib.suppress(ConnectionResetError):
                await serving

    asyncio.run(scenario())


def test_commands_and_events() -> None:
    def answer(command: dict[str, Any]) -> bytes:
        event = b'{"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}, "timestamp": {}}\n'
        return event + answered(command, {"echo": command["arguments"]})

    async def body(client: QmpClient, events: list[QmpEvent]) -> None:
        assert await client.execute("query", {"a": 1}) == {"echo": {"a": 1}}
        assert events == [QmpEvent("SHUTDOWN", {"reason": "guest-shutdown"})]

    talk(answer, body)


def test_a_refusal_is_quoted() -> None:
    def answer(command: dict[str, Any]) -> bytes:
        error = {"class": "CommandNotFound", "desc": "The command x has not been found"}
        return json.dumps({"error": error, "id": command["id"]}).encode() + b"\n"

    async def body(client: QmpClient, events: list[QmpEvent]) -> None:
        with pytest.raises(QmpError, match=r"^QEMU refused: The command x has not been found$"):
            await client.execute("x")

    talk(answer, body)


def test_silence_ends_at_the_deadline_and_a_late_answer_harms_nobody() -> None:
    late: list[bytes] = []

    def answer(command: dict[str, Any]) -> bytes:
        if command["execute"] == "slow":
            late.append(answered(command, "late"))
            return b""
        return late.pop() + answered(command, "fast")

    async def body(client: QmpClient, events: list[QmpEvent]) -> None:
        with pytest.raises(QmpError, match=r"^QEMU did not answer slow within 0.05 s$"):
            await client.execute("slow", timeout=0.05)
        assert await client.execute("quick") == "fast"

    talk(answer, body)


@pytest.mark.parametrize(
    "reply,message",
    [
        (b"close", "QEMU closed its monitor"),
        (b"nonsense\n", "not JSON"),
        (b"[" * 500_000 + b"\n", "not JSON"),
        (b"[1]\n", "not an object"),
        (b"x" * (2 << 20), "more than 1048576 bytes"),
    ],
)
def test_a_broken_monitor_fails_what_is_in_flight_and_what_follows(reply: bytes, message: str) -> None:
    async def body(client: QmpClient, events: list[QmpEvent]) -> None:
        with pytest.raises(QmpError, match=message):
            await client.execute("query", timeout=5)
        with pytest.raises(QmpError, match=message):
            await client.execute("query")

    talk(lambda command: reply, body)


def test_an_answer_to_what_nobody_can_have_asked_harms_nobody() -> None:
    async def body(client: QmpClient, events: list[QmpEvent]) -> None:
        assert await client.execute("query", timeout=5) == "yes"

    talk(lambda command: b'{"return": {}, "id": [1]}\n' + answered(command, "yes"), body)


@pytest.mark.parametrize(
    "greeting,message", [(b"", "said nothing for 0.05 s"), (b"{}\n", "did not greet"), (b"x\n", "not JSON")]
)
def test_a_wrong_greeting(greeting: bytes, message: str) -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(greeting)
            with pytest.raises(QmpError, match=message):
                await QmpClient.open(ours, lambda event: None, timeout=0.05)

    asyncio.run(scenario())


def test_closing_fails_what_is_in_flight() -> None:
    async def body(client: QmpClient, events: list[QmpEvent]) -> None:
        asyncio.get_running_loop().call_soon(client.close)
        with pytest.raises(QmpClosed):
            await client.execute("query")

    talk(lambda command: b"", body)


def greeted(body: Callable[[QmpClient, socket.socket, socket.socket], Awaitable[None]]) -> None:
    """Runs `body` with a client and both ends of its socket; QEMU's part past the handshake is the body's."""

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        theirs.sendall(GREETING + answered({"id": 1}))
        with theirs:
            client = await QmpClient.open(ours, lambda event: None, timeout=5)
            try:
                assert json.loads(theirs.recv(65536))["execute"] == "qmp_capabilities"
                await body(client, ours, theirs)
            finally:
                client.close()

    asyncio.run(scenario())


def test_a_descriptor_goes_with_its_command() -> None:
    async def body(client: QmpClient, ours: socket.socket, theirs: socket.socket) -> None:
        given = os.memfd_create("given")
        asking = asyncio.create_task(client.execute("getfd", {"fdname": "x"}, fd=given))
        await asyncio.sleep(0)
        line, (taken,), _, _ = socket.recv_fds(theirs, 65536, 4)
        command = json.loads(line)
        theirs.sendall(answered(command))
        await asking
        assert (command["execute"], command["arguments"]) == ("getfd", {"fdname": "x"})
        assert os.fstat(taken) == os.fstat(given)
        os.close(taken)
        os.close(given)

    greeted(body)


def test_a_command_that_could_go_in_part_is_refused() -> None:
    async def body(client: QmpClient, ours: socket.socket, theirs: socket.socket) -> None:
        with pytest.raises(QmpError, match=r"^a command of \d+ bytes is too long for QEMU's monitor$"):
            await client.execute("first", {"filler": "x" * 40_000})
        theirs.sendall(answered({"id": 3}))
        await client.execute("second")

    greeted(body)


def test_what_was_said_before_a_reset_is_not_lost() -> None:
    """QEMU says why it ends, and exits with a command unread."""
    heard: list[QmpEvent] = []

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        theirs.sendall(GREETING + answered({"id": 1}))
        client = await QmpClient.open(ours, heard.append, timeout=5)
        theirs.recv(65536)
        unread = asyncio.create_task(client.execute("unread"))
        await asyncio.sleep(0)
        theirs.sendall(b'{"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}}\n')
        theirs.close()
        # One that meets the closed socket.
        with pytest.raises(QmpClosed):
            await client.execute("late")
        with pytest.raises(QmpClosed):
            await unread
        await client.finished(5)
        client.close()

    asyncio.run(scenario())
    assert [event.name for event in heard] == ["SHUTDOWN"]


def test_a_monitor_that_takes_no_more_is_named() -> None:
    async def body(client: QmpClient, ours: socket.socket, theirs: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        for fd in (0, None):
            with pytest.raises(QmpError, match=r"^QEMU does not read its monitor$"):
                await client.execute("getfd", fd=fd)

    greeted(body)
