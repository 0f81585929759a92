"""The golden frames as inputs to begin with."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import msgpack

from tests.fuzz.target import ROOT

HELLO: bytes = msgpack.packb([0, 0, "agent.hello", [{"protocol_min": 1, "protocol_max": 1}]])
MAX_SEED = 20_000
"""Bytes of a golden frame that is worth changing: a large one is the same over and over."""


@cache
def _cases(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "protocol" / "vectors" / f"{name}.json").read_text())
    return [case for case in found if len(case["bytes"]) < 2 * MAX_SEED]


def frames(*names: str) -> list[bytes]:
    return [bytes.fromhex(case["bytes"]) for name in names for case in _cases(name)]


def values(name: str) -> list[Any]:
    """Decoded: ``[0, msgid, method, [params]]`` or ``[1, msgid, error, result]``."""
    return [msgpack.unpackb(frame, raw=False, strict_map_key=False) for frame in frames(name)]


@cache
def requests() -> dict[str, dict[str, Any]]:
    """The parameters of one good request of every method."""
    return {method: params for _, _, method, [params] in reversed(values("requests"))}


def named(name: str) -> dict[str, Any]:
    """Decoded, the first of those that are called after the same method."""
    found: dict[str, Any] = {}
    for case, value in zip(_cases(name), values(name), strict=True):
        found.setdefault(case["name"].split()[0].rstrip(":,"), value)
    return found
