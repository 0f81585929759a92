"""Maps <-> dataclasses: strict where it matters, open where the contract grows."""

from __future__ import annotations

import types
import typing
from enum import StrEnum
from functools import cache
from typing import Annotated, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import checks, mountchecks, netchecks
from protocol.checks import Between
from protocol.dataclass import dataclass, field
from protocol.errors import RpcError
from protocol.families.agent import Pong, Welcome
from protocol.families.container import ContainerList
from protocol.framing import Response, decode, encode
from protocol.method import Envelope, Method
from protocol.methods import METHODS
from protocol.schema import SchemaError, depth_of, from_wire, to_wire


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Inner:
    size: Annotated[int, Between(1, 9)] = 1
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    flag: bool = False
    count: int | None = None
    ratio: float = 0.0
    blob: bytes = b""
    either: int | str = 0
    colour: Colour = Colour.RED
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    by_name: dict[str, Inner] = field(default_factory=dict)
    anything: Any = None


def test_what_is_absent_has_its_default() -> None:
    assert from_wire(Outer, {"name": "x"}) == Outer("x")


def test_everything_given_arrives() -> None:
    wire = {
        "name": "x",
        "flag": True,
        "count": 2**64 - 1,
        "ratio": 0.5,
        "blob": b"\0",
        "either": "seven",
        "colour": "blue",
        "inner": {"size": 9, "names": ["a", "b"]},
        "inners": [{"size": 2}, {}],
        "labels": {"a": "b"},
        "by_name": {"k": {"size": 3}},
        "anything": [1, {"x": None}],
    }
    value = from_wire(Outer, wire)
    assert value == Outer(
        name="x",
        flag=True,
        count=2**64 - 1,
        ratio=0.5,
        blob=b"\0",
        either="seven",
        colour=Colour.BLUE,
        inner=Inner(9, ("a", "b")),
        inners=(Inner(2), Inner()),
        labels={"a": "b"},
        by_name={"k": Inner(3)},
        anything=[1, {"x": None}],
    )
    assert from_wire(Outer, to_wire(value)) == value


def test_unknown_keys_are_ignored_at_every_depth() -> None:
    assert from_wire(Outer, {"name": "x", "later": object(), "inner": {"size": 2, "later": 1}}) == Outer(
        "x", inner=Inner(2)
    )


def test_a_number_may_be_written_as_an_integer() -> None:
    ratio = from_wire(Outer, {"name": "x", "ratio": 3}).ratio
    assert (ratio, type(ratio)) == (3.0, float)


