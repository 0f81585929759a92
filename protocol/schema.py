"""Maps <-> frozen dataclasses, strictly.

A dataclass says what a message holds; this module turns a decoded map into it or names the first field
that is wrong. Unknown keys are ignored (that is how the contract grows); a missing or wrong-typed one is
an error. ``bool`` is not an ``int`` here. Decoders are made once per class, on first use, so that
importing the contract stays cheap. ``Annotated[T, check]`` adds a check: it is given the decoded value and
returns None, or what the value must be.
"""

from __future__ import annotations

import operator
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

from protocol.dataclass import is_always_the_same, is_record, is_required, names_of

T = TypeVar("T")
_Decoder = Callable[[Any, str], Any]
_Encoder = Callable[[Any], Any]
_Check = Callable[[Any], str | None]


class SchemaError(ValueError):
    """A map that does not fit its dataclass: ``field`` is its path, the message what it must be."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field!r} {problem}" if field else problem)
        self.field = field


def from_wire(cls: type[T], value: object, path: str = "") -> T:
    """``value`` as an instance of the dataclass ``cls``. Raises SchemaError."""
    decoded: T = (_decoders.get(cls) or _decoder_of(cls))(value, path)
    return decoded


def to_wire(value: Any) -> Any:
    """The plain value MessagePack carries; fields that are None are left out."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    return (_encoders.get(kind) or _encoder_of(kind))(value)


_PLAIN = frozenset({str, int, float, bool, bytes, type(None)})
"""Types that are what they are on the wire: most values are one, and are not looked at twice."""

_decoders: dict[Any, _Decoder] = {}
_encoders: dict[type, _Encoder] = {}
_depths: dict[Any, int | None] = {}


def depth_of(hint: Any) -> int | None:
    """Levels of arrays and maps in what has this type; None where they may be any number: in a map of Any."""
    if hint not in _depths:
        _depths[hint] = _find_depth(hint)
    return _depths[hint]


