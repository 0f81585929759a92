"""The connection state table, taken and refused, from both sides; and hostile peers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.connection import TRANSITIONS, Connection, Role, State, Step
from protocol.errors import Code, LocalProtocolError, ProtocolError, RemoteProtocolError, RpcError
from protocol.framing import Message, Notification, Request, Response, encode
from protocol.limits import Limits
from protocol.methods import ATTACH, CANCEL, EVENT, HELLO, PROTOCOL_ERROR

HELLO_PARAMS = {"protocol_min": 1, "protocol_max": 1}
ERROR = RpcError(Code.FAILED_PRECONDITION, "not now")


class Pair:
    """Two ends of one connection; what one sends the other receives at once."""

    def __init__(self) -> None:
        self.client = Connection(Role.CLIENT)
        self.server = Connection(Role.SERVER)

    def ask(self, msgid: int, method: str, params: dict[str, Any] | None = None) -> list[Message]:
        return self.server.receive(self.client.request(msgid, method, params or {}))

    def answer(self, msgid: int, result: Any = None) -> list[Message]:
        return self.client.receive(self.server.respond(msgid, {} if result is None else result))

    def refuse(self, msgid: int) -> list[Message]:
        return self.client.receive(self.server.fail(msgid, ERROR))


def pair_in(state: State) -> Pair:
    """Both ends in ``state``; in OPEN and ATTACHING request 2 is outstanding."""
    pair = Pair()
    if state is State.FRESH:
        return pair
    pair.ask(1, HELLO, HELLO_PARAMS)
    if state is State.GREETING:
        return pair
    pair.answer(1)
    if state is State.OPEN:
        pair.ask(2, "agent.ping")
    elif state in (State.ATTACHING, State.STREAM):
        pair.ask(2, ATTACH, {"container": "web"})
        if state is State.STREAM:
            pair.answer(2, {"offset": 0})
    elif state is State.CLOSED:
        pair.client.close()
        pair.server.close()
    assert (pair.client.state, pair.server.state) == (state, state)
    return pair


def outstanding_in(state: State) -> int:
    return {State.GREETING: 1, State.OPEN: 2, State.ATTACHING: 2}.get(state, 99)


Act = Callable[[Pair, State], list[Message]]

TAKE: dict[Step, Act] = {
    Step.HELLO: lambda pair, _: pair.ask(3, HELLO, HELLO_PARAMS),
    Step.REQUEST: lambda pair, _: pair.ask(3, "agent.ping"),
    Step.ATTACH: lambda pair, _: pair.ask(3, ATTACH, {"container": "web"}),
    Step.WELCOME: lambda pair, state: pair.answer(outstanding_in(state)),
    Step.REJECTED: lambda pair, state: pair.refuse(outstanding_in(state)),
    Step.RESPONSE: lambda pair, state: pair.answer(outstanding_in(state)),
    Step.ATTACHED: lambda pair, state: pair.answer(outstanding_in(state)),
    Step.REFUSED: lambda pair, state: pair.refuse(outstanding_in(state)),
    Step.CLIENT_NOTE: lambda pair, _: pair.server.receive(pair.client.notify(CANCEL, {"msgid": 2})),
    Step.SERVER_NOTE: lambda pair, _: pair.client.receive(pair.server.notify(EVENT, {"seq": 1})),
}
"""How each step is made by its sender and seen by its receiver."""

REQUESTS = {Step.HELLO: HELLO, Step.REQUEST: "agent.ping", Step.ATTACH: ATTACH}
NOTES = {Step.CLIENT_NOTE: Role.CLIENT, Step.SERVER_NOTE: Role.SERVER}


def open_pair() -> Pair:
    pair = Pair()
    pair.ask(1, HELLO, HELLO_PARAMS)
    pair.answer(1, {"protocol": 1})
    return pair


@pytest.mark.parametrize("state, step", TRANSITIONS)
def test_every_transition_can_be_taken(state: State, step: Step) -> None:
    pair = open_pair() if step is Step.ATTACH else pair_in(state)
    [message] = TAKE[step](pair, state)
    assert pair.client.state is pair.server.state is TRANSITIONS[state, step]
    assert isinstance(message, Request | Response | Notification)


def refusals(steps: set[Step]) -> list[tuple[State, Step]]:
    every = ((state, step) for state in State for step in Step if step in steps)
    return [pair for pair in every if pair not in TRANSITIONS]


@pytest.mark.parametrize("state, step", refusals(set(REQUESTS)))
def test_a_request_not_in_the_table_is_refused_by_name(state: State, step: Step) -> None:
    pair = pair_in(state)
    with pytest.raises(LocalProtocolError) as local:
        pair.client.request(3, REQUESTS[step], {})
    assert pair.client.state is state
    if step is Step.ATTACH and pair.client.outstanding:
        assert "nothing outstanding" in str(local.value)
    else:
        assert str(local.value) == f"{step} is not allowed in state {state}"
    if state in (State.STREAM, State.CLOSED, State.ATTACHING):
        return  # no message is read there: see the tests of streams and of early bytes
    with pytest.raises(RemoteProtocolError) as remote:
        pair.server.receive(encode(Request(3, REQUESTS[step], {})))
    assert remote.value.kind == ("busy" if "nothing outstanding" in str(local.value) else "state")
    assert remote.value.message == str(local.value)
    assert pair.server.state is State.CLOSED


@pytest.mark.parametrize("state, step", refusals(set(NOTES)))
def test_a_notification_not_in_the_table_is_refused_by_name(state: State, step: Step) -> None:
    pair = pair_in(state)
    from_client = NOTES[step] is Role.CLIENT
    sender, receiver = (pair.client, pair.server) if from_client else (pair.server, pair.client)
    wanted = f"{step} is not allowed in state {state}"
    with pytest.raises(LocalProtocolError, match=wanted):
        sender.notify("note", {})
    if state in (State.STREAM, State.CLOSED) or (state is State.ATTACHING and from_client):
        return
    with pytest.raises(RemoteProtocolError, match=wanted) as remote:
        receiver.receive(encode(Notification("note", {})))
    assert remote.value.kind == "state"


@pytest.mark.parametrize("state", State)
def test_a_response_nobody_waits_for_is_refused(state: State) -> None:
    pair = pair_in(state)
    with pytest.raises(LocalProtocolError, match="no request 99 is outstanding"):
        pair.server.respond(99, {})
    with pytest.raises(LocalProtocolError, match="no request 99 is outstanding"):
        pair.server.fail(99, ERROR)
    if state in (State.STREAM, State.CLOSED):
        return
    with pytest.raises(RemoteProtocolError) as remote:
        pair.client.receive(encode(Response(99, None, {})))
    assert (remote.value.kind, remote.value.message) == ("msgid", "no request 99 is outstanding")


@pytest.mark.parametrize("state, step", refusals(set(Step)))
@pytest.mark.parametrize("error", [LocalProtocolError, RemoteProtocolError])
def test_what_the_table_lacks_names_itself(state: State, step: Step, error: type[ProtocolError]) -> None:
    """All of it, also what no bytes can bring about because a response's step follows from its request."""
    connection = Connection(Role.SERVER)
    connection.state = state
    with pytest.raises(error, match=rf"^{step} is not allowed in state {state}$"):
        connection._step(step, error)
    assert connection.state is state


