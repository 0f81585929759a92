"""protocol.dataclass against the standard library's: the same classes, but for how they are made."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from protocol.dataclass import dataclass, field, replace
from protocol.families.agent import Hello
from protocol.methods import METHODS


@dataclass(frozen=True, slots=True)
class Ours:
    name: str
    size: int = 3
    parts: list[int] = field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Theirs:
    name: str
    size: int = 3
    parts: list[int] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Empty:
    pass


Both = pytest.mark.parametrize("kind", [Ours, Theirs])


@Both
def test_fields_defaults_and_their_own_lists(kind: Any) -> None:
    first, second = kind("a"), kind("a", 4, parts=[1])
    assert dataclasses.astuple(first) == ("a", 3, [])
    assert dataclasses.asdict(second) == {"name": "a", "size": 4, "parts": [1]}
    first.parts.append(1)
    assert kind("a").parts == []
    assert [field.name for field in dataclasses.fields(kind)] == ["name", "size", "parts"]
    assert dataclasses.replace(second, size=5) == replace(second, size=5) == kind("a", 5, [1])
    match second:
        case kind(name, size):
            assert (name, size) == ("a", 4)


@Both
@pytest.mark.parametrize(
    "arguments, named, said",
    [
        ((), {}, "missing 1 required positional argument: 'name'"),
        ((1, 2, 3, 4), {}, "takes from 2 to 4 positional arguments but 5 were given"),
        (("a",), {"colour": 1}, "got an unexpected keyword argument 'colour'"),
    ],
)
def test_wrong_arguments(kind: Any, arguments: Any, named: Any, said: str) -> None:
    with pytest.raises(TypeError) as caught:
        kind(*arguments, **named)
    assert str(caught.value) == f"{kind.__name__}.__init__() {said}"


@Both
def test_nothing_can_be_changed_or_added(kind: Any) -> None:
    one = kind("a")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'name'"):
        one.name = "b"
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'name'"):
        del one.name
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        one.other = 1
    assert not hasattr(one, "__dict__")


@Both
def test_equal_only_to_its_own_kind(kind: Any) -> None:
    assert kind("a") == kind("a")
    assert kind("a") != kind("b")
    assert kind("a") != ("a", 3, [])
    others: list[Any] = [Ours("a"), Theirs("a")]
    assert others[0] != others[1]
    with pytest.raises(TypeError, match="unhashable"):
        hash(kind("a"))
    assert hash(kind("a", 1, ())) == hash(kind("a", 1, ()))


@Both
def test_shown_copied_and_pickled(kind: Any) -> None:
    one = kind("a", 4, [kind("b")])
    inner = f"{kind.__name__}(name='b', size=3, parts=[])"
    assert repr(one) == f"{kind.__name__}(name='a', size=4, parts=[{inner}])"
    assert copy.deepcopy(one) == one == pickle.loads(pickle.dumps(one))
    assert copy.deepcopy(one).parts is not one.parts


def test_one_without_fields() -> None:
    assert Empty() == Empty()
    assert repr(Empty()) == "Empty()"


def test_nothing_is_compiled_before_it_is_needed() -> None:
    @dataclass(frozen=True, slots=True)
    class Late:
        value: int

    stub = Late.__init__
    assert (Late(1), Late(value=2)) == (Late(1), Late(2))
    assert Late.__init__ is not stub


def test_one_that_can_be_changed_is_equal_and_has_no_hash() -> None:
    @dataclass(slots=True)
    class Open:
        name: str

    one = Open("a")
    one.name = "b"
    assert one == Open("b")
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_without_eq_each_is_itself() -> None:
    @dataclass(slots=True, eq=False)
    class Own:
        name: str

    one = Own("a")
    assert (one == Own("a"), one == one, len({one})) == (False, True, 1)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="there is no other kind here"):
        dataclass(frozen=True, slots=False)
    with pytest.raises(ValueError, match=r"Shared.parts: want a default_factory"):

        @dataclass(frozen=True, slots=True)
        class Shared:
            parts: list[int] = []  # noqa: RUF012


def test_the_contract_is_made_of_them() -> None:
    kinds = {kind for method in METHODS.values() for kind in (method.params, method.result)}
    shared: Any = type(Hello(1, 1)).__eq__
    assert all(kind.__eq__ is shared for kind in kinds)
