"""Both ends of the contract's state machine, and the decoder of every method, fed with any bytes.

The same bytes must come to the same however they are cut; what decodes, encodes to what decodes the same;
nothing is raised but RemoteProtocolError and SchemaError.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import msgpack

from protocol.connection import Connection, Role, State
from protocol.errors import RemoteProtocolError, RpcError
from protocol.framing import Message, Notification, Request, Response, decode, encode
from protocol.limits import MAX_FRAME
from protocol.method import Envelope
from protocol.methods import ATTACH, HELLO, METHODS
from protocol.schema import SchemaError, from_wire, to_wire
from tests.fuzz import vectors
from tests.fuzz.target import Broken

Outcome = tuple[str, str, list[Message]]


class Codec:
    name, coverage = "codec", True

    def open(self, directory: Path) -> None:
        pass

    def close(self) -> None:
        pass

    def seeds(self) -> list[bytes]:
        """The first byte says which end it is, in which state, and how the rest is cut."""
        found = vectors.frames("requests", "results", "errors", "notifications", "encodings", "faults")
        return [bytes([number % 256]) + frame for number, frame in enumerate(found)]

    def execute(self, data: bytes) -> Hashable:
        how, data = data[:1] or b"\0", data[1:]
        role = Role.SERVER if how[0] & 1 else Role.CLIENT
        state = how[0] >> 1 & 3
        whole = _fed(role, state, [data])
        step = (1, 2, 3, 7, 64)[how[0] >> 3 & 3]
        cut = _fed(role, state, [data[at : at + step] for at in range(0, len(data), step)])
        if _shown(whole) != _shown(cut):
            raise Broken("cut otherwise, the same bytes come to something else")
        for message in whole[2]:
            _goes_round(message)
        return role, state, whole[:2], tuple(_decoded(message) for message in whole[2][:2])


def _begun(role: Role, state: int) -> Connection:
    connection = Connection(role)
    if state and role is Role.CLIENT:
        connection.request(1, HELLO, {})
        if state > 1:
            connection.receive(encode(Response(1, None, {})))
            connection.request(1, "agent.ping" if state == 2 else ATTACH, {})
    elif state:
        connection.receive(encode(Request(1, HELLO, {})))
        if state > 1:
            connection.respond(1, {})
            if state == 3:
                connection.receive(encode(Request(1, ATTACH, {})))
    return connection


def _fed(role: Role, state: int, pieces: list[bytes]) -> Outcome:
    connection = _begun(role, state)
    messages: list[Message] = []
    kind = ""
    try:
        for piece in pieces:
            messages += connection.receive(piece)
            if connection.unfinished > MAX_FRAME + (1 << 16) and connection.state is not State.STREAM:
                raise Broken("more is kept than a frame can have")
            if connection.state is State.CLOSED:
                connection.receive(b"")
            if connection.state is State.STREAM:
                break
    except RemoteProtocolError as error:
        kind = error.kind
        encode(Notification("rpc.error", error.to_wire()))
        if connection.state is not State.CLOSED:
            raise Broken(f"{connection.state} after a fault") from error
    return kind, str(connection.state), messages


def _shown(outcome: Outcome) -> str:
    """NaN equals itself here. A fault that what is behind it makes other, early bytes, is one of position."""
    kind, state, messages = outcome
    return repr((kind, state, messages))


def _goes_round(message: Message) -> None:
    again = decode(encode(message))
    if repr(again) != repr(message):
        raise Broken("a message is another one after encoding and decoding it")


def _decoded(message: Message) -> Any:
    if isinstance(message, Request):
        method = METHODS.get(message.method)
        if method is None:
            return message.method[:8]
        return message.method, _typed(method.params, message.params), _typed(Envelope, message.params)
    if isinstance(message, Response):
        RpcError.from_wire(message.error)
        return "response", tuple(_typed(method.result, message.result) for method in METHODS.values())
    return message.method[:8]


def _typed(kind: type, wire: Any) -> str:
    try:
        value: Any = from_wire(kind, wire)
    except SchemaError as error:
        return error.field
    msgpack.packb(to_wire(value))
    return "fits"