@pytest.mark.parametrize("state", [State.STREAM, State.CLOSED])
def test_no_messages_where_there_are_none(state: State) -> None:
    pair = pair_in(state)
    for side in (pair.client, pair.server):
        with pytest.raises(LocalProtocolError, match=f"no messages in state {state}"):
            side.receive(encode(Notification("note", {})))


def test_each_side_says_only_its_own_lines() -> None:
    pair = open_pair()
    with pytest.raises(LocalProtocolError, match="only the client"):
        pair.server.request(2, "agent.ping", {})
    with pytest.raises(LocalProtocolError, match="only the server"):
        pair.client.respond(1, {})
    with pytest.raises(LocalProtocolError, match="only the server"):
        pair.client.fail(1, ERROR)
    with pytest.raises(RemoteProtocolError) as caught:
        pair.client.receive(encode(Request(2, "agent.ping", {})))
    assert caught.value.kind == "direction"
    with pytest.raises(RemoteProtocolError) as caught:
        pair.server.receive(encode(Response(2, None, {})))
    assert caught.value.kind == "direction"


# -- msgids ---------------------------------------------------------------------------------------


def test_answers_come_in_any_order_and_free_their_msgid() -> None:
    pair = open_pair()
    for msgid in (5, 0, 2**32 - 1):
        pair.ask(msgid, "agent.ping")
    assert pair.client.outstanding == pair.server.outstanding == 3
    assert pair.answer(0, {"n": 0}) == [Response(0, None, {"n": 0})]
    assert pair.answer(2**32 - 1, {}) == [Response(2**32 - 1, None, {})]
    pair.ask(0, "agent.ping")
    assert pair.refuse(5) == [Response(5, ERROR.to_wire(), None)]
    assert pair.answer(0, {"n": 1}) == [Response(0, None, {"n": 1})]
    assert pair.client.outstanding == pair.server.outstanding == 0


