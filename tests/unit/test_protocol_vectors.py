"""The golden frames of protocol/vectors, in both directions, whole, byte by byte and with bytes behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.connection import Connection, Role, State
from protocol.errors import Code, RemoteProtocolError, RpcError
from protocol.framing import Message, Notification, Request, Response, decode, encode
from protocol.limits import Limits
from protocol.method import Envelope
from protocol.methods import CANCEL, EVENT, METHODS, PROTOCOL_ERROR, Cancel
from protocol.scan import FrameScanner
from protocol.schema import from_wire, to_wire
from protocol.types import Event

VECTORS = Path(__file__).parent.parent.parent / "protocol" / "vectors"


def load(*names: str) -> list[Any]:
    return [
        pytest.param(case, id=f"{name}: {case['name']}")
        for name in names
        for case in json.loads((VECTORS / f"{name}.json").read_text())
    ]


MESSAGES = load("requests", "results", "errors", "notifications", "encodings")
FAULTS = load("faults")


def native(value: Any) -> Any:
    """What JSON stands for: ``{"$bin": hex}`` is bytes."""
    if isinstance(value, dict):
        if set(value) == {"$bin"}:
            return bytes.fromhex(value["$bin"])
        return {key: native(item) for key, item in value.items()}
    return [native(item) for item in value] if isinstance(value, list) else value


def message_of(case: dict[str, Any]) -> Message:
    [(kind, fields)] = native(case["message"]).items()
    message: Message = {"request": Request, "response": Response, "notification": Notification}[kind](
        **fields
    )
    return message


def same(left: object, right: object) -> bool:
    """Equal, also in type: to == alone, 1, 1.0 and True are one."""
    return left == right and repr(left) == repr(right)


@pytest.mark.parametrize("case", MESSAGES)
def test_bytes_mean_what_they_should(case: dict[str, Any]) -> None:
    frame, message = bytes.fromhex(case["bytes"]), message_of(case)
    assert same(decode(frame), message)
    for chunks in ([frame], [bytes([byte]) for byte in frame], [frame + b"\x94\x00"], [b"", frame + frame]):
        scanner = FrameScanner(Limits())
        found = None
        for chunk in chunks:
            assert found is None, "a frame came out before its last byte"
            scanner.feed(chunk)
            found = scanner.next_frame()
        assert found == frame


@pytest.mark.parametrize("case", [param for param in MESSAGES if param.values[0].get("canonical", True)])
def test_messages_become_exactly_these_bytes(case: dict[str, Any]) -> None:
    assert encode(message_of(case)).hex() == case["bytes"]


def test_encodings_that_are_not_canonical_say_so() -> None:
    for param in MESSAGES:
        case = param.values[0]
        if not case.get("canonical", True):
            assert encode(message_of(case)).hex() != case["bytes"], case["name"]


def outcome(case: dict[str, Any], size: int | None, behind: bytes = b"") -> tuple[str, int]:
    """The kind of the fault, and how many messages came before it."""
    scene = case.get("scene", {"role": "server", "before": []})
    connection = Connection(Role(scene["role"]))
    for direction, frame in scene["before"]:
        play(connection, direction, bytes.fromhex(frame))
    body, count = case.get("repeat", ["", 0])
    data = bytes.fromhex(case["bytes"]) + bytes.fromhex(body) * count + behind
    size = size or len(data)
    messages = 0
    try:
        for at in range(0, len(data), size):
            messages += len(connection.receive(data[at : at + size]))
        connection.receive(b"")
    except RemoteProtocolError as error:
        return f"{error.kind} and {connection.state}", messages
    return f"nothing wrong in {connection.state}", messages


def play(connection: Connection, direction: str, frame: bytes) -> None:
    if direction == "<":
        assert len(connection.receive(frame)) == 1
        return
    match decode(frame):
        case Request(msgid, method, params):
            assert connection.request(msgid, method, params) == frame
        case Response(msgid, None, result):
            assert connection.respond(msgid, result) == frame
        case other:
            pytest.fail(f"a scene has {other}")


@pytest.mark.parametrize("case", FAULTS)
def test_faults_have_their_kind_however_they_come(case: dict[str, Any]) -> None:
    wanted = (f"{case['fault']} and {State.CLOSED}", 0)
    assert outcome(case, None) == wanted
    assert outcome(case, 1) == wanted
    assert outcome(case, 7) == wanted
    assert outcome(case, None, behind=b"\x94\x00\x01\xa1x\x91\x80\xc1") == wanted


def test_every_kind_of_fault_has_a_vector() -> None:
    kinds = {param.values[0]["fault"] for param in FAULTS}
    wanted = "oversized depth malformed utf8 msgid direction state busy early_bytes"
    assert kinds == set(wanted.split())


def by_name(file: str) -> dict[str, Any]:
    return {param.values[0]["name"]: message_of(param.values[0]) for param in load(file)}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_request_and_a_result(name: str) -> None:
    request, response = by_name("requests")[name], by_name("results")[name]
    assert request.method == name
    arguments = to_wire(from_wire(METHODS[name].params, request.params))
    envelope = to_wire(from_wire(Envelope, request.params))
    for key, value in request.params.items():
        assert key in arguments or key in envelope, f"{key} is no argument of {name}"
        assert key in envelope or contains(arguments[key], value)
    assert contains(to_wire(from_wire(METHODS[name].result, response.result)), response.result)


def contains(decoded: Any, wire: Any) -> bool:
    """All of ``wire`` is in ``decoded``, which has the defaults beside it."""
    if isinstance(wire, dict):
        return all(key in decoded and contains(decoded[key], value) for key, value in wire.items())
    if isinstance(wire, list):
        return len(decoded) == len(wire) and all(map(contains, decoded, wire))
    return same(decoded, wire)


def test_every_error_code_has_a_vector() -> None:
    errors = [RpcError.from_wire(message.error) for message in by_name("errors").values()]
    assert {error.code for error in errors} == set(Code)
    assert {error.details.get("exec_error") for error in errors} == {None, "not_found", "not_executable"}


def test_notifications_have_their_shape() -> None:
    notes = by_name("notifications").values()
    assert {CANCEL, EVENT, PROTOCOL_ERROR} < {note.method for note in notes}
    for note in notes:
        if note.method == EVENT:
            assert from_wire(Event, note.params).seq > 0
        if note.method == CANCEL:
            assert from_wire(Cancel, note.params) == Cancel(2**32 - 1)
