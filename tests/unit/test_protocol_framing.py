"""Frames <-> messages: what is accepted, what is refused, and with which kind."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import RemoteProtocolError
from protocol.framing import Message, Notification, Request, Response, decode, encode

msgids = st.integers(0, 2**32 - 1)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
maps = st.dictionaries(st.text(), plain, max_size=4)
messages: st.SearchStrategy[Message] = (
    st.builds(Request, msgids, st.text(), maps)
    | st.builds(Response, msgids, st.none(), plain)
    | st.builds(Response, msgids, maps, st.none())
    | st.builds(Notification, st.text(), maps)
)


def kind_of(value: Any) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(msgpack.packb(value))
    return caught.value.kind


@settings(deadline=None)
@given(messages)
def test_every_message_survives_the_wire(message: Message) -> None:
    again = decode(encode(message))
    assert type(again) is type(message)
    assert repr(again) == repr(message)  # repr, because NaN is not equal to itself


@settings(deadline=None, max_examples=500)
@given(st.binary(max_size=80) | plain.map(msgpack.packb))
def test_any_bytes_give_a_message_or_one_kind_of_error(frame: bytes) -> None:
    try:
        message = decode(frame)
    except RemoteProtocolError as error:
        kind = error.kind
    else:
        kind = ""
        assert repr(decode(encode(message))) == repr(message)
    assert kind in {"", "malformed", "utf8"}


@pytest.mark.parametrize(
    "lookalike", [False, True, 0.0, -0.0, 1.0, 2.0, "0", b"\0", None, [0], 3, -1, 2**64 - 1]
)
@pytest.mark.parametrize("rest", [[7, "m", [{}]], [7, None, {}], ["m", [{}]]])
def test_only_three_integers_are_types(lookalike: object, rest: list[object]) -> None:
    assert kind_of([lookalike, *rest]) == "malformed"


@pytest.mark.parametrize(
    "msgid", [True, False, 1.0, float("nan"), -1, 2**32, 2**64 - 1, "1", b"1", None, [1]]
)
def test_only_32_bit_unsigned_integers_are_msgids(msgid: object) -> None:
    assert kind_of([0, msgid, "m", [{}]]) == "malformed"
    assert kind_of([1, msgid, None, {}]) == "malformed"


@pytest.mark.parametrize("msgid", [0, 2**32 - 1])
def test_all_32_bits_are_usable(msgid: int) -> None:
    assert decode(msgpack.packb([0, msgid, "m", [{}]])) == Request(msgid, "m", {})


@pytest.mark.parametrize("params", [{}, [], [{}, {}], [[]], [None], ["x"], None, [1]])
def test_params_are_exactly_one_map(params: object) -> None:
    assert kind_of([0, 1, "m", params]) == "malformed"
    assert kind_of([2, "m", params]) == "malformed"


@pytest.mark.parametrize("key", [b"k", 1, True, None, 1.5, (), (1,)])
def test_keys_are_strings_at_every_depth(key: object) -> None:
    odd = {key: 1}
    for value in (odd, {"a": odd}, {"a": [1, {"b": odd}]}):
        assert kind_of([0, 1, "m", [value]]) == "malformed"
    assert kind_of([1, 1, None, [odd]]) == "malformed"
    assert kind_of([1, 1, odd, None]) == "malformed"


def test_a_map_as_a_key_is_refused() -> None:
    assert_malformed(b"\x94\x00\x01\xa1m\x91\x81\x80\x01")


def test_a_doubled_key_is_refused() -> None:
    assert_malformed(b"\x94\x00\x01\xa1m\x91\x82\xa1k\x01\xa1k\x02")
    assert_malformed(b"\x94\x00\x01\xa1m\x91\x81\xa1a\x91\x82\xa1k\x01\xd9\x01k\x01")


def assert_malformed(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(frame)
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize("text", [b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xc3", b"\xf4\x90\x80\x80"])
@pytest.mark.parametrize(
    "place", [b"\x94\x00\x01%s\x91\x80", b"\x94\x00\x01\xa1m\x91\x81%s\x01", b"\x94\x01\x01\xc0%s"]
)
def test_a_string_that_is_not_utf8_says_so(text: bytes, place: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(place % (bytes([0xA0 + len(text)]) + text))
    assert caught.value.kind == "utf8"


def test_nan_and_infinity_are_numbers_like_others() -> None:
    message = decode(msgpack.packb([2, "m", [{"a": float("nan"), "b": float("-inf")}]]))
    assert isinstance(message, Notification)
    assert message.params["a"] != message.params["a"]
    assert message.params["b"] == float("-inf")


@pytest.mark.parametrize("error", [{}, False, 0, ""])
@pytest.mark.parametrize("result", [{}, False, 0, ""])
def test_a_response_is_one_or_the_other(error: object, result: object) -> None:
    assert kind_of([1, 1, error, result]) == "malformed"
    assert decode(msgpack.packb([1, 1, error, None])) == Response(1, error, None)
    assert decode(msgpack.packb([1, 1, None, result])) == Response(1, None, result)


@pytest.mark.parametrize("value", [object(), 2**64, -(2**63) - 1, "\ud800", {1, 2}])
def test_what_messagepack_cannot_carry_is_not_encoded(value: object) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        encode(Notification("m", {"v": value}))
