"""Single values, addresses, errors and the method table."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import checks
from protocol.address import HybridAddress, UnixAddress, VsockAddress, parse_dial, parse_listen
from protocol.errors import Code, RemoteProtocolError, RpcError
from protocol.families.container import CreateContainer
from protocol.families.events import Subscribe
from protocol.families.process import KillProcess
from protocol.families.stream import Attach
from protocol.framing import Response, decode, encode
from protocol.limits import MAX_DEADLINE_MS, MAX_ID, MAX_STREAM_OFFSET
from protocol.method import Envelope
from protocol.methods import ATTACH, HELLO, METHODS
from protocol.schema import SchemaError, from_wire, to_wire
from protocol.types import Stdio, StreamMode, StreamSpec

# -- ids, paths, signals, numbers -------------------------------------------------------------------


@pytest.mark.parametrize("good", ["a", "0", "web-1", "A_b.c", "a..b", "x" * MAX_ID, "init"])
def test_ids_that_are_fine(good: str) -> None:
    assert from_wire(Attach, {"container": good}).container == good


@pytest.mark.parametrize(
    "bad, why",
    [
        ("", "must not be empty"),
        ("x" * (MAX_ID + 1), "at most 128 characters, not 129"),
        ("../x", "start with a letter or digit"),
        ("a/b", "must be letters"),
        (".hidden", "start with a letter"),
        ("-rf", "start with a letter"),
        ("_x", "start with a letter"),
        ("a b", "must be letters"),
        ("a\n", "must be letters"),
        ("a\0b", "must be letters"),
        ("é", "must be letters"),
        ("a²", "must be letters"),
        ("٣", "must be letters"),
    ],
)
def test_ids_that_are_not(bad: str, why: str) -> None:
    with pytest.raises(SchemaError, match=why) as caught:
        from_wire(Attach, {"container": bad})
    assert caught.value.field == "container"


@settings(deadline=None)
@given(st.text(max_size=200))
def test_an_id_is_one_path_component(text: str) -> None:
    if checks.identifier(text) is None:
        assert text.isascii()
        assert "/" not in text
        assert text not in {"", ".", ".."}
        assert len(text) <= MAX_ID


@pytest.mark.parametrize("good", ["/", "/srv/b", "/" + "x" * 4095, "/a b/ü"])
def test_paths_that_are_fine(good: str) -> None:
    assert from_wire(CreateContainer, {"container": "a", "bundle": good}).bundle == good


@pytest.mark.parametrize("bad", ["", "x", "./x", "/a\0b", "/" + "x" * 4096])
def test_paths_that_are_not(bad: str) -> None:
    with pytest.raises(SchemaError, match="'bundle' must"):
        from_wire(CreateContainer, {"container": "a", "bundle": bad})


@pytest.mark.parametrize(
    "good", [1, 9, 64, "KILL", "SIGKILL", "sigterm", "term", "RTMIN+1", "SIGRTMAX-14", "USR1"]
)
def test_signals_that_are_fine(good: int | str) -> None:
    assert from_wire(KillProcess, {"container": "a", "signal": good}).signal == good


@pytest.mark.parametrize("bad", [0, -1, 65, 2**63, "", "9", "KILL;rm", "K" * 40, True, 9.0, None, b"KILL"])
def test_signals_that_are_not(bad: object) -> None:
    with pytest.raises(SchemaError, match="'signal' must be"):
        from_wire(KillProcess, {"container": "a", "signal": bad})


@pytest.mark.parametrize("field, low, high", [("deadline_ms", 1, MAX_DEADLINE_MS)])
def test_deadlines_have_both_ends(field: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(from_wire(Envelope, {field: value}), field) == value
    for value in (low - 1, high + 1):
        with pytest.raises(SchemaError, match=f"must be between {low} and {high}, not {value}"):
            from_wire(Envelope, {field: value})


def test_offsets_fit_off_t() -> None:
    assert from_wire(Subscribe, {"after": MAX_STREAM_OFFSET}).after == MAX_STREAM_OFFSET
    for value in (-1, MAX_STREAM_OFFSET + 1):
        with pytest.raises(SchemaError, match="'after' must be between"):
            from_wire(Subscribe, {"after": value})


@pytest.mark.parametrize("bad", ["", "x" * (MAX_ID + 1), 1, b"x"])
def test_request_ids_that_are_not(bad: object) -> None:
    with pytest.raises(SchemaError, match="'request_id' must be"):
        from_wire(Envelope, {"request_id": bad})


STREAM = StreamSpec(StreamMode.STREAM)


@pytest.mark.parametrize(
    "stdio, problem",
    [
        (Stdio(), None),
        (Stdio(stdin=STREAM, stdout=STREAM, stderr=STREAM), None),
        (Stdio(terminal=True, tty=STREAM), None),
        (Stdio(terminal=True), None),
        (Stdio(tty=STREAM), "needs 'terminal'"),
        (Stdio(terminal=True, stdin=STREAM), "must be null"),
        (Stdio(terminal=True, tty=STREAM, stderr=STREAM), "must be null"),
    ],
)
def test_stdio_that_contradicts_itself(stdio: Stdio, problem: str | None) -> None:
    found = stdio.problem()
    assert (found is None) == (problem is None)
    assert (problem or "") in (found or "")


# -- addresses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, address",
    [
        ("unix:/run/x.sock", UnixAddress("/run/x.sock")),
        ("unix:rel:1", UnixAddress("rel:1")),
        ("vsock:3", VsockAddress(3, 1024)),
        ("vsock:3:99", VsockAddress(3, 99)),
        ("vsock:4294967295:4294967295", VsockAddress(4294967295, 4294967295)),
        ("hvsock:/v.sock", HybridAddress("/v.sock", 1024)),
        ("hvsock:/v.sock:7", HybridAddress("/v.sock", 7)),
        ("hvsock:/a:b", HybridAddress("/a:b", 1024)),
        ("hvsock:/a:b:7", HybridAddress("/a:b", 7)),
    ],
)
def test_addresses_to_dial(text: str, address: object) -> None:
    assert parse_dial(text) == address
    assert parse_dial(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/x",
        "tcp:1",
        "unix",
        "unix:",
        "VSOCK:3",
        " vsock:3",
        "vsock",
        "vsock:",
        "vsock:x",
        "vsock:-1",
        "vsock:²",
        "vsock:3:",
        "vsock:3:x",
        "vsock:3:4:5",
        "vsock:4294967296",
        "vsock:3:4294967296",
        "vsock:" + "1" * 5000,
        "hvsock:",
        "hvsock:/x:99999999999",
    ],
)
def test_addresses_nobody_can_dial(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"an address is unix:PATH|a vsock (CID|port) is a number up to 4294967295"
    ):
        parse_dial(text)


@pytest.mark.parametrize(
    "text, address",
    [
        ("unix:/x", UnixAddress("/x")),
        ("vsock", VsockAddress(None, 1024)),
        ("vsock:99", VsockAddress(None, 99)),
    ],
)
def test_addresses_to_listen_on(text: str, address: object) -> None:
    assert parse_listen(text) == address
    assert parse_listen(str(address)) == address


@pytest.mark.parametrize("text", ["", "unix:", "vsock:", "vsock:x", "vsock:3:4", "hvsock:/x", "tcp:1"])
def test_addresses_nobody_can_listen_on(text: str) -> None:
    with pytest.raises(ValueError, match=r"an address to listen on is|a vsock port is a number"):
        parse_listen(text)


# -- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", Code)
def test_an_error_survives_the_wire(code: Code) -> None:
    error = RpcError(code, "say what to do", field="spec.args", exit_status=1)
    message = decode(encode(Response(1, error.to_wire(), None)))
    assert isinstance(message, Response)
    again = RpcError.from_wire(message.error)
    assert (again.code, again.message, again.details) == (
        code,
        error.message,
        {"field": "spec.args", "exit_status": 1},
    )
    assert str(again) == f"{code.value}: say what to do"


def test_details_are_left_out_when_there_are_none() -> None:
    assert RpcError(Code.INTERNAL, "x").to_wire() == {"code": "INTERNAL", "message": "x"}


@pytest.mark.parametrize(
    "wire, code, message",
    [
        ("boom", Code.INTERNAL, "the peer sent an error that is not a map: str"),
        (False, Code.INTERNAL, "the peer sent an error that is not a map: bool"),
        ({}, Code.INTERNAL, "the peer gave no reason"),
        ({"code": "LATER", "message": "x"}, Code.INTERNAL, "x"),
        ({"code": ["NOT_FOUND"], "message": 5}, Code.INTERNAL, "the peer gave no reason"),
        ({"code": "NOT_FOUND", "message": "x", "details": "y"}, Code.NOT_FOUND, "x"),
        ({"code": "NOT_FOUND", "message": "x", "details": {1: 2}}, Code.NOT_FOUND, "x"),
    ],
)
def test_a_strange_error_is_still_an_error(wire: object, code: Code, message: str) -> None:
    error = RpcError.from_wire(wire)
    assert (error.code, error.message, error.details) == (code, message, {})


def test_a_protocol_error_names_its_kind() -> None:
    assert RemoteProtocolError("depth", "too deep").to_wire() == {"kind": "depth", "message": "too deep"}


# -- the method table -------------------------------------------------------------------------------


def records_of(hint: Any) -> set[type]:
    """The dataclasses a result is made of, at every depth."""
    found: set[type] = set()
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        found.add(hint)
        for field_hint in typing.get_type_hints(hint).values():
            found |= records_of(field_hint)
    for argument in getattr(hint, "__args__", ()):
        found |= records_of(argument)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_well_formed(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert name.count(".") == 1
    assert method.mutating == bool(method.commit), "exactly the mutating methods have a commit point"
    assert method.deadline_ms is None or 0 < method.deadline_ms <= MAX_DEADLINE_MS
    arguments = {field.name for field in dataclasses.fields(method.params)}
    assert not arguments & {field.name for field in dataclasses.fields(Envelope)}
    for cls in records_of(method.params) | records_of(method.result):
        assert cls.__dataclass_params__.frozen, cls  # type: ignore[attr-defined]
        assert hasattr(cls, "__slots__"), cls


def test_only_waiting_and_moving_bytes_is_unbounded() -> None:
    assert {name for name, method in METHODS.items() if method.deadline_ms is None} == {
        "agent.logs",
        "archive.get",
        "archive.put",
        "forward.close_write",
        "forward.wait",
        "agent.upgrade_status",
        "container.wait",
        "process.wait",
        "shell.wait",
    }


def test_the_two_methods_that_change_a_connections_state_exist() -> None:
    assert {HELLO, ATTACH} <= set(METHODS)


def test_fields_that_are_none_stay_off_the_wire() -> None:
    assert to_wire(Envelope()) == {}
    assert to_wire(Subscribe(after=0)) == {"after": 0}
    assert to_wire(Attach("web")) == {
        "container": "web",
        "process": "init",
        "stream": "stdout",
        "take": False,
        "passive": False,
    }
    assert type(to_wire(Attach("web"))["stream"]) is str
