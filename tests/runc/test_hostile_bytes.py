"""The agent against bytes that break the contract: one typed answer, a closed connection, nothing else."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Protocol

import msgpack
import pytest

VECTORS = Path(__file__).parent.parent.parent / "protocol" / "vectors"
TIMEOUT = 20.0
HELLO: bytes = msgpack.packb([0, 1, "agent.hello", [{"protocol_min": 1, "protocol_max": 1}]])


class Agent(Protocol):
    socket_path: str


def faults() -> list[Any]:
    """What a server refuses: all of its cases but those that race with an answer of its own."""
    cases = json.loads((VECTORS / "faults.json").read_text())
    wanted = [case for case in cases if case.get("scene", {"role": "server"})["role"] == "server"]
    settled = [case for case in wanted if len(case.get("scene", {}).get("before", [])) in (0, 2)]
    return [pytest.param(case, id=case["name"]) for case in settled]


def connect(agent: Agent) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(TIMEOUT)
    connection.connect(str(agent.socket_path))
    return connection


def greet(connection: socket.socket) -> None:
    connection.sendall(HELLO)
    unpacker = msgpack.Unpacker(raw=False)
    while True:
        unpacker.feed(connection.recv(65536))
        for message in unpacker:
            assert message[:3] == [1, 1, None]
            return


def rest_of(connection: socket.socket) -> list[Any]:
    """Every message until the agent closes."""
    unpacker = msgpack.Unpacker(raw=False)
    while True:
        try:
            data = connection.recv(65536)
        except ConnectionResetError:  # it closed with bytes of ours unread
            data = b""
        if not data:
            return list(unpacker)
        unpacker.feed(data)


def bytes_of(case: dict[str, Any]) -> bytes:
    body, count = case.get("repeat", ["", 0])
    data: bytes = bytes.fromhex(case["bytes"]) + bytes.fromhex(body) * count
    return data


@pytest.mark.parametrize("case", faults())
def test_a_fault_is_named_and_ends_the_connection(agent: Agent, case: dict[str, Any]) -> None:
    with connect(agent) as connection:
        if case.get("scene", {}).get("before"):
            greet(connection)
        connection.sendall(bytes_of(case))
        [farewell] = rest_of(connection)
    assert farewell[:2] == [2, "rpc.error"]
    assert farewell[2][0]["kind"] == case["fault"]
    assert farewell[2][0]["message"]
    with connect(agent) as another:
        greet(another)


IN_FRONT = {
    "a request answered at once": ["container.list", {}],
    "a request answered later": ["agent.ping", {}],
    "an unknown method": ["no.such", {}],
    "a wrong argument": ["container.state", {"container": 5}],
    "a subscription": ["events.subscribe", {}],
    "an attach": ["stream.attach", {"container": "none"}],
}


@pytest.mark.parametrize("name", IN_FRONT)
def test_a_fault_right_behind_a_request_is_seen(agent: Agent, name: str) -> None:
    method, params = IN_FRONT[name]
    with connect(agent) as connection:
        greet(connection)
        connection.sendall(msgpack.packb([0, 2, method, [params]]) + b"\xc1")
        farewell = rest_of(connection)[-1]
    assert farewell[:2] == [2, "rpc.error"]
    assert farewell[2][0]["kind"] == ("early_bytes" if method == "stream.attach" else "malformed")


def test_a_fault_stays_its_own(agent: Agent) -> None:
    """Somebody else's breach costs a bystander nothing, not even an answer under way."""
    with connect(agent) as bystander, connect(agent) as other:
        greet(bystander)
        greet(other)
        bystander.sendall(msgpack.packb([0, 2, "agent.info", [{}]]))
        other.sendall(b"\xc1")
        assert rest_of(other)
        unpacker = msgpack.Unpacker(raw=False)
        unpacker.feed(bystander.recv(65536))
        assert next(unpacker)[:3] == [1, 2, None]