@pytest.mark.parametrize("msgid", [-1, 2**32, 2**70, True, 1.0, "1", None])
def test_we_cannot_send_an_msgid_that_is_none(msgid: Any) -> None:
    pair = open_pair()
    with pytest.raises(LocalProtocolError):
        pair.client.request(msgid, "agent.ping", {})
    assert pair.client.outstanding == 0


def test_an_msgid_in_use_is_refused() -> None:
    pair = open_pair()
    pair.ask(7, "agent.ping")
    with pytest.raises(LocalProtocolError, match="msgid 7 is already outstanding"):
        pair.client.request(7, "agent.ping", {})
    with pytest.raises(RemoteProtocolError) as caught:
        pair.server.receive(encode(Request(7, "agent.ping", {})))
    assert caught.value.kind == "msgid"


# -- streams --------------------------------------------------------------------------------------


def test_bytes_behind_the_answer_to_attach_are_the_streams() -> None:
    pair = pair_in(State.ATTACHING)
    reply = pair.server.respond(2, {"offset": 5})
    raw = b"\xc1\xff not a message"
    assert pair.client.receive(reply + raw) == [Response(2, None, {"offset": 5})]
    assert pair.client.stream_bytes() == raw
    assert pair.client.stream_bytes() == b""
    assert pair.server.stream_bytes() == b""


def test_stream_bytes_need_a_stream() -> None:
    pair = open_pair()
    with pytest.raises(LocalProtocolError, match="no stream in state OPEN"):
        pair.client.stream_bytes()


def receive_in_pieces(connection: Connection, data: bytes, size: int, got: list[Message]) -> None:
    for at in range(0, len(data), size):
        got += connection.receive(data[at : at + size])
    connection.receive(b"")  # what came before a fault was returned first: now the fault


EARLY = [
    b"\0",
    b"\xc1",
    b"\x94",
    encode(Request(3, "agent.ping", {})),
    encode(Notification(CANCEL, {"msgid": 2})),
]


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("size", [1, 2, 1000])
def test_bytes_behind_attach_are_early_however_they_come(early: bytes, size: int) -> None:
    pair = open_pair()
    data = pair.client.request(2, ATTACH, {"container": "web"}) + early
    got: list[Message] = []
    with pytest.raises(RemoteProtocolError) as caught:
        receive_in_pieces(pair.server, data, size, got)
    assert got == [Request(2, ATTACH, {"container": "web"})]
    assert caught.value.kind == "early_bytes"
    assert pair.server.state is State.CLOSED


