"""Calls over the control connection: typed results, cancel, deadlines, loss, and agents that misbehave."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host import agentlog, caller
from gcsagent.host.agentlog import AgentLog
from gcsagent.host.client import Client
from gcsagent.host.dialogue import greet
from gcsagent.host.errors import (
    AgentSilent,
    ClosedByPeer,
    ClosedByUs,
    ConnectFailed,
    ConnectionBroken,
    ConnectionLost,
)
from gcsagent.host.storage import list_mounts
from protocol.errors import Code, LocalProtocolError, RemoteProtocolError, RpcError
from protocol.families.agent import Pong, Welcome
from protocol.families.container import CreateContainer, Created
from protocol.families.diagnostics import LogEntry, LogPage
from protocol.families.events import Subscribed
from protocol.framing import Response, encode
from protocol.limits import MAX_FRAME, MAX_IN_FLIGHT
from protocol.pods import PodMember, Sandbox
from protocol.schema import to_wire
from protocol.types import Status
from tests.fakes.fake_agent import FakeAgent, exit_record, raw_server, with_client
from tests.fuzz import vectors

PONG = Pong(1, 5, 7)
WELCOME = encode(Response(1, None, to_wire(Welcome(1, "fake", "boot", 1))))


def test_a_pod_is_not_asked_of_an_agent_that_would_ignore_it(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["container.create"] = lambda params: Created(77)
        for params in (
            CreateContainer("c1", spec={}, sandbox=Sandbox()),
            CreateContainer("c1", spec={}, pod=PodMember("web")),
        ):
            with pytest.raises(RpcError, match="has no pods") as caught:
                await client.create_container(params)
            assert caught.value.code is Code.UNIMPLEMENTED
        assert await client.create_container(CreateContainer("c1", spec={})) == Created(77)

    with_client(tmp_path, body)


def test_results_are_typed(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["agent.ping"] = lambda params: PONG
        agent.handlers["container.create"] = lambda params: Created(77)
        agent.handlers["container.state"] = lambda params: {
            "container": params.container,
            "status": "running",
            "pid": 9,
            "bundle": "/b",
            "created_at_ns": 1,
            "something_new": [1, 2, 3],
        }
        assert await client.ping() == PONG
        assert await client.create_container(CreateContainer("c1", spec={})) == Created(77)
        state = await client.container_state("c1")
        assert (state.container, state.status, state.pid) == ("c1", Status.RUNNING, 9)

    with_client(tmp_path, body)


def test_hello_names_the_client_and_keeps_the_welcome(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with FakeAgent(tmp_path / "s") as agent:
            async with await Client.connect(agent.address, client_name="me") as client:
                assert client.welcome is not None
                assert client.welcome.agent_version == "fake"
            assert agent.named("agent.hello") == [{"protocol_min": 1, "protocol_max": 1, "client": "me"}]

    asyncio.run(scenario())


def test_calls_run_at_once_and_are_answered_out_of_order(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        release = asyncio.Event()

        async def slow(params: Any) -> Any:
            await release.wait()
            return exit_record(7)

        agent.handlers["container.wait"] = slow
        agent.handlers["agent.ping"] = lambda params: PONG
        waiting = asyncio.create_task(client.wait_container("c"))
        assert await client.ping() == PONG
        assert not waiting.done()
        release.set()
        assert (await waiting).exit_code == 7

    with_client(tmp_path, body)


def test_the_envelope_is_beside_the_arguments(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["container.create"] = lambda params: Created(1)
        await client.create_container(CreateContainer("c", spec={}), deadline=1.5, request_id="r1")
        (sent,) = agent.named("container.create")
        assert (sent["deadline_ms"], sent["container"]) == (1500, "c")
        assert agent.request_ids("container.create") == ["r1"]
        assert "bundle" not in sent

    with_client(tmp_path, body)


def test_an_agents_error_keeps_code_message_and_details(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        def refuse(params: Any) -> None:
            raise RpcError(Code.NOT_FOUND, "no container 'c'", field="container")

        agent.handlers["container.start"] = refuse
        with pytest.raises(RpcError) as caught:
            await client.start_container("c")
        assert caught.value.code is Code.NOT_FOUND
        assert caught.value.message == "no container 'c'"
        assert caught.value.details == {"field": "container"}

    with_client(tmp_path, body)


@pytest.mark.parametrize("bad", ["", "../x", ".hidden", "a" * 300, "a/b", "a\0b", "ä"])
def test_bad_ids_are_refused_before_anything_is_sent(tmp_path: Path, bad: str) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        with pytest.raises(RpcError) as caught:
            await client.start_container(bad)
        assert caught.value.code is Code.INVALID_ARGUMENT
        assert caught.value.details["field"] == "container"
        assert agent.named("container.start") == []

    with_client(tmp_path, body)


def test_an_unknown_method_is_refused_here(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        with pytest.raises(RpcError) as caught:
            await client.call("no.such", CreateContainer("c"))
        assert caught.value.code is Code.UNIMPLEMENTED

    with_client(tmp_path, body)


def test_too_large_a_request_is_our_error_and_harms_nothing(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["agent.ping"] = lambda params: PONG
        with pytest.raises(LocalProtocolError, match="at most"):
            await client.create_container(CreateContainer("c", spec={"x": "y" * (MAX_FRAME + 1)}))
        assert await client.ping() == PONG

    with_client(tmp_path, body)


@pytest.mark.parametrize(
    "result", [None, [], {}, {"pid": "7"}, {"pid": True}, 5, "text", {"pid": None}], ids=repr
)
def test_a_malformed_result_is_the_peers_protocol_error(tmp_path: Path, result: Any) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["container.create"] = lambda params: result
        agent.handlers["agent.ping"] = lambda params: PONG
        with pytest.raises(RemoteProtocolError) as caught:
            await client.create_container(CreateContainer("c", spec={}))
        assert caught.value.kind == "result"
        assert await client.ping() == PONG

    with_client(tmp_path, body)


def test_cancelling_the_caller_cancels_the_request(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        begun = asyncio.Event()

        async def endless(params: Any) -> Any:
            begun.set()
            await asyncio.Event().wait()

        agent.handlers["container.wait"] = endless
        agent.handlers["agent.ping"] = lambda params: PONG
        waiting = asyncio.create_task(client.wait_container("c"))
        await begun.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await client.ping() == PONG  # and the late CANCELLED answer disturbs nobody
        assert agent.cancelled == ["container.wait"]

    with_client(tmp_path, body)


def test_a_silent_agent_is_given_up_on_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller, "GRACE_SECONDS", 0.05)

    async def body(agent: FakeAgent, client: Client) -> None:
        async def endless(params: Any) -> Any:
            await asyncio.Event().wait()

        agent.handlers["container.wait"] = endless
        agent.handlers["agent.ping"] = lambda params: PONG
        with pytest.raises(AgentSilent) as caught:
            await client.wait_container("c", deadline=0.05)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        await client.ping()
        assert agent.cancelled == ["container.wait"]

    with_client(tmp_path, body)


def test_too_many_requests_are_refused_here(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        async def endless(params: Any) -> Any:
            await asyncio.Event().wait()

        agent.handlers["container.wait"] = endless
        waiting = [asyncio.create_task(client.wait_container("c")) for _ in range(MAX_IN_FLIGHT)]
        await asyncio.sleep(0)
        with pytest.raises(RpcError) as caught:
            await client.ping()
        assert caught.value.code is Code.RESOURCE_EXHAUSTED
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    with_client(tmp_path, body)


# -- losing the connection ------------------------------------------------------------------------


def test_a_mutating_call_is_repeated_under_one_id_until_losses_are_too_many(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        def vanish(params: Any) -> Any:
            agent.drop_all()

        agent.handlers["container.start"] = vanish
        agent.handlers["agent.ping"] = lambda params: PONG
        with pytest.raises(ConnectionLost):
            await client.start_container("c")
        ids = agent.request_ids("container.start")
        assert len(ids) == 5
        assert len(set(ids)) == 1
        assert ids[0]
        assert await client.ping() == PONG

    with_client(tmp_path, body)


def test_a_wait_outlives_its_connection(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        tries = 0

        def wait(params: Any) -> Any:
            nonlocal tries
            tries += 1
            if tries < 3:
                agent.drop_all()
            return exit_record(3)

        agent.handlers["container.wait"] = wait
        assert (await client.wait_container("c")).exit_code == 3
        assert tries == 3

    with_client(tmp_path, body)


def test_a_subscription_is_made_despite_losses(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        def subscribe(params: Any) -> Any:
            if len(agent.named("events.subscribe")) < 3:
                agent.drop_all()
            return Subscribed(4, 0)

        agent.handlers["events.subscribe"] = subscribe
        async with await client.events(after=0) as events:
            assert events.last == 4
        assert len(agent.named("events.subscribe")) == 3

    with_client(tmp_path, body)


def test_those_who_wait_for_an_agent_give_up_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, tries = 20, 0

    async def counted(*args: Any, **more: Any) -> Any:
        nonlocal tries
        tries += 1
        return await greet(*args, **more)

    async def scenario() -> None:
        begun = asyncio.Semaphore(0)

        async def endless(params: Any) -> Any:
            begun.release()
            await asyncio.Event().wait()

        async with asyncio.timeout(20):
            async with FakeAgent(tmp_path / "s") as agent:
                agent.handlers["container.wait"] = endless
                client = await Client.connect(agent.address, timeout=5, patience=0.3)
                waiting = [asyncio.create_task(client.wait_container("c")) for _ in range(waits)]
                for _ in waiting:
                    await begun.acquire()
                monkeypatch.setattr(caller, "greet", counted)
            for each in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(each, ConnectFailed)
                assert "no agent answered in 0.3 s" in str(each)
            assert tries == 1
            with pytest.raises(ConnectFailed):
                await client.ping()
            assert tries == 2
            await client.aclose()

    asyncio.run(scenario())


def test_closing_ends_a_call_that_waits_for_an_agent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(20):
            async with FakeAgent(tmp_path / "s") as agent:
                client = await Client.connect(agent.address, timeout=5, patience=1000)
            calls = [asyncio.create_task(client.ping()) for _ in range(3)]
            await asyncio.sleep(0.05)  # one dials, two wait for it
            await client.aclose()
            for each in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(each, ClosedByUs)

    asyncio.run(scenario())


def test_a_request_id_lets_a_mutating_call_be_sent_again(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        def create(params: Any) -> Any:
            if len(agent.named("container.create")) == 1:
                agent.drop_all()
            return Created(5)

        agent.handlers["container.create"] = create
        created = await client.create_container(CreateContainer("c", spec={}), request_id="once")
        assert created == Created(5)
        assert agent.request_ids("container.create") == ["once", "once"]

    with_client(tmp_path, body)


LISTS: dict[str, tuple[str, Callable[[Client], Awaitable[tuple[Any, ...]]]]] = {
    "container.list": ("containers", lambda client: client.list_containers()),
    "container.processes": ("processes", lambda client: client.container_processes("web")),
    "storage.list": ("mounts", list_mounts),
}


@pytest.mark.parametrize("method", LISTS)
@pytest.mark.parametrize("entries", [0, 2])
def test_a_list_that_never_ends_is_left(tmp_path: Path, method: str, entries: int) -> None:
    """An agent that always has more, of nothing or of the same, must not keep a host asking."""
    field, ask = LISTS[method]
    golden = vectors.named("results")[method][3]
    page = {**golden, field: golden[field][:1] * entries, "left_out": 7}

    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers[method] = lambda params: page
        async with asyncio.timeout(10):
            assert len(await ask(client)) == entries * 2
        assert len(agent.named(method)) == (2 if entries else 1)

    with_client(tmp_path, body)


KEYS = {"container.list": "container", "container.processes": "pid", "storage.list": "mount"}


@pytest.mark.parametrize("method", LISTS)
def test_a_list_that_goes_on_for_ever_is_left(tmp_path: Path, method: str) -> None:
    """Something new on each page, and more to come."""
    field, ask = LISTS[method]
    golden = vectors.named("results")[method][3]
    entry, key = golden[field][0], KEYS[method]
    numbers = itertools.count(1)

    def page(params: Any) -> dict[str, Any]:
        number = next(numbers)
        return {**golden, field: [{**entry, key: number if key == "pid" else f"c{number:06}"}], "left_out": 7}

    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers[method] = page
        async with asyncio.timeout(30):
            with pytest.raises(RemoteProtocolError, match=f"{method} does not end after 1024 pages"):
                await ask(client)

    with_client(tmp_path, body)


def _entry(seq: int) -> LogEntry:
    return LogEntry(seq, 0, "info", "agent", "x", "y")


async def _all(entries: AsyncIterator[LogEntry]) -> list[int]:
    return [each.seq async for each in entries]


ASTRAY: dict[str, tuple[Callable[[int], LogPage], str]] = {
    "it never moves on": (lambda after: LogPage((_entry(7),), 9, 0), "came behind 7"),
    "always another": (lambda after: LogPage((_entry(after + 1),), after + 2, 0), "does not end"),
    "always anew": (lambda after: LogPage((_entry(5),) if not after else (), 6 - after, 0), "does not end"),
    "nothing to follow": (lambda after: LogPage((), after, 0), "there was none"),
    "numbers below none": (lambda after: LogPage((), -1, 0), "numbered from 1"),
}


@pytest.mark.parametrize("how", ASTRAY)
def test_a_log_that_leads_nowhere_is_left(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, said = ASTRAY[how]
    monkeypatch.setattr(agentlog, "MAX_PAGES", 40)

    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["agent.logs"] = lambda params: answer(params.after)
        read = AgentLog(client).entries(follow=said == "there was none")
        with pytest.raises(RemoteProtocolError, match=said) as caught:
            await asyncio.wait_for(_all(read), 10)
        assert caught.value.kind == "logs"
        assert len(agent.named("agent.logs")) <= agentlog.MAX_PAGES + 1

    with_client(tmp_path, body)


def test_a_log_that_begins_anew_is_read_from_there(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["agent.logs"] = lambda params: (
            LogPage((), 2, 0) if params.after > 2 else LogPage((_entry(1), _entry(2)), 2, 0)
        )
        assert await _all(AgentLog(client, after=9).entries()) == [1, 2]

    with_client(tmp_path, body)


def test_an_agent_that_always_hangs_up_is_given_up_on(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["container.wait"] = lambda params: agent.drop_all()
        with pytest.raises(ConnectionLost):
            await client.wait_container("c")
        assert len(agent.named("container.wait")) == 5

    with_client(tmp_path, body)


def test_who_ended_the_connection_can_be_told_apart(tmp_path: Path) -> None:
    async def ended_by(act: Callable[[asyncio.StreamWriter], None]) -> type[BaseException]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(65536)
            writer.write(WELCOME)
            await reader.read(1)
            act(writer)
            await reader.read()

        async with raw_server(tmp_path / act.__name__, serve) as path:
            client = await Client.connect(f"unix:{path}", timeout=5)
            with pytest.raises((ConnectionLost, RemoteProtocolError)) as caught:
                await client.start_container("c")
            await client.aclose()
            return caught.type

    def closes(writer: asyncio.StreamWriter) -> None:
        writer.write_eof()

    def violates(writer: asyncio.StreamWriter) -> None:
        writer.write(b"\xc1")

    async def scenario() -> None:
        assert await ended_by(closes) is ClosedByPeer
        assert await ended_by(violates) is RemoteProtocolError

    asyncio.run(scenario())


def test_a_reset_is_a_broken_connection(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(WELCOME)
        await writer.drain()
        # Closing a UNIX socket with unread bytes in it resets the peer (unix(7)).
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await reset.wait()

    reset = asyncio.Event()

    async def scenario() -> None:
        async with raw_server(tmp_path / "s", serve) as path:
            client = await Client.connect(f"unix:{path}", timeout=5)
            starting = asyncio.create_task(client.start_container("c"))
            await asyncio.sleep(0.05)
            reset.set()
            with pytest.raises(ConnectionBroken):
                await starting
            await client.aclose()

    asyncio.run(scenario())


def test_a_closed_client_says_so(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        begun = asyncio.Event()

        async def endless(params: Any) -> Any:
            begun.set()
            await asyncio.Event().wait()

        agent.handlers["container.wait"] = endless
        waiting = asyncio.create_task(client.wait_container("c"))
        await begun.wait()
        await client.aclose()
        with pytest.raises(ClosedByUs):
            await waiting
        with pytest.raises(ClosedByUs):
            await client.ping()

    with_client(tmp_path, body)


# -- hostile agents -------------------------------------------------------------------------------

HOSTILE = {
    "garbage": (b"\xc1", "malformed"),
    "http": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "malformed"),
    "oversized string": (b"\x94\x01\x01\xc0\xdb\xff\xff\xff\xff", "oversized"),
    "oversized array": (b"\x94\x01\x01\xc0\xdd\xff\xff\xff\xff", "oversized"),
    "too deep": (b"\x91" * 100, "depth"),
    "not a message": (b"\x01", "malformed"),
    "a request": (b"\x94\x00\x01\xa1x\x91\x80", "direction"),
    "an answer to nothing": (b"\x94\x01\xcd\x30\x39\xc0\xc0", "msgid"),
    "not UTF-8": (b"\x94\x01\x02\xc0\xa2\xff\xfe", "utf8"),
    "error and result": (b"\x94\x01\x02\x80\x80", "malformed"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("bytewise", [False, True])
def test_hostile_bytes_after_hello_fail_the_call_with_one_typed_error(
    tmp_path: Path, name: str, bytewise: bool
) -> None:
    data, kind = HOSTILE[name]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(WELCOME)
        await reader.read(65536)
        for piece in [data[i : i + 1] for i in range(len(data))] if bytewise else [data]:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    async def scenario() -> None:
        async with raw_server(tmp_path / "s", serve) as path:
            client = await Client.connect(f"unix:{path}", timeout=5)
            with pytest.raises(RemoteProtocolError) as caught:
                await client.start_container("c")
            assert caught.value.kind == kind
            await client.aclose()

    asyncio.run(scenario())


def refused(tmp_path: Path, first: bytes) -> None:
    """What an agent says to hello ends connecting at once."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(first)
        await reader.read()

    async def scenario() -> None:
        async with raw_server(tmp_path / "s", serve) as path:
            with pytest.raises(RemoteProtocolError):
                await Client.connect(f"unix:{path}", timeout=5)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "name", sorted(set(HOSTILE) - {"error and result", "an answer to nothing", "not UTF-8"})
)
def test_hostile_bytes_instead_of_hello_end_connect_at_once(tmp_path: Path, name: str) -> None:
    refused(tmp_path, HOSTILE[name][0])


