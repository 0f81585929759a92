"""Every limit of the agent, exceeded by one client while another works on undisturbed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import msgpack
import pytest

from gcsagent.host.dialogue import Dialogue, greet
from gcsagent.host.errors import EventsMissed
from gcsagent.host.spec import exec_spec
from gcsagent.host.upgrade import upgrade
from protocol.address import parse_dial
from protocol.errors import Code, LocalProtocolError, RemoteProtocolError, RpcError
from protocol.families.events import Subscribe
from protocol.families.process import Exec
from protocol.limits import Limits
from protocol.types import Stdio, StreamMode, StreamSpec, WhenFull
from tests.cases.agents import RunningAgent, eventually, stopped_clean
from tests.cases.bystander import Bystander, undisturbed
from tests.cases.spine import close_box, open_box
from tests.cases.target import PIPES, Target, connect, created, creation, executing, name, refused

pytestmark = pytest.mark.timeout(120)
SECONDS = 100.0
STALL = 1.5
MIB = 1 << 20

LIMITS = {
    "max_frame": 2 * MIB,
    "max_in_flight_total": 300,
    "max_connections": 12,
    "max_unfinished": 16 * MIB,
    "max_stall_ms": int(STALL * 1000),
    "max_containers": 3,
    "max_execs": 4,
    "max_execs_total": 6,
    "max_runtime_calls": 3,
    "max_runtime_calls_total": 5,
    "max_spool_bytes": MIB,
    "max_log_bytes": MIB // 2,
    "max_event_bytes": 65_536,
    "max_upload_bytes": MIB,
}

GROWTH_KIB = 16 * 1024
"""What the agent may grow by while it is flooded: a few connections' full buffers, and the allocator's."""


@pytest.fixture(scope="module")
def tight_agent() -> Iterator[RunningAgent]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]
    yield from stopped_clean(RunningAgent("--log-level", "warning", *options))


@pytest.fixture
def tight(tight_agent: RunningAgent, rootfs: str) -> Iterator[Target]:
    target = Target(tight_agent.address, rootfs, box="box", pace=1.0, execs=4)
    asyncio.run(open_box(target))
    yield target
    asyncio.run(close_box(target))


def scene(target: Target, body: Callable[[Bystander], Awaitable[None]]) -> None:
    """Runs ``body`` beside somebody who must not notice."""

    async def both() -> None:
        async with asyncio.timeout(SECONDS), undisturbed(target) as bystander:
            await body(bystander)

    asyncio.run(both())


@contextlib.contextmanager
def exhausted(limit: str) -> Any:
    """The block must end with the error that names this limit and what it is."""
    with pytest.raises(RpcError) as caught:
        yield
    assert caught.value.code is Code.RESOURCE_EXHAUSTED, caught.value
    assert caught.value.details == {"limit": limit, "value": LIMITS[limit]}
    assert limit in caught.value.message
    assert str(LIMITS[limit]) in caught.value.message


@contextlib.asynccontextmanager
async def dialogue(target: Target) -> AsyncIterator[Dialogue]:
    """A bare connection that has said hello."""
    opened, _ = await greet(parse_dial(target.address), timeout=10.0, client_name="flood")
    try:
        yield opened
    finally:
        opened.close()


def test_hello_says_what_the_limits_are(tight: Target) -> None:
    async def ask() -> Limits:
        async with await connect(tight) as client:
            assert client.welcome is not None
            return client.welcome.limits

    assert asyncio.run(ask()) == Limits(**LIMITS)


# -- what is made -----------------------------------------------------------------------------------


def test_containers(tight: Target) -> None:
    async def body(bystander: Bystander) -> None:
        async with await connect(tight) as client, created(tight, client):
            async with created(tight, client):
                with exhausted("max_containers"):
                    await client.create_container(creation(tight, name("c"), ("true",)))
                await bystander.several()
            async with created(tight, client):  # deleted ones make room
                pass

    scene(tight, body)


def test_execs_of_one_container_and_of_all(tight: Target) -> None:
    def another(container: str) -> Exec:
        return Exec(container, name("p"), exec_spec(args=("sleep", "1000")))

    async def body(bystander: Bystander) -> None:
        async with await connect(tight) as client, contextlib.AsyncExitStack() as stack:
            mine = await stack.enter_async_context(created(tight, client))
            await mine.start()
            for _ in range(4):
                await client.exec_process(another(mine.container))
            with exhausted("max_execs"):
                await client.exec_process(another(mine.container))
            await client.exec_process(another(tight.box))  # the second in the box, the sixth of all
            await bystander.several()
            with exhausted("max_execs_total"):
                await client.exec_process(another(tight.box))
            state = await client.container_state(mine.container)
            last = state.processes[-1].process
            await client.kill_process(mine.container, last, "SIGKILL")
            await client.wait_process(mine.container, last)
            with exhausted("max_execs_total"):  # its record is still kept
                await client.exec_process(another(tight.box))
            await client.delete_process(mine.container, last)
            await client.exec_process(another(mine.container))

    scene(tight, body)


def spool(limit: int, when_full: WhenFull) -> Stdio:
    return Stdio(stdout=StreamSpec(StreamMode.SPOOL, limit, when_full))


@pytest.mark.parametrize(
    "limit, when_full", [("max_spool_bytes", WhenFull.BLOCK), ("max_log_bytes", WhenFull.DROP_OLDEST)]
)
def test_bytes_that_spools_may_keep_together(tight: Target, limit: str, when_full: WhenFull) -> None:
    half = LIMITS[limit] // 2

    async def body(bystander: Bystander) -> None:
        async with (
            await connect(tight) as client,
            created(tight, client, attached=False, stdio=spool(half, when_full)),
        ):
            params = Exec(tight.box, name("p"), exec_spec(args=("true",)), spool(half + 1, when_full))
            with exhausted(limit):
                await client.exec_process(params)
            with exhausted(limit):
                await client.create_container(
                    creation(tight, name("c"), ("true",), stdio=spool(half + 1, when_full))
                )
            await bystander.several()
            async with executing(
                client, tight.box, "true", attached=False, stdio=spool(half, when_full)
            ) as process:
                await process.wait()
                with exhausted(limit):  # until it is deleted
                    await client.exec_process(params)

    scene(tight, body)


def test_the_bytes_of_an_upgrade(tight: Target, tight_agent: RunningAgent) -> None:
    uploads = tight_agent.state_dir / "uploads"

    async def body(bystander: Bystander) -> None:
        async with await connect(tight) as client:
            with exhausted("max_upload_bytes"):
                await upgrade(client, bytes(MIB + 1))
            await bystander.several()
            with refused(Code.INVALID_ARGUMENT):  # it is no tar, and goes
                await upgrade(client, bytes(MIB))

    scene(tight, body)
    assert not any(uploads.iterdir())


def test_the_ring_of_events(tight: Target) -> None:
    """Events come and go until the first has left the ring; a subscriber who kept up has them all."""

    async def body(bystander: Bystander) -> None:
        async with await connect(tight) as client, await client.events() as events:
            async with dialogue(tight) as late:
                begin = (await late.ask("events.subscribe", Subscribe())).last
            seen = dropped = 0
            while not dropped:
                async with executing(client, tight.box, "true", attached=False) as process:
                    await process.wait()
                while seen < 2 * 20:
                    event = await anext(events)
                    assert event.seq > begin
                    seen += 1
                    if event.type == "process.exited":
                        break
                async with dialogue(tight) as late:
                    dropped = (await late.ask("events.subscribe", Subscribe(after=begin))).dropped
                    if dropped:
                        assert (await late.notification()).params["seq"] == begin + dropped + 1
            await bystander.several()
            assert events.dropped == 0
            async with await client.events(after=begin, strict=True) as late_comer:
                with pytest.raises(EventsMissed) as missed:
                    await anext(late_comer)
                assert missed.value.dropped == late_comer.dropped >= dropped
                assert (await anext(late_comer)).seq == begin + late_comer.dropped + 1

    scene(tight, body)


FEW = ("prlimit", "--nofile=1024:1024", "setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource")
"""Without that capability the supervisor cannot raise its limit, of which it keeps half for itself."""


def test_descriptors_that_the_supervisor_can_hold(rootfs: str) -> None:
    """Not a limit of the agent's: the machine's, and told as what it is."""

    async def fill(target: Target) -> None:
        async with (
            asyncio.timeout(SECONDS),
            undisturbed(target) as bystander,
            await connect(target) as client,
        ):

            def another(number: int) -> Exec:
                return Exec(target.box, f"p{number}", exec_spec(args=("sleep", "1000")), PIPES)

            made, problem = 0, None
            while problem is None:
                try:
                    await client.exec_process(another(made))
                    made += 1
                except RpcError as error:
                    problem = error
            assert problem.code is Code.RESOURCE_EXHAUSTED
            assert problem.details["errno"] == errno.EMFILE
            assert 100 < made < 200
            await bystander.several()
            await client.kill_process(target.box, "p0", "SIGKILL")
            await client.wait_process(target.box, "p0")
            await client.delete_process(target.box, "p0")
            await client.exec_process(another(made + 1))

    running = RunningAgent("--log-level", "warning", wrapper=FEW)
    for agent in stopped_clean(running):
        target = Target(agent.address, rootfs, box="box", pace=1.0, execs=4)
        asyncio.run(open_box(target))
        asyncio.run(fill(target))
        asyncio.run(close_box(target))


# -- connections and requests -----------------------------------------------------------------------


def test_connections(tight: Target) -> None:
    async def body(bystander: Bystander) -> None:
        async with contextlib.AsyncExitStack() as stack:
            with exhausted("max_connections"):
                for _ in range(LIMITS["max_connections"] + 1):
                    await stack.enter_async_context(dialogue(tight))
            await bystander.several()
        async with dialogue(tight):  # as soon as some are closed
            pass

    scene(tight, body)


def test_requests_in_flight_on_one_connection_and_in_all(tight: Target) -> None:
    """The bystander's own requests are among the first eight of its connection."""

    async def body(bystander: Bystander) -> None:
        async with dialogue(tight) as first, dialogue(tight) as second:
            waits = [("container.wait", {"container": tight.box})] * 300
            errors = await refusals(first, waits, 300 - 256)
            assert {error["details"]["limit"] for error in errors} == {"max_in_flight"}
            await bystander.several()
            errors = await refusals(second, waits, 256)  # 44 of it make 300
            assert {error["details"]["limit"] for error in errors} == {"max_in_flight_total"}
            assert {error["code"] for error in errors} == {"RESOURCE_EXHAUSTED"}
            assert {error["details"]["value"] for error in errors} == {300}
            await bystander.several()

    scene(tight, body)


