"""MessagePack-RPC frames: bytes <-> :class:`Request`, :class:`Response`, :class:`Notification`.

Framing is MessagePack-RPC as published
(https://github.com/msgpack-rpc/msgpack-rpc/blob/master/spec.md), with ``params`` narrowed to a list of
exactly one map, so that arguments have names and may be added without breaking anybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack

from protocol.dataclass import dataclass
from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_MSGID

_REQUEST, _RESPONSE, _NOTIFICATION = 0, 1, 2
_BINARY = bytes((0xC4, 0xC5, 0xC6))


@dataclass(frozen=True, slots=True)
class Request:
    """``[0, msgid, method, [params]]``"""

    msgid: int
    method: str
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Response:
    """``[1, msgid, error, result]``: at least one of error and result is nil; a nil error means success."""

    msgid: int
    error: Any
    result: Any


@dataclass(frozen=True, slots=True)
class Notification:
    """``[2, method, [params]]``"""

    method: str
    params: dict[str, Any]


Message = Request | Response | Notification


def encode(message: Message) -> bytes:
    """The frame of one message.

    Raises TypeError, ValueError or OverflowError when it holds something MessagePack cannot carry.
    """
    match message:
        case Request(msgid, method, params):
            frame: list[Any] = [_REQUEST, msgid, method, [params]]
        case Response(msgid, error, result):
            frame = [_RESPONSE, msgid, error, result]
        case Notification(method, params):
            frame = [_NOTIFICATION, method, [params]]
    packed: bytes = msgpack.packb(frame, use_bin_type=True)
    return packed


def decode(frame: bytes) -> Message:
    """The message of one whole frame (as :class:`protocol.scan.FrameScanner` cuts them).

    Raises RemoteProtocolError with kind ``malformed`` or ``utf8``.
    """
    try:
        value = msgpack.unpackb(frame, raw=False, strict_map_key=False, object_pairs_hook=_text_map)
    except UnicodeDecodeError as error:
        raise RemoteProtocolError(
            "utf8", "a string is not valid UTF-8; send bytes as the bin type"
        ) from error
    except ValueError as error:  # msgpack: FormatError, StackError, ExtraData, bytes missing
        raise RemoteProtocolError(
            "malformed", f"not a MessagePack value of this protocol: {error}"
        ) from error
    return _classify(value)


def is_ours(frame: bytes) -> bool:
    """Whether a frame we have packed is one the other side takes, as far as a look without Python can tell:
    keys are strings where nothing is bytes. Raises RemoteProtocolError for what is no message.

    What was packed from dicts has no key twice.
    """
    if len(frame) != len(frame.translate(None, _BINARY)):
        return False
    try:
        _classify(msgpack.unpackb(frame, raw=False, strict_map_key=True))
    except ValueError:
        return False
    return True


def _text_map(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """A map at any depth. Two readers of a doubled key may see different values, so it is refused."""
    for key, _ in pairs:
        if type(key) is not str:
            raise RemoteProtocolError("malformed", "a map key must be a string")
    built = dict(pairs)
    if len(built) != len(pairs):
        raise RemoteProtocolError("malformed", "a map has the same key twice")
    return built


def _classify(value: Any) -> Message:
    if not isinstance(value, list) or not value or type(value[0]) is not int:
        # The patterns below compare with ==, and to Python False, 0.0 and 0 are equal.
        raise RemoteProtocolError("malformed", "a message is an array that starts with its type, 0, 1 or 2")
    match value:
        case [0, int() as msgid, str() as method, [dict() as params]] if _is_id(msgid):
            return Request(msgid, method, params)
        case [1, int() as msgid, error, result] if _is_id(msgid):
            if error is not None and result is not None:
                raise RemoteProtocolError("malformed", "a response has an error or a result, not both")
            return Response(msgid, error, result)
        case [2, str() as method, [dict() as params]]:
            return Notification(method, params)
    raise RemoteProtocolError(
        "malformed",
        "a message is [0, msgid, method, [params]], [1, msgid, error, result] or [2, method, [params]]"
        " with params one map and msgid a 32-bit unsigned integer",
    )


def _is_id(msgid: int) -> bool:
    return not isinstance(msgid, bool) and 0 <= msgid <= MAX_MSGID
