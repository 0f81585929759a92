"""Looking into JSON that somebody else wrote: each value with the field it stands in.

``None`` is an absent value everywhere, as it is for a runtime written in Go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from protocol.errors import Code, RpcError

Json = dict[str, Any]

MAX_ITEMS = 4096
"""Entries of a list or map that has no bound of its own: far above what anybody writes."""
U32 = 0xFFFF_FFFF
U64 = 0xFFFF_FFFF_FFFF_FFFF
I64 = 0x7FFF_FFFF_FFFF_FFFF


def invalid(field: str, problem: str) -> RpcError:
    return RpcError(Code.INVALID_ARGUMENT, f"{field}: {problem}", field=field)


def not_found(field: str, problem: str) -> RpcError:
    return RpcError(Code.NOT_FOUND, f"{field}: {problem}", field=field)


def mapping(value: Any, field: str, limit: int = MAX_ITEMS) -> Json:
    """The map, ``{}`` when absent."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(field, "must be a map")
    if len(value) > limit:
        raise invalid(field, f"has {len(value)} entries; {limit} are allowed")
    if not all(isinstance(key, str) for key in value):
        raise invalid(field, "must have strings for keys")
    return value


def items(value: Any, field: str, limit: int = MAX_ITEMS) -> Iterator[tuple[Any, str]]:
    """The array's elements with their fields; none when absent."""
    if value is None:
        return
    if not isinstance(value, list):
        raise invalid(field, "must be an array")
    if len(value) > limit:
        raise invalid(field, f"has {len(value)} elements; {limit} are allowed")
    for index, item in enumerate(value):
        yield item, f"{field}[{index}]"


def maps(value: Any, field: str, limit: int = MAX_ITEMS) -> Iterator[tuple[Json, str]]:
    for item, where in items(value, field, limit):
        if not isinstance(item, dict):
            raise invalid(where, "must be a map")
        yield item, where


def text(value: Any, field: str) -> str:
    """The string, ``""`` when absent."""
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise invalid(field, "must be a string without NUL bytes")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid(field, "must be a string of valid Unicode") from None
    return value


def texts(value: Any, field: str, limit: int = MAX_ITEMS) -> list[str]:
    if value is not None and not isinstance(value, list):
        raise invalid(field, "must be an array of strings")
    if value and len(value) <= limit and _are_texts(value):
        return list(value)
    found = []
    for item, where in items(value, field, limit):
        if item is None:
            raise invalid(where, "must be a string")
        found.append(text(item, where))
    return found


def _are_texts(value: list[Any]) -> bool:
    """At a glance; which of them is not one, and why, takes longer."""
    try:
        joined = "\0".join(value)
        joined.encode()
    except (TypeError, UnicodeEncodeError):
        return False
    return joined.count("\0") == len(value) - 1


def flag(value: Any, field: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise invalid(field, "must be true or false")
    return bool(value)


def number(value: Any, field: str, low: int, high: int) -> int | None:
    """The integer, None when absent."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise invalid(field, f"must be an integer from {low} to {high}")
    return value


def required(value: Any, field: str, low: int, high: int) -> int:
    found = number(value, field, low, high)
    if found is None:
        raise invalid(field, f"is missing; it must be an integer from {low} to {high}")
    return found


def choice(value: Any, field: str, known: Collection[str], what: str) -> str:
    """One of ``known``; ``what`` is the noun of the sentence that says it is not."""
    if not isinstance(value, str) or value not in known:
        shown = f"{value!r} is" if isinstance(value, str) else "must be a string;"
        raise invalid(field, f"{shown[:200]} no {what}; known are {', '.join(sorted(known))}")
    return value


def absolute(value: Any, field: str) -> str:
    found = text(value, field)
    if not found.startswith("/"):
        raise invalid(field, "must be an absolute path")
    return found


def copied(value: Any) -> Any:
    """Of decoded JSON or MessagePack, at every depth: what may be shared is what cannot be changed."""
    if isinstance(value, dict):
        return {key: copied(item) if type(item) in _NESTED else item for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) if type(item) in _NESTED else item for item in value]
    return value


_NESTED = frozenset({dict, list})