async def refusals(
    opened: Dialogue, requests: list[tuple[str, dict[str, Any]]], count: int
) -> list[dict[str, Any]]:
    """Sends all of them at once; the ``count`` errors that come."""
    frames = [
        msgpack.packb([0, 100 + index, method, [params]]) for index, (method, params) in enumerate(requests)
    ]
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(opened.sock, b"".join(frames))
    unpacker = msgpack.Unpacker(raw=False)
    errors: list[dict[str, Any]] = []
    while len(errors) < count:
        unpacker.feed(await loop.sock_recv(opened.sock, 65536))
        errors += [message[2] for message in unpacker]
    return errors


def test_a_message_that_is_too_large(tight: Target) -> None:
    async def body(bystander: Bystander) -> None:
        async with dialogue(tight) as opened:
            await asyncio.get_running_loop().sock_sendall(opened.sock, b"\xdd\x00\x20\x00\x00")
            with pytest.raises(RemoteProtocolError, match=r"2097152 bytes \(max_frame\)"):
                await opened.notification()
            await bystander.several()
        async with await connect(tight) as client:
            with pytest.raises(LocalProtocolError, match="max_frame"):
                await client.create_container(creation(tight, name("c"), ("true",), spec=annotated(2 * MIB)))
            async with created(tight, client, spec=annotated(2 * MIB - 50_000)):
                pass

    scene(tight, body)