def test_an_event_that_crosses_attach_is_delivered() -> None:
    pair = open_pair()
    event = pair.server.notify(EVENT, {"seq": 1})
    attach = pair.client.request(2, ATTACH, {"container": "web"})
    assert pair.client.receive(event) == [Notification(EVENT, {"seq": 1})]
    pair.server.receive(attach)
    late = pair.server.notify(EVENT, {"seq": 2})
    assert len(pair.client.receive(late + pair.server.respond(2, {"offset": 0}) + b"raw")) == 2
    assert pair.client.stream_bytes() == b"raw"
    with pytest.raises(LocalProtocolError, match="server notification is not allowed in state STREAM"):
        pair.server.notify(EVENT, {"seq": 3})


def test_attach_needs_a_quiet_connection() -> None:
    pair = open_pair()
    pair.ask(2, "agent.ping")
    with pytest.raises(LocalProtocolError, match="nothing outstanding"):
        pair.client.request(3, ATTACH, {})
    with pytest.raises(RemoteProtocolError) as caught:
        pair.server.receive(encode(Request(3, ATTACH, {})))
    assert caught.value.kind == "busy"


# -- errors ---------------------------------------------------------------------------------------


def test_what_came_before_the_fault_is_delivered_first() -> None:
    pair = open_pair()
    good = encode(Request(2, "agent.ping", {}))
    assert pair.server.receive(good + b"\xc1") == [Request(2, "agent.ping", {})]
    assert pair.server.state is State.CLOSED
    for _ in range(2):
        with pytest.raises(RemoteProtocolError) as caught:
            pair.server.receive(b"")
        assert caught.value.kind == "malformed"


def test_the_farewell_tells_the_client_why() -> None:
    pair = open_pair()
    with pytest.raises(RemoteProtocolError) as seen:
        pair.server.receive(b"\xdd\xff\xff\xff\xff")
    with pytest.raises(RemoteProtocolError) as told:
        pair.client.receive(pair.server.farewell(seen.value))
    assert told.value.kind == "peer"
    assert seen.value.message in told.value.message
    assert pair.client.state is pair.server.state is State.CLOSED


@pytest.mark.parametrize("state", [State.FRESH, State.GREETING, State.OPEN, State.ATTACHING])
@pytest.mark.parametrize(
    "params", [{}, {"message": None}, {"message": ["x"]}, {"kind": 5, "message": b"\xff"}]
)
def test_a_farewell_is_understood_in_any_state_and_shape(state: State, params: dict[str, Any]) -> None:
    pair = pair_in(state)
    with pytest.raises(RemoteProtocolError) as caught:
        pair.client.receive(encode(Notification(PROTOCOL_ERROR, params)))
    assert caught.value.kind == "peer"


LEVELS: Any = {}
for _ in range(40):
    LEVELS = {"a": LEVELS}


@pytest.mark.parametrize(
    "params",
    [
        {"a": "x" * (1 << 20)},
        {"a": [{}] * (1 << 18)},
        LEVELS,
        {"a": msgpack.ExtType(1, b"x")},
        {"a": msgpack.Timestamp(1)},
        {"a": {1: 2}},
        {b"a": 1},
        {"a": {b"b": 1}},
        {"a": "\ud800"},
        {"a": 2**64},
        {"a": object()},
    ],
    ids=[
        "size",
        "values",
        "depth",
        "ext",
        "timestamp",
        "int key",
        "bytes key",
        "deep key",
        "utf8",
        "int",
        "object",
    ],
)
def test_what_the_peer_would_refuse_is_not_sent(params: dict[str, Any]) -> None:
    pair = open_pair()
    pair.ask(2, "agent.ping")
    with pytest.raises(LocalProtocolError, match="cannot be sent"):
        pair.client.request(3, "m", params)
    with pytest.raises(LocalProtocolError, match="cannot be sent"):
        pair.server.respond(2, params)
    with pytest.raises(LocalProtocolError, match="cannot be sent"):
        pair.server.notify(EVENT, params)
    assert pair.client.outstanding == 1
    assert pair.refuse(2) == [Response(2, ERROR.to_wire(), None)]  # the request can still be answered


