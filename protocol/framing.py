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

REQUEST, RESPONSE, NOTIFICATION = 0, 1, 2
_BINARY = bytes((0xC4, 0xC5, 0xC6))

_LARGE = 65_536
_packer = msgpack.Packer(use_bin_type=True)
"""Made once: making one takes longer than packing a message."""


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
    if isinstance(message, Response):
        frame: list[Any] = [RESPONSE, message.msgid, message.error, message.result]
    elif isinstance(message, Request):
        frame = [REQUEST, message.msgid, message.method, [message.params]]
    else:
        frame = [NOTIFICATION, message.method, [message.params]]
    return pack(frame)


def pack(frame: list[Any]) -> bytes:
    """As :func:`encode`, of a message that is an array already."""
    global _packer
    packed: bytes = _packer.pack(frame)
    if len(packed) > _LARGE:
        _packer = msgpack.Packer(use_bin_type=True)  # the old one keeps what it has grown to
    return packed


def decode(frame: bytes) -> Message:
    """The message of one whole frame (as :class:`protocol.scan.FrameScanner` cuts them).

    Raises RemoteProtocolError with kind ``malformed`` or ``utf8``.
    """
    try:
        value = msgpack.unpackb(frame, raw=False, strict_map_key=False, object_pairs_hook=text_map)
    except UnicodeDecodeError as error:
        raise RemoteProtocolError(
            "utf8", "a string is not valid UTF-8; send bytes as the bin type"
        ) from error
    except ValueError as error:  # msgpack: FormatError, StackError, ExtraData, bytes missing
        raise RemoteProtocolError(
            "malformed", f"not a MessagePack value of this protocol: {error}"
        ) from error
    return classify(value)


def is_ours(frame: bytes) -> bool:
    """Whether a frame we have packed is one the other side takes, as far as a look without Python can tell:
    keys are strings where nothing is bytes. Raises RemoteProtocolError for what is no message.

    What was packed from dicts has no key twice.
    """
    if len(frame) != len(frame.translate(None, _BINARY)):
        return False
    try:
        classify(msgpack.unpackb(frame, raw=False, strict_map_key=True))
    except ValueError:
        return False
    return True


def text_map(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """A map at any depth. Two readers of a doubled key may see different values, so it is refused."""
    if not pairs:
        return {}
    for key, _ in pairs:
        if type(key) is not str:
            raise RemoteProtocolError("malformed", "a map key must be a string")
    built = dict(pairs)
    if len(built) != len(pairs):
        raise RemoteProtocolError("malformed", "a map has the same key twice")
    return built


def classify(value: Any) -> Message:
    """The message that a decoded value is. Raises RemoteProtocolError with kind ``malformed``.

    Types are compared, not values: to Python False, 0.0 and 0 are equal.
    """
    if not isinstance(value, list) or not value or type(value[0]) is not int:
        raise RemoteProtocolError("malformed", "a message is an array that starts with its type, 0, 1 or 2")
    if len(value) == 4:
        kind, msgid, third, fourth = value
        if type(msgid) is int and 0 <= msgid <= MAX_MSGID:
            if kind == REQUEST and type(third) is str and _is_one_map(fourth):
                return Request(msgid, third, fourth[0])
            if kind == RESPONSE:
                if third is not None and fourth is not None:
                    raise RemoteProtocolError("malformed", "a response has an error or a result, not both")
                return Response(msgid, third, fourth)
    elif len(value) == 3:
        kind, method, params = value
        if kind == NOTIFICATION and type(method) is str and _is_one_map(params):
            return Notification(method, params[0])
    raise RemoteProtocolError(
        "malformed",
        "a message is [0, msgid, method, [params]], [1, msgid, error, result] or [2, method, [params]]"
        " with params one map and msgid a 32-bit unsigned integer",
    )


def _is_one_map(params: Any) -> bool:
    return type(params) is list and len(params) == 1 and type(params[0]) is dict