def test_garbage_behind_the_welcome_is_noticed(tmp_path: Path) -> None:
    refused(tmp_path, WELCOME + b"\xc1")


def test_an_agent_closing_in_the_middle_of_a_frame(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(WELCOME)
        await reader.read(65536)
        writer.write(b"\x94\x01\x01")
        writer.write_eof()
        await reader.read()

    async def scenario() -> None:
        async with raw_server(tmp_path / "s", serve) as path:
            client = await Client.connect(f"unix:{path}", timeout=5)
            with pytest.raises(ClosedByPeer):
                await client.start_container("c")
            await client.aclose()

    asyncio.run(scenario())


def test_the_agents_last_words_are_passed_on(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(WELCOME)
        await reader.read(65536)
        writer.write(b"\x93\x02\xa9rpc.error\x91\x82\xa4kind\xa5state\xa7message\xa4oops")
        await reader.read()

    async def scenario() -> None:
        async with raw_server(tmp_path / "s", serve) as path:
            client = await Client.connect(f"unix:{path}", timeout=5)
            with pytest.raises(RemoteProtocolError, match="oops") as caught:
                await client.start_container("c")
            assert caught.value.kind == "peer"
            await client.aclose()

    asyncio.run(scenario())


def test_a_version_nobody_offered_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with FakeAgent(tmp_path / "s") as agent:
            agent.handlers["agent.hello"] = lambda params: Welcome(99, "v", "b", 1)
            with pytest.raises(RemoteProtocolError) as caught:
                await Client.connect(agent.address, timeout=5)
            assert caught.value.kind == "version"

    asyncio.run(scenario())


def test_a_refused_hello_is_not_retried(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with FakeAgent(tmp_path / "s") as agent:

            def refuse(params: Any) -> Any:
                raise RpcError(Code.UNIMPLEMENTED, "speak protocol 2")

            agent.handlers["agent.hello"] = refuse
            with pytest.raises(RpcError, match="speak protocol 2"):
                await Client.connect(agent.address, timeout=5)
            assert len(agent.named("agent.hello")) == 1

    asyncio.run(scenario())


def test_an_agent_that_never_says_hello_is_a_failed_connect(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def scenario() -> None:
        async with raw_server(tmp_path / "s", serve) as path:
            with pytest.raises(ConnectFailed, match=r"no agent answered in 0\.1 s"):
                await Client.connect(f"unix:{path}", timeout=0.1)

    asyncio.run(scenario())
