"""Dataclasses with slots, made in a fraction of the time and memory the standard library takes.

dataclasses.dataclass writes and compiles six methods for every class, and importing it brings ``inspect``
with it. The contract has some 150 classes, of which one agent uses a few: on an emulated CPU, compiling
their methods was a third of an agent's start. Here comparison, hash, representation and the refusal to
change are shared, ``__init__`` is compiled when it is called for the first time, and what the functions of
``dataclasses`` look for is made when one of them looks. To a type checker all of it is dataclasses' own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

TYPE_CHECKING = False  # typing itself is half a megabyte, and PID 1 does without
if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass  # re-exported, as the two below
    from dataclasses import field as field
    from dataclasses import replace as replace
    from typing import Any
else:

    def dataclass(*, slots: bool, frozen: bool = False, eq: bool = True) -> Callable[[type], type]:
        """dataclasses.dataclass for these alone, without ``__post_init__``, InitVar and bases."""
        if not slots:
            raise TypeError("want slots=True: there is no other kind here")
        shared = {**_SHARED, **(_EQUAL if eq else {}), **(_FROZEN if frozen else {})}
        if eq and not frozen:
            shared["__hash__"] = None
        return lambda bare: _make(bare, shared)

    class field:
        """dataclasses.field for ``default_factory`` alone."""

        __slots__ = ("default_factory",)

        def __init__(self, *, default_factory: Callable[[], Any]) -> None:
            self.default_factory = default_factory

    def replace(record: Any, /, **changes: Any) -> Any:
        """dataclasses.replace for classes made here."""
        return type(record)(**{name: getattr(record, name) for name in type(record).__slots__} | changes)


class _Missing:
    """A field's default when it has none."""


def is_record(cls: type) -> bool:
    """Whether the class was made here."""
    return _DEFAULTS in cls.__dict__


def names_of(cls: Any) -> tuple[str, ...]:
    """The fields of a class made here, in order."""
    names: tuple[str, ...] = cls.__match_args__
    return names


def is_required(cls: type, name: str) -> bool:
    """Whether a value of a class made here cannot be made without this field."""
    return getattr(cls, _DEFAULTS)[name] is _Missing


def is_always_the_same(cls: type) -> bool:
    """Whether a value of a class made here can be made of nothing, and shared once it has been."""
    defaults = getattr(cls, _DEFAULTS).values()
    return not any(default is _Missing or _is_factory(default) for default in defaults)


_DEFAULTS = "__record_defaults__"


class _Standard:
    """An attribute that dataclasses' functions look for, which takes its time, for whoever asks for it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, _instance: object, cls: Any) -> Any:
        import dataclasses

        told = [
            (name, cls.__annotations__[name], _standard_field(dataclasses, default))
            for name, default in getattr(cls, _DEFAULTS).items()
        ]
        frozen = "__delattr__" in cls.__dict__
        twin: Any = dataclasses.make_dataclass(
            cls.__name__, told, namespace={"__doc__": ""}, init=False, repr=False, eq=False, frozen=frozen
        )
        for name in _STANDARD:
            setattr(cls, name, getattr(twin, name))
        return getattr(cls, self._name)


def _standard_field(dataclasses: Any, default: Any) -> Any:
    if default is _Missing:
        return dataclasses.field()
    if _is_factory(default):
        return dataclasses.field(default_factory=default.default_factory)
    return dataclasses.field(default=default)


def _is_factory(default: Any) -> bool:
    """Also of the standard library's own kind."""
    return hasattr(type(default), "default_factory")


def _make(bare: type, shared: dict[str, Any]) -> type:
    names = tuple(bare.__annotations__)
    namespace = {name: value for name, value in bare.__dict__.items() if name not in _NOT_COPIED}
    namespace[_DEFAULTS] = {name: namespace.pop(name, _Missing) for name in names}
    for name, default in namespace[_DEFAULTS].items():
        if type(default).__hash__ is None:
            raise ValueError(f"{bare.__name__}.{name}: want a default_factory, or it would be everybody's")
    namespace.update(shared, __slots__=names, __match_args__=names, __qualname__=bare.__qualname__)
    cls: Any = type(bare)(bare.__name__, bare.__bases__, namespace)

    def __init__(self: Any, *arguments: Any, **named: Any) -> None:
        cls.__init__ = _compiled_init(cls)
        cls.__init__(self, *arguments, **named)

    cls.__init__ = __init__
    made: type = cls
    return made


def _compiled_init(cls: type) -> Callable[..., None]:
    names: dict[str, Any] = {"_set": object.__setattr__, "_unset": object()}
    parameters, lines = ["self"], []
    for name, default in getattr(cls, _DEFAULTS).items():
        value = name
        if default is _Missing:
            parameters.append(name)
        elif _is_factory(default):
            names[f"_make_{name}"] = default.default_factory
            parameters.append(f"{name}=_unset")
            value = f"_make_{name}() if {name} is _unset else {name}"
        else:
            names[f"_default_{name}"] = default
            parameters.append(f"{name}=_default_{name}")
        lines.append(f" _set(self, {name!r}, {value})\n")
    exec(f"def __init__({', '.join(parameters)}):\n{''.join(lines) or ' pass'}", names)
    init: Callable[..., None] = names["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    return init


_getters: dict[type, Callable[[Any], tuple[Any, ...]]] = {}


def _values(self: Any) -> tuple[Any, ...]:
    get = _getters.get(type(self))
    if get is None:
        names = self.__slots__
        # attrgetter gives a tuple of two names and more.
        get = operator.attrgetter(*names) if len(names) > 1 else _getter_of_few(names)
        _getters[type(self)] = get
    return get(self)


def _getter_of_few(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda value: tuple([getattr(value, name) for name in names])


def _set_values(self: Any, values: tuple[Any, ...]) -> None:
    for name, value in zip(self.__slots__, values, strict=True):
        object.__setattr__(self, name, value)


def _repr(self: Any) -> str:
    shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
    return f"{type(self).__qualname__}({shown})"


def _eq(self: Any, other: object) -> Any:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _refuse_to_set(self: Any, name: str, value: object) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(self: Any, name: str) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot delete field {name!r}")


_STANDARD = ("__dataclass_fields__", "__dataclass_params__")
_NOT_COPIED = ("__dict__", "__weakref__")
_SHARED = {
    **{name: _Standard(name) for name in _STANDARD},
    "__repr__": _repr,
    "__getstate__": _values,
    "__setstate__": _set_values,
}
_EQUAL = {"__eq__": _eq, "__hash__": _hash}
_FROZEN = {"__setattr__": _refuse_to_set, "__delattr__": _refuse_to_delete}