def test_a_frame_of_exactly_the_limit_passes() -> None:
    limits = Limits(max_frame=100)
    client, server = Connection(Role.CLIENT, limits), Connection(Role.SERVER, limits)
    room = 100 - len(encode(Request(1, HELLO, {"client": "x" * 32})))
    frame = client.request(1, HELLO, {"client": "x" * (32 + room)})
    assert len(frame) == 100
    assert server.receive(frame)
    with pytest.raises(LocalProtocolError):
        client.notify("n", {"x": "y" * 100})


# -- any bytes, any split -------------------------------------------------------------------------

SMALL = Limits(max_frame=256, max_depth=6, max_values=60)

good_to_server = st.builds(
    Request, st.integers(1, 4), st.sampled_from(["agent.ping", ATTACH, HELLO]), st.just({})
) | st.builds(Notification, st.sampled_from([CANCEL, "later"]), st.just({"msgid": 1}))
good_to_client = st.builds(Response, st.integers(1, 4), st.none(), st.just({})) | st.builds(
    Notification, st.sampled_from([EVENT, PROTOCOL_ERROR]), st.just({})
)


def mixed(messages: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """Mostly messages, with noise in between and bytes that are flipped or lost."""
    return st.lists(messages.map(encode) | st.binary(max_size=6), max_size=8).map(b"".join)


def outcome(role: Role, data: bytes, cuts: list[int]) -> tuple[list[Message], str | None]:
    connection = Connection(role, SMALL)
    peer = Connection(Role.CLIENT if role is Role.SERVER else Role.SERVER, SMALL)
    if role is Role.SERVER:
        connection.receive(peer.request(0, HELLO, HELLO_PARAMS))
        connection.respond(0, {})
    else:
        peer.receive(connection.request(0, HELLO, HELLO_PARAMS))
        connection.receive(peer.respond(0, {}))
        for msgid in (1, 2, 3):
            connection.request(msgid, "agent.ping", {})
    got: list[Message] = []
    edges = [0, *sorted({min(cut, len(data)) for cut in cuts}), len(data)]
    try:
        for start, end in pairwise(edges):
            got += connection.receive(data[start:end])
            assert connection._scanner.buffered <= SMALL.max_frame + (end - start)
        got += connection.receive(b"")
    except RemoteProtocolError as error:
        return got, f"{error.kind}, {connection.state}, {connection._scanner.buffered} bytes kept"
    return got, None


@settings(deadline=None, max_examples=400)
@given(st.data())
@pytest.mark.parametrize("role", Role)
def test_any_bytes_at_any_split_come_to_the_same(role: Role, data: st.DataObject) -> None:
    stream = data.draw(mixed(good_to_server if role is Role.SERVER else good_to_client))
    cuts = data.draw(st.lists(st.integers(0, max(1, len(stream))), max_size=10))
    whole = outcome(role, stream, [])
    assert whole[1] is None or whole[1].endswith("CLOSED, 0 bytes kept")
    assert outcome(role, stream, cuts) == whole
    assert outcome(role, stream, list(range(len(stream)))) == whole


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=600), st.integers(1, 50))
def test_noise_never_escapes_as_something_else(data: bytes, size: int) -> None:
    for role in Role:
        assert outcome(role, data, list(range(0, len(data), size))) == outcome(role, data, [])


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.binary(max_size=10), max_size=3), max_size=6),
    st.integers(1, 30),
)
def test_valid_messages_survive_any_split(params: list[dict[str, Any]], size: int) -> None:
    pair = open_pair()
    frames = b"".join(pair.client.request(n, "agent.ping", value) for n, value in enumerate(params, 10))
    got: list[Message] = []
    for at in range(0, len(frames), size):
        got += pair.server.receive(frames[at : at + size])
    assert got == [Request(n, "agent.ping", value) for n, value in enumerate(params, 10)]
