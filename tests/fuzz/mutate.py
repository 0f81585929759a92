"""New inputs from old ones: of bytes, of MessagePack values, of tar headers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgpack

Mutator = Callable[[bytes, random.Random], bytes]

NUMBERS = (0, 1, 2, 3, -1, 64, 65, 127, 128, 255, 256, 4096, 65535, 65536, *(
    edge + by for edge in (1 << 31, 1 << 32, 1 << 53, 1 << 62, 1 << 63) for by in (-1, 0, 1)
), (1 << 64) - 1, -(1 << 31), -(1 << 63))  # fmt: skip
TEXTS = (
    *("", ".", "..", "/", "//", "../..", "a/b", "/a", "-1", "0", "a\0b", "\0", "\n", "é", "%s", "~"),
    *("init", "stdin", "stdout", "stderr", "tty", "web", "KILL", "SIGTERM", "pipe"),
    *("x" * 128, "x" * 129, "a" * 5000),
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0.0,
    -0.5,
    float("nan"),
    float("inf"),
    1e308,
    b"",
    b"\xff",
    [],
    {},
    [[]],
    {"": {}},
)
"""Values of every kind, with the edges of each."""


def of_bytes(data: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, gone, doubled or new."""
    made = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        at = dice.randrange(len(made) + 1)
        match dice.randrange(6):
            case 0 if made:
                made[at % len(made)] ^= 1 << dice.randrange(8)
            case 1 if made:
                made[at % len(made)] = dice.choice(
                    (0, 0x7F, 0x80, 0x93, 0xC1, 0xDD, 0xFF, dice.randrange(256))
                )
            case 2:
                del made[at : at + dice.choice((1, 2, 8, 512))]
            case 3:
                made[at:at] = dice.randbytes(dice.choice((1, 2, 8)))
            case 4:
                end = at + dice.choice((1, 4, 64, 512))
                made[at:at] = made[at:end]
            case _:
                del made[at:]
                made += dice.randbytes(dice.randrange(4))
    return bytes(made)


def of_values(data: bytes, dice: random.Random) -> bytes:
    """MessagePack values one after the other, something in them changed; or bytes, now and then."""
    values = _values(data)
    if not values or dice.random() < 0.1:
        return of_bytes(data, dice)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        match dice.randrange(12):
            case 0:
                values.insert(dice.randrange(len(values) + 1), dice.choice(values))
            case 1 if len(values) > 1:
                del values[dice.randrange(len(values))]
            case _:
                index = dice.randrange(len(values))
                values[index] = changed(values[index], dice)
    try:
        return b"".join(msgpack.packb(value) for value in values)
    except (ValueError, OverflowError):
        return of_bytes(data, dice)


def _values(data: bytes) -> list[Any]:
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, max_buffer_size=1 << 24)
    try:
        unpacker.feed(data)
        return list(unpacker)
    except (ValueError, TypeError, msgpack.UnpackException):
        return []


def changed(value: Any, dice: random.Random) -> Any:
    """``value`` with one thing in it different, at any depth."""
    if isinstance(value, (list, dict)) and value and dice.random() < 0.85:
        if isinstance(value, list):
            return _list(value, dice)
        return _map(value, dice)
    return _other(value, dice)


def _list(value: list[Any], dice: random.Random) -> list[Any]:
    at, made = dice.randrange(len(value)), list(value)
    match dice.randrange(10):
        case 0:
            del made[at]
        case 1:
            made.insert(at, made[at])
        case 2:
            made *= dice.choice((2, 17))
        case _:
            made[at] = changed(made[at], dice)
    return made


def _map(value: dict[Any, Any], dice: random.Random) -> dict[Any, Any]:
    key, made = dice.choice(list(value)), dict(value)
    match dice.randrange(10):
        case 0:
            del made[key]
        case 1:
            made[dice.choice(TEXTS)] = made[key]
        case 2:
            made[key] = made[dice.choice(list(value))]
        case _:
            made[key] = changed(made[key], dice)
    return made


def _other(value: Any, dice: random.Random) -> Any:
    if dice.random() < 0.15:
        return dice.choice((dice.choice(NUMBERS), dice.choice(TEXTS), dice.choice(ODD)))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return dice.choice((value + 1, value - 1, -value, dice.choice(NUMBERS)))
    if isinstance(value, str):
        return dice.choice((value + "x", value[:-1], value * 2, dice.choice(TEXTS), value + "/.."))
    if isinstance(value, bytes):
        return of_bytes(value, dice)
    return dice.choice((dice.choice(NUMBERS), dice.choice(TEXTS), dice.choice(ODD)))


BLOCK = 512
FIELDS = (
    (0, 100),
    (100, 8),
    (108, 8),
    (116, 8),
    (124, 12),
    (136, 12),
    (156, 1),
    (157, 100),
    (257, 8),
    (345, 155),
)
"""Offsets and sizes of a ustar header's name, mode, uid, gid, size, time, kind, link, magic and prefix."""
NAMES = (
    b"a",
    b"a/b",
    b"..",
    b"../victim",
    b"/victim",
    b"a/../../victim",
    b"l",
    b"l/x",
    b".",
    b"",
    b"\xff\xfe",
    b"x" * 100,
)
SIZES = (
    b"0",
    b"1",
    b"777",
    b"77777777777",
    b"-1",
    b"\x80" + b"\0" * 10 + b"\1",
    b"\xff" * 12,
    b"",
    b" 9",
    b"200",
)


def of_tar(data: bytes, dice: random.Random) -> bytes:
    """A field of a header changed and its checksum made right, mostly; or blocks gone, moved, doubled."""
    made = bytearray(data)
    blocks = len(made) // BLOCK
    if not blocks or dice.random() < 0.1:
        return of_bytes(data, dice)
    for _ in range(dice.choice((1, 1, 2, 3))):
        at = dice.randrange(blocks) * BLOCK
        match dice.randrange(8):
            case 0:
                del made[at : at + BLOCK]
            case 1:
                made[at:at] = made[at : at + BLOCK * dice.choice((1, 2, 3))]
            case 2:
                made[at : at + BLOCK] = of_bytes(bytes(made[at : at + BLOCK]), dice)
            case _:
                _header(made, at, dice)
    return bytes(made[: 1 << 18])


def _header(made: bytearray, at: int, dice: random.Random) -> None:
    if len(made) < at + BLOCK:
        return
    start, size = dice.choice(FIELDS)
    if size == 100 or size == 155:
        new = dice.choice(NAMES)
    elif size == 1:
        new = dice.choice(
            (b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"V", b"\0", b"Z")
        )
    else:
        new = dice.choice(SIZES)
    made[at + start : at + start + size] = new[:size].ljust(size, b"\0")
    if dice.random() < 0.95:
        made[at + 148 : at + 156] = b" " * 8
        made[at + 148 : at + 156] = b"%06o\0 " % sum(made[at : at + BLOCK])


def behind_a_byte(mutate: Mutator) -> Mutator:
    """The first byte says how the rest is to be taken: it is changed by itself."""

    def both(data: bytes, dice: random.Random) -> bytes:
        how = bytes([dice.randrange(256)]) if dice.random() < 0.3 or not data else data[:1]
        return how + mutate(data[1:], dice)

    return both
