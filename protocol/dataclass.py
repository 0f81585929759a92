"""Frozen dataclasses with slots, made in a fraction of the time the standard library takes.

dataclasses.dataclass writes and compiles six methods for every class. The contract has some 150 classes, of
which one agent uses a few: on an emulated CPU, compiling their methods was a third of an agent's start. Here
comparison, hash, representation and the refusal to change are shared, and ``__init__`` is compiled when it
is called for the first time. All else, and all of what a type checker sees, is dataclasses' own.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass  # re-exported
else:

    def dataclass(*, frozen: bool, slots: bool) -> Callable[[type], type]:
        """dataclasses.dataclass for these two alone, without ``__post_init__`` and InitVar."""
        if not (frozen and slots):
            raise TypeError("want frozen=True, slots=True: there is no other kind here")
        return _make


def _make(bare: type) -> type:
    # Without one, dataclasses would make it from the signature, for which it takes its time.
    bare.__doc__ = bare.__doc__ or bare.__name__
    cls: Any = dataclasses.dataclass(init=False, repr=False, eq=False, slots=True)(bare)
    cls.__dataclass_params__.frozen = True  # as it is below; dataclasses would compile two methods for it

    def __init__(self: Any, *arguments: Any, **named: Any) -> None:
        cls.__init__ = _compiled_init(cls)
        cls.__init__(self, *arguments, **named)

    cls.__init__ = __init__
    cls.__repr__, cls.__eq__, cls.__hash__ = _repr, _eq, _hash
    cls.__getstate__, cls.__setstate__ = _values, _set_values
    cls.__setattr__, cls.__delattr__ = _refuse_to_set, _refuse_to_delete
    made: type = cls
    return made


def _compiled_init(cls: type) -> Callable[..., None]:
    names: dict[str, Any] = {"_set": object.__setattr__, "_unset": object()}
    parameters, lines = ["self"], []
    for field in dataclasses.fields(cls):
        value = name = field.name
        if field.default is not dataclasses.MISSING:
            names[f"_default_{name}"] = field.default
            parameters.append(f"{name}=_default_{name}")
        elif field.default_factory is not dataclasses.MISSING:
            names[f"_make_{name}"] = field.default_factory
            parameters.append(f"{name}=_unset")
            value = f"_make_{name}() if {name} is _unset else {name}"
        else:
            parameters.append(name)
        lines.append(f" _set(self, {name!r}, {value})\n")
    exec(f"def __init__({', '.join(parameters)}):\n{''.join(lines) or ' pass'}", names)
    init: Callable[..., None] = names["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    return init


_getters: dict[type, Callable[[Any], tuple[Any, ...]]] = {}


def _values(self: Any) -> tuple[Any, ...]:
    get = _getters.get(type(self))
    if get is None:
        names = tuple(self.__dataclass_fields__)
        # attrgetter gives a tuple of two names and more.
        get = operator.attrgetter(*names) if len(names) > 1 else _getter_of_few(names)
        _getters[type(self)] = get
    return get(self)


def _getter_of_few(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda value: tuple([getattr(value, name) for name in names])


def _set_values(self: Any, values: tuple[Any, ...]) -> None:
    for name, value in zip(self.__dataclass_fields__, values, strict=True):
        object.__setattr__(self, name, value)


def _repr(self: Any) -> str:
    shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__dataclass_fields__)
    return f"{type(self).__qualname__}({shown})"


def _eq(self: Any, other: object) -> Any:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _refuse_to_set(self: Any, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
