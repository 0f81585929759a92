"""Finds where one MessagePack value ends, without building it.

msgpack's own streaming unpacker allocates a list as soon as it has read the list's length, so a few
hundred bytes of nested array headers cost the reader hundreds of megabytes. This scanner reads only
headers: a declared length that cannot fit in what is left of the frame, or one nesting level too many,
is refused before anything is allocated for it, and so is a message of more values than a reader should
have to build. It keeps its place between calls, so that a message
that arrives byte by byte is read once.

Most messages are small, whole and plain: of what arrived together msgpack may decode one after the other, its
arrays kept so short that no headers cost much, and the number of bytes that could be headers shows that a
message has reached no limit. All others are read header by header, and decoded when they are whole.

Source of the format table: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

from typing import Any

import msgpack

from protocol.errors import RemoteProtocolError
from protocol.framing import text_map
from protocol.limits import Limits

_FIXED, _BLOB, _ARRAY, _MAP, _BAD = range(5)


def _format_table() -> list[tuple[int, int]]:
    """For each first byte: what it is, and a number (size in bytes, count, or width of the length)."""
    table: list[tuple[int, int]] = [(_FIXED, 1)] * 256
    for byte in range(0x80, 0x90):
        table[byte] = (_MAP, -(byte & 0x0F) - 1)
    for byte in range(0x90, 0xA0):
        table[byte] = (_ARRAY, -(byte & 0x0F) - 1)
    for byte in range(0xA0, 0xC0):
        table[byte] = (_FIXED, 1 + (byte & 0x1F))
    table[0xC1] = (_BAD, 0)
    for first, widths in ((0xC4, (1, 2, 4)), (0xD9, (1, 2, 4))):
        for step, width in enumerate(widths):
            table[first + step] = (_BLOB, width)
    for byte, size in ((0xCA, 5), (0xCB, 9), (0xCC, 2), (0xCD, 3), (0xCE, 5), (0xCF, 9)):
        table[byte] = (_FIXED, size)
    for byte, size in ((0xD0, 2), (0xD1, 3), (0xD2, 5), (0xD3, 9)):
        table[byte] = (_FIXED, size)
    for byte in (0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8):  # ext and timestamp: not in the contract
        table[byte] = (_BAD, 1)
    table[0xDC], table[0xDD] = (_ARRAY, 2), (_ARRAY, 4)
    table[0xDE], table[0xDF] = (_MAP, 2), (_MAP, 4)
    return table


_TABLE = _format_table()
_OPENING = bytes(byte for byte, (kind, _) in enumerate(_TABLE) if kind in (_ARRAY, _MAP))
_UNUSED = bytes(byte for byte, (kind, _) in enumerate(_TABLE) if kind == _BAD)

_SMALL = 16 * 1024
"""Bytes waiting, beyond which msgpack is not given a copy of them to look through."""

_SHORT = 256
"""Entries of an array or a map that msgpack may make room for: it nests 1,024 deep, which makes 2 MiB."""

_spare: list[msgpack.Unpacker] = []
"""One that has been used up to the end of a message: each takes 40 KiB, whatever it is given."""


def _unpacker() -> msgpack.Unpacker:
    try:
        return _spare.pop()
    except IndexError:
        return msgpack.Unpacker(
            raw=False,
            strict_map_key=False,
            object_pairs_hook=text_map,
            max_buffer_size=_SMALL,
            max_array_len=_SHORT,
            max_map_len=_SHORT,
        )


def is_plain(frame: bytes, limits: Limits) -> bool:
    """Whether one whole value is certain to be within the limits, by its bytes alone.

    It cannot have more levels than bytes that could open one, nor more values than bytes. False says nothing.
    """
    size = len(frame)
    return (
        size <= limits.max_frame
        and size <= limits.max_values
        and size - len(frame.translate(None, _OPENING)) <= limits.max_depth
        and not _has_unused(frame)
    )


def _has_unused(data: bytes | bytearray) -> bool:
    return len(data) != len(data.translate(None, _UNUSED))


class FrameScanner:
    """Splits a byte stream into MessagePack values of bounded size and depth.

    Raises :class:`RemoteProtocolError` with kind ``oversized``, ``depth`` or ``malformed``.
    """

    __slots__ = (
        "_buffer",
        "_decoded",
        "_decoder",
        "_limits",
        "_max_frame",
        "_may_decode",
        "_position",
        "_stack",
        "_values",
    )

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._max_frame = limits.max_frame
        self._may_decode = min(limits.max_frame, limits.max_values) >= _SMALL
        self._buffer = bytearray()
        self._decoder: msgpack.Unpacker | None = None  # has what is buffered, and is between two messages
        self._decoded = 0  # bytes of it that are gone from the buffer
        self._position = 0
        self._values = 0  # declared in the frame being read, by the headers read so far
        self._stack: list[int] = []  # values still expected at each open level; empty: between frames

    @property
    def buffered(self) -> int:
        """Bytes received that do not yet make a whole frame."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data
        self._decoder = None

    def take_rest(self) -> bytes:
        """Everything buffered, unparsed: the first bytes of a raw stream."""
        rest = bytes(self._buffer)
        self._decoder = None
        self._buffer.clear()
        self._position = self._values = 0
        self._stack.clear()
        return rest

    def next_value(self) -> Any:
        """The next whole value, decoded, if it is a plain one; None leaves it for :meth:`next_frame`."""
        buffer, decoder = self._buffer, self._decoder
        if decoder is None:
            if not buffer or self._stack or not self._may_decode or len(buffer) > _SMALL:
                return None
            if _has_unused(buffer):
                return None
            decoder = _unpacker()
            self._decoded = decoder.tell()
            decoder.feed(buffer)
        self._decoder = None
        try:
            value = decoder.unpack()
        except (msgpack.OutOfData, ValueError, RemoteProtocolError):  # not whole, or not well-formed
            return None
        end = decoder.tell()
        size = end - self._decoded
        # No more levels than bytes that could open one, and no more values than bytes. nil is no message.
        if value is None or size - len(buffer[:size].translate(None, _OPENING)) > self._limits.max_depth:
            return None
        del buffer[:size]
        if buffer:
            self._decoder, self._decoded = decoder, end
        elif not _spare:
            _spare.append(decoder)
        return value

    def next_frame(self) -> bytes | None:
        """The next whole value, or None until more bytes come."""
        if not self._buffer:
            return None
        self._decoder = None
        if not self._stack:
            self._stack.append(1)
        if not self._scan():
            if len(self._buffer) > self._max_frame:
                self._refuse_size()
            return None
        frame = bytes(memoryview(self._buffer)[: self._position])
        del self._buffer[: self._position]
        self._position = self._values = 0
        return frame

    def _scan(self) -> bool:
        """Moves over whole values; True when the outermost one is complete."""
        buffer, stack, position, end = self._buffer, self._stack, self._position, len(self._buffer)
        while stack:
            if stack[-1] == 0:
                stack.pop()
                continue
            if position >= end:
                break
            kind, number = _TABLE[buffer[position]]
            if kind == _FIXED:
                if position + number > self._max_frame:
                    self._refuse_size()
                if position + number > end:
                    break
                stack[-1] -= 1
                position += number
                continue
            if kind == _BAD:
                raise RemoteProtocolError(
                    "malformed", f"byte 0x{buffer[position]:02x} is not used in this protocol"
                )
            if number < 0:
                header, length = 1, -number - 1
            else:
                header = 1 + number
                if position + header > end:
                    break
                length = int.from_bytes(buffer[position + 1 : position + header], "big")
            if kind == _BLOB:
                if position + header + length > self._max_frame:
                    self._refuse_size()
                if position + header + length > end:
                    break
                stack[-1] -= 1
                position += header + length
                continue
            stack[-1] -= 1
            position += header
            self._open(length * 2 if kind == _MAP else length, position)
        self._position = position
        return not stack

    def _open(self, count: int, position: int) -> None:
        if position + count > self._max_frame:  # every element takes at least one byte
            self._refuse_size()
        self._values += count
        if self._values > self._limits.max_values:
            raise RemoteProtocolError(
                "oversized", f"a message may hold at most {self._limits.max_values} values"
            )
        if len(self._stack) > self._limits.max_depth:
            raise RemoteProtocolError("depth", f"a message may nest at most {self._limits.max_depth} levels")
        self._stack.append(count)

    def _refuse_size(self) -> None:
        raise RemoteProtocolError(
            "oversized", f"a message may be at most {self._max_frame} bytes (max_frame)"
        )