def annotated(size: int) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        spec["annotations"] = {"long": "x" * size}

    return change


# -- who floods, stalls, or is late -------------------------------------------------------------------


def flood(
    target: Target, frame: Callable[[int], bytes], count: int
) -> tuple[socket.socket, threading.Thread]:
    """Sends ``count`` frames and reads no answer, from a thread: it blocks when it is not read any more."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(target.address.removeprefix("unix:"))
    connection.sendall(msgpack.packb([0, 1, "agent.hello", [{"protocol_min": 1, "protocol_max": 1}]]))
    connection.recv(65536)

    def send() -> None:
        with contextlib.suppress(OSError):
            for first in range(0, count, 1000):
                connection.sendall(b"".join(frame(number) for number in range(first, first + 1000)))

    thread = threading.Thread(target=send)
    thread.start()
    return connection, thread


@pytest.mark.parametrize(
    "method, params",
    [
        ("agent.ping", {}),
        ("agent.info", {}),
        ("container.list", {}),
        ("no.such", {}),
        ("container.wait", {"container": "box"}),
    ],
)
def test_a_flood_of_requests_whose_answers_nobody_reads(
    tight: Target, tight_agent: RunningAgent, method: str, params: dict[str, Any]
) -> None:
    """A hundred thousand of them, from four connections: bounded memory, then the end of those who stall."""

    def frame(number: int) -> bytes:
        packed: bytes = msgpack.packb([0, number + 2, method, [params]])
        return packed

    async def body(bystander: Bystander) -> None:
        before = tight_agent.memory_kib()[1]
        floods = [flood(tight, frame, 25_000) for _ in range(4)]
        try:
            await bystander.several(10)
            grown = tight_agent.memory_kib()[1] - before
            assert grown < GROWTH_KIB, f"the agent grew by {grown} KiB"
            for _, thread in floods:  # cut off: they take nothing of what there is for them
                await asyncio.to_thread(thread.join, SECONDS)
        finally:
            for connection, _ in floods:
                connection.close()
        assert tight_agent.memory_kib()[1] - before < GROWTH_KIB

    async def with_long_answers() -> None:
        """What is listed takes 200 KiB: 64 KiB of requests ask for half a gigabyte."""
        async with (
            asyncio.timeout(SECONDS),
            await connect(tight) as client,
            created(tight, client, labels={"long": "x" * 200_000}),
            undisturbed(tight) as bystander,
        ):
            await body(bystander)

    held = tight_agent.holdings()
    asyncio.run(with_long_answers())
    tight_agent.assert_holds(held)


def test_a_flood_that_is_read_gets_every_answer(tight: Target) -> None:
    """It is slowed down, not cut off."""
    count = 20_000

    async def body(bystander: Bystander) -> None:
        connection, thread = flood(
            tight, lambda n: bytes(msgpack.packb([0, n + 2, "agent.ping", [{}]])), count
        )

        def answers() -> int:
            unpacker, seen = msgpack.Unpacker(raw=False), 0
            while seen < count:
                unpacker.feed(connection.recv(65536))
                seen += sum(1 for _ in unpacker)
            return seen

        try:
            assert await asyncio.to_thread(answers) == count
            await asyncio.to_thread(thread.join, SECONDS)
        finally:
            connection.close()
        await bystander.several()

    scene(tight, body)


def test_events_for_somebody_who_does_not_read(tight: Target, tight_agent: RunningAgent) -> None:
    async def body(bystander: Bystander) -> None:
        async with dialogue(tight) as lazy, await connect(tight) as client:
            await lazy.ask("events.subscribe", Subscribe(after=0))
            before = tight_agent.memory_kib()[1]
            for _ in range(40):
                async with executing(client, tight.box, "true", attached=False) as process:
                    await process.wait()
            assert tight_agent.memory_kib()[1] - before < GROWTH_KIB
            await bystander.several()

    scene(tight, body)


def late_with(opened: Dialogue, data: bytes) -> Awaitable[None]:
    return asyncio.get_running_loop().sock_sendall(opened.sock, data)


@pytest.mark.parametrize(
    "half",
    [
        b"\x94",
        msgpack.packb([0, 9, "agent.ping", [{}]])[:-1],
        b"\x94\x00\x01\xdb\x00\x0f\xff\x00" + b"x" * 100_000,
    ],
)
def test_half_a_message_and_then_nothing(tight: Target, half: bytes) -> None:
    async def body(bystander: Bystander) -> None:
        async with dialogue(tight) as opened:
            await late_with(opened, half)
            await bystander.several()
            with pytest.raises(RemoteProtocolError, match=f"did not come within {STALL} s"):
                await opened.notification()

    scene(tight, body)


def test_a_byte_now_and_then_is_late_too(tight: Target) -> None:
    async def body(bystander: Bystander) -> None:
        async with dialogue(tight) as opened:
            frame = b"\x94\x00\x01\xdb\x00\x0f\xff\x00" + b"x" * 10_000

            async def drip() -> None:
                with contextlib.suppress(OSError):
                    for byte in frame:
                        await late_with(opened, bytes([byte]))
                        await asyncio.sleep(STALL / 30)

            dripping = asyncio.create_task(drip())
            with pytest.raises(RemoteProtocolError, match="did not come within"):
                await opened.notification()
            dripping.cancel()
            await bystander.several()

    scene(tight, body)


def test_connections_that_say_nothing(tight: Target, tight_agent: RunningAgent) -> None:
    """Five hundred of them: who says hello gets in all the same, and they are gone before long."""

    async def body(bystander: Bystander) -> None:
        held = tight_agent.holdings()
        silent = []
        for _ in range(500):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, tight.address.removeprefix("unix:"))
            silent.append(connection)
        async with await connect(tight) as client:
            await client.ping()
        await bystander.several()
        agent = f"/proc/{tight_agent.agent_pid}/fd"
        assert await asyncio.to_thread(eventually, lambda: len(os.listdir(agent)) <= held.fds[1] + 8)
        for connection in silent:
            connection.close()

    scene(tight, body)


def test_unfinished_messages_together(tight: Target) -> None:
    """Ten times 1.9 MB of what never ends is more than 16 MiB: one has to go at once, others are late."""

    async def body(bystander: Bystander) -> None:
        async with contextlib.AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(dialogue(tight)) for _ in range(10)]
            half = b"\x94\x00\x01\xdb\x00\x1f\xff\x00" + b"x" * 1_900_000
            kinds = await asyncio.gather(*(told(each, half) for each in opened))
            assert "exhausted" in kinds
            assert set(kinds) <= {"exhausted", "late"}
            await bystander.several()

    scene(tight, body)


async def told(opened: Dialogue, data: bytes) -> str:
    """Sends; the kind that the agent's last notification names."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        await loop.sock_sendall(opened.sock, data)
    unpacker = msgpack.Unpacker(raw=False)
    while True:
        unpacker.feed(await loop.sock_recv(opened.sock, 65536))
        for message in unpacker:
            return str(message[2][0]["kind"])