@pytest.mark.parametrize(
    "wire, message",
    [
        ({}, "'name' is missing"),
        ({"name": None}, "'name' must be a string, not nil"),
        ({"name": b"x"}, "'name' must be a string, not bytes"),
        ({"name": 1}, "'name' must be a string, not an integer"),
        ({"name": ["x"]}, "'name' must be a string, not an array"),
        ({"name": "x", "flag": 1}, "'flag' must be true or false, not an integer"),
        ({"name": "x", "count": True}, "'count' must be an integer, not true or false"),
        ({"name": "x", "count": 1.0}, "'count' must be an integer, not a number"),
        ({"name": "x", "ratio": True}, "'ratio' must be a number, not true or false"),
        ({"name": "x", "blob": "text"}, "'blob' must be bytes, not a string"),
        ({"name": "x", "either": True}, "'either' must be an integer or a string, not true or false"),
        ({"name": "x", "either": None}, "'either' must be an integer or a string, not nil"),
        ({"name": "x", "colour": "green"}, "'colour' must be one of red, blue"),
        ({"name": "x", "colour": 1}, "'colour' must be one of red, blue"),
        ({"name": "x", "colour": ["red"]}, "'colour' must be one of red, blue"),
        ({"name": "x", "colour": None}, "'colour' must be one of red, blue"),
        ({"name": "x", "inner": []}, "'inner' must be a map, not an array"),
        ({"name": "x", "inner": None}, "'inner' must be a map, not nil"),
        ({"name": "x", "inner": {"size": 0}}, "'inner.size' must be between 1 and 9, not 0"),
        ({"name": "x", "inner": {"size": True}}, "'inner.size' must be an integer, not true or false"),
        ({"name": "x", "inner": {"names": ["a", 1]}}, "'inner.names[1]' must be a string, not an integer"),
        ({"name": "x", "inner": {"names": "ab"}}, "'inner.names' must be an array, not a string"),
        ({"name": "x", "inners": [{}, {"size": 10}]}, "'inners[1].size' must be between 1 and 9, not 10"),
        ({"name": "x", "inners": {}}, "'inners' must be an array, not a map"),
        ({"name": "x", "labels": {"a": 1}}, "'labels.a' must be a string, not an integer"),
        ({"name": "x", "labels": {1: "a"}}, "'labels' must have strings as keys"),
        ({"name": "x", "labels": []}, "'labels' must be a map, not an array"),
        ({"name": "x", "by_name": {"k": {"size": "1"}}}, "'by_name.k.size' must be an integer, not a string"),
        ([], "must be a map, not an array"),
        (None, "must be a map, not nil"),
        ("name", "must be a map, not a string"),
    ],
)
def test_the_first_wrong_field_is_named(wire: object, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        from_wire(Outer, wire)
    assert str(caught.value) == message
    assert message.startswith(f"{caught.value.field!r} ") or not caught.value.field


def test_a_path_can_start_elsewhere() -> None:
    with pytest.raises(SchemaError, match=r"'params\.inner\.size' must be"):
        from_wire(Outer, {"name": "x", "inner": {"size": 0}}, "params")


def test_a_class_the_wire_has_no_form_for_is_our_own_mistake() -> None:
    @dataclass(slots=True)
    class Wrong:
        moment: complex

    with pytest.raises(TypeError, match="no wire form"):
        from_wire(Wrong, {"moment": 1})


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_junk_in_arguments_is_a_schema_error_and_nothing_else(method: Method, data: st.DataObject) -> None:
    names = [*method.params.__dataclass_fields__, *Envelope.__dataclass_fields__]  # type: ignore[attr-defined]
    wire = data.draw(st.dictionaries(st.sampled_from(names), junk | st.just("web") | st.just({}), max_size=6))
    for cls in (method.params, method.result, Envelope):
        try:
            value: Any = from_wire(cls, wire)
        except SchemaError as error:
            assert str(error)  # noqa: PT017  either outcome is fine, a nameless error is not
        else:
            assert from_wire(cls, to_wire(value)) == value


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
# Addresses that are any text and yet addresses are few: much is drawn in vain.
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_every_result_survives_the_wire(method: Method, data: st.DataObject) -> None:
    value = data.draw(instances(method.result))
    message = decode(encode(Response(1, None, to_wire(value))))
    assert isinstance(message, Response)
    assert from_wire(method.result, message.result) == value
    if (depth := depth_of(method.result)) is not None:
        assert levels(message.result) <= depth


def levels(value: object) -> int:
    """Of arrays and maps."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if below is None else 1 + max(map(levels, below), default=0)


PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(0, 2**64 - 1),
    str: st.text(max_size=4),
    bool: st.booleans(),
    dict[str, Any]: st.dictionaries(st.text(max_size=4), st.none() | st.integers(0, 9), max_size=2),
}
VALID: dict[Any, st.SearchStrategy[Any]] = {
    checks.absolute_path: st.sampled_from(["/", "/mnt/a b"]),
    checks.identifier: st.sampled_from(["web", "c.1_2-x"]),
    checks.host_name: st.just("web"),
    checks.device: st.sampled_from(["8:0", "/dev/vdb"]),
    checks.ip_address: st.sampled_from(["10.0.0.1", "fe80::1"]),
    checks.sha256: st.just("0" * 64),
    mountchecks.exact_path: st.just("/run/a"),
    mountchecks.pci_path: st.just("0000:00:02.0"),
    mountchecks.root_hash: st.just("0" * 64),
    mountchecks.virtio_name: st.just("virtio3"),
    netchecks.ifname: st.just("eth0"),
    netchecks.mac: st.just("02:00:00:00:00:01"),
    netchecks.interface_address: st.sampled_from(["10.0.0.1/24", "fd00::1/64"]),
    netchecks.subnet: st.sampled_from(["10.0.0.0/24", "fd00::/64"]),
    netchecks.destination: st.sampled_from(["default", "10.0.0.0/24"]),
}
"""For checks that values made at random hardly ever pass."""


@cache
def instances(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type the contract can have, small ones, with every field set."""
    if hint in PLAIN:
        return PLAIN[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind, check = arguments
        if isinstance(check, Between):
            return st.integers(check.low, check.high)
        return VALID.get(check, instances(kind).filter(lambda value: check(value) is None))
    if origin in (types.UnionType, typing.Union):
        return st.one_of([st.none() if option is type(None) else instances(option) for option in arguments])
    if origin is tuple:
        return st.lists(instances(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=4), instances(arguments[1]), max_size=2)
    if issubclass(hint, StrEnum):
        return st.sampled_from(hint)
    hints = typing.get_type_hints(hint, include_extras=True)
    return st.builds(hint, **{name: instances(of) for name, of in hints.items()})


@settings(deadline=None)
@given(junk | st.fixed_dictionaries({}, optional={"code": junk, "message": junk, "details": junk}))
def test_any_error_a_peer_sends_can_be_shown(wire: object) -> None:
    error = RpcError.from_wire(wire)
    assert error.message
    assert str(error).startswith(error.code.value)


@pytest.mark.parametrize(
    "hint, depth",
    [(Pong, 1), (Welcome, 2), (ContainerList, None), (str, 0), (tuple[int, ...], 1), (dict[str, str], None)],
)
def test_the_depth_of_a_type_is_known_unless_it_has_somebodys_map(hint: object, depth: int | None) -> None:
    assert depth_of(hint) == depth