def _find_depth(hint: Any) -> int | None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or origin is dict:
        return None
    if origin is typing.Annotated:
        return depth_of(arguments[0])
    if isinstance(hint, type) and is_record(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        arguments = tuple(hints[name] for name in names_of(hint))
    below = [depth_of(argument) for argument in arguments if argument is not Ellipsis]
    known = [depth for depth in below if depth is not None]
    if len(known) < len(below):
        return None
    return max(known, default=0) + int(origin is tuple or (isinstance(hint, type) and is_record(hint)))


def _encoder_of(kind: type) -> _Encoder:
    encoder = _encoders[kind] = _make_encoder(kind)
    return encoder


def _make_encoder(kind: type) -> _Encoder:
    if issubclass(kind, Enum):
        return operator.attrgetter("_value_")
    if issubclass(kind, (list, tuple)):
        return lambda value: [item if type(item) in _PLAIN else to_wire(item) for item in value]
    if issubclass(kind, dict):
        return lambda value: {
            key: item if type(item) in _PLAIN else to_wire(item) for key, item in value.items()
        }
    if is_record(kind):
        return _record_encoder(names_of(kind))
    return lambda value: value


def _record_encoder(names: tuple[str, ...]) -> _Encoder:
    if len(names) < 2:  # attrgetter gives a tuple of two and more
        get: Callable[[Any], tuple[Any, ...]] = lambda value: tuple([getattr(value, name) for name in names])  # noqa: E731
    else:
        get = operator.attrgetter(*names)

    def encode(value: Any) -> dict[str, Any]:
        return {
            name: item if type(item) in _PLAIN else to_wire(item)
            for name, item in zip(names, get(value), strict=True)
            if item is not None
        }

    return encode


def _decoder_of(hint: Any) -> _Decoder:
    decoder = _decoders.get(hint)
    if decoder is None:
        decoder = _decoders[hint] = _make_decoder(hint)
    return decoder


def _make_decoder(hint: Any) -> _Decoder:
    if hint is Any:
        return lambda value, path: value
    if hint in _SCALARS:
        return _scalar(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _checked(_decoder_of(arguments[0]), arguments[1])
    if origin in (types.UnionType, typing.Union):
        return _union(arguments)
    if origin is tuple:
        return _sequence(arguments[0])
    if origin is dict:
        return _mapping(arguments[1])
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enumeration(hint)
    if isinstance(hint, type) and is_record(hint):
        return _record(hint)
    raise TypeError(f"the contract has no wire form for {hint!r}")


_SCALARS = {str: "a string", int: "an integer", bool: "true or false", float: "a number", bytes: "bytes"}


def _scalar(kind: type) -> _Decoder:
    wanted = _SCALARS[kind]

    def decode(value: Any, path: str) -> Any:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise SchemaError(path, f"must be {wanted}, not {_name_of(value)}")

    return decode


def _checked(decode: _Decoder, check: _Check) -> _Decoder:
    def decode_and_check(value: Any, path: str) -> Any:
        decoded = decode(value, path)
        problem = check(decoded)
        if problem is not None:
            raise SchemaError(path, problem)
        return decoded

    return decode_and_check


def _union(arguments: tuple[Any, ...]) -> _Decoder:
    options = [argument for argument in arguments if argument is not type(None)]
    decoders = [_decoder_of(option) for option in options]
    nullable = len(options) < len(arguments)

    def decode(value: Any, path: str) -> Any:
        if value is None and nullable:
            return None
        if len(decoders) == 1:
            return decoders[0](value, path)
        for option, decoder in zip(options, decoders, strict=True):
            if type(value) is option:
                return decoder(value, path)
        wanted = " or ".join(_SCALARS.get(option, str(option)) for option in options)
        raise SchemaError(path, f"must be {wanted}, not {_name_of(value)}")

    return decode


def _sequence(item: Any) -> _Decoder:
    decode_item = _decoder_of(item)

    def decode(value: Any, path: str) -> Any:
        if not isinstance(value, list):
            raise SchemaError(path, f"must be an array, not {_name_of(value)}")
        return tuple(decode_item(entry, f"{path}[{index}]") for index, entry in enumerate(value))

    return decode


def _mapping(item: Any) -> _Decoder:
    decode_item = _decoder_of(item)

    def decode(value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            raise SchemaError(path, f"must be a map, not {_name_of(value)}")
        for key in value:
            if not isinstance(key, str):
                raise SchemaError(path, "must have strings as keys")
        return {key: decode_item(entry, f"{path}.{key}") for key, entry in value.items()}

    return decode


def _enumeration(kind: type[Enum]) -> _Decoder:
    values = {member.value: member for member in kind}
    wanted = ", ".join(str(value) for value in values)

    def decode(value: Any, path: str) -> Any:
        if isinstance(value, str) and value in values:
            return values[value]
        raise SchemaError(path, f"must be one of {wanted}")

    return decode


def _record(cls: type) -> _Decoder:
    hints, names = typing.get_type_hints(cls, include_extras=True), names_of(cls)
    plan = [
        (name, _PLAIN_HINTS.get(hints[name]), _decoder_of(hints[name]), is_required(cls, name))
        for name in names
    ]
    known = frozenset(names)
    # What a map with none of them says: always the same, which can be shared, for it cannot be changed.
    nothing = cls() if is_always_the_same(cls) else None

    def decode(value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            raise SchemaError(path, f"must be a map, not {_name_of(value)}")
        if nothing is not None and known.isdisjoint(value):
            return nothing
        arguments: dict[str, Any] = {}
        for name, plain, decode_field, required in plan:
            if name in value:
                item = value[name]
                if type(item) is not plain:
                    item = decode_field(item, f"{path}.{name}" if path else name)
                arguments[name] = item
            elif required:
                raise SchemaError(f"{path}.{name}" if path else name, "is missing")
        return cls(**arguments)

    return decode


_PLAIN_HINTS: dict[Any, type] = {
    hint: kind for kind in (str, int, bool, float, bytes) for hint in (kind, kind | None)
}
"""Hints of which a value of the type is known to be right by its type alone."""


def _name_of(value: object) -> str:
    if value is None:
        return "nil"
    return {dict: "a map", list: "an array", **_SCALARS}.get(type(value), type(value).__name__)
