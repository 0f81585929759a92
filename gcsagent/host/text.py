"""Makes what a guest said fit to show: no terminal escapes, no line breaks, bounded, and valid JSON."""

from __future__ import annotations

import base64
import dataclasses
from enum import Enum
from typing import Any

MAX_SHOWN = 2000
"""Characters of one value on a terminal: enough for runc's longest error line."""


def printable(value: object, limit: int = MAX_SHOWN) -> str:
    """``value`` as one line that a terminal shows and obeys none of: what is unprintable is escaped."""
    text = str(value)
    shown = "".join(char if char.isprintable() else _escaped(char) for char in text[:limit])
    return shown if len(text) <= limit else shown + "…"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "backslashreplace").decode("ascii")


def jsonable(value: Any) -> Any:
    """``value`` with dataclasses, enums and bytes (base64) turned into what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {_key(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value


def _key(key: object) -> str:
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)
