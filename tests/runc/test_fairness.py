"""Whose runtime call is next, with the real runc: one client's crowd is waited for by that client alone."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from gcsagent.host.spec import exec_spec
from protocol.errors import Code
from protocol.families.process import Exec
from protocol.types import Status
from tests.cases.agents import RunningAgent, eventually, stopped_clean
from tests.cases.target import Target, connect, created, refused, run, running

pytestmark = pytest.mark.timeout(180)

FLOOD = 256
STUCK = """#!/bin/sh
case " $* " in *" exec "*"{directory}/state/containers/$(cat "{directory}/stuck")/"*)
    echo "$*" >>"{directory}/begun"; cat "{directory}/gate";;
esac
exec {runc} "$@"
"""
"""runc, whose execs in the container named in ``stuck`` are noted in ``begun`` and wait at a gate."""


@dataclass(frozen=True, slots=True)
class Bench:
    directory: Path
    target: Target

    def begun(self) -> int:
        return len((self.directory / "begun").read_text().splitlines())

    def open_gate(self) -> None:
        """Whoever waits there goes on."""
        os.close(os.open(self.directory / "gate", os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture
def bench(tmp_path: Path, rootfs: str) -> Iterator[Bench]:
    tmp_path.chmod(0o711)
    os.mkfifo(tmp_path / "gate")
    (tmp_path / "stuck").write_text("nothing")
    (tmp_path / "begun").touch()
    wrapper = tmp_path / "runc"
    wrapper.write_text(STUCK.format(directory=tmp_path, runc=shutil.which("runc")))
    wrapper.chmod(0o755)
    options = ("--runtime", str(wrapper), "--max-runtime-calls=2", "--max-runtime-calls-total=3")
    for agent in stopped_clean(RunningAgent(*options, state_dir=tmp_path / "state")):
        yield Bench(tmp_path, Target(agent.address, rootfs, box="", pace=1.0, execs=1))


@asynccontextmanager
async def two_stuck(bench: Bench, client: Client, box: str) -> AsyncIterator[list[asyncio.Task[object]]]:
    """As many execs as a connection may have under way are, and do not go on before the end of this."""
    (bench.directory / "stuck").write_text(box)
    tasks: list[asyncio.Task[object]] = [
        asyncio.create_task(client.exec_process(command(box, f"stuck{number}"))) for number in range(2)
    ]
    try:
        assert await asyncio.to_thread(eventually, lambda: bench.begun() >= 2)
        yield tasks
    finally:
        (bench.directory / "stuck").write_text("nothing")
        bench.open_gate()
        await asyncio.gather(*tasks)


def command(box: str, process: str) -> Exec:
    return Exec(box, process, exec_spec(args=("sleep", "1000")))


def test_one_clients_hung_calls_are_waited_for_by_nobody_else(bench: Bench) -> None:
    """Not by another client, nor by what the same one does to end them: pause, resume, state, delete."""

    async def body() -> None:
        async with (
            await connect(bench.target) as client,
            await connect(bench.target) as other,
            running(bench.target, client) as init,
            running(bench.target, client) as victim,
            two_stuck(bench, client, init.container),
        ):
            waits = asyncio.create_task(client.exec_process(command(victim.container, "waits")))
            assert (await run(other, victim.container, "echo", "here")).stdout == b"here\n"
            async with created(bench.target, other) as another:
                await another.start()
            await client.pause_container(victim.container)
            await client.resume_container(victim.container)
            state = await client.container_state(victim.container, ask_runtime=True)
            assert state.runtime_view is not None
            assert (state.status, state.runtime_view.problem) == (Status.RUNNING, "")
            assert not waits.done()
            await client.delete_container(victim.container, force=True)
            with refused(Code.NOT_FOUND):
                await client.container_state(victim.container)
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)

    asyncio.run(body())


def test_what_ends_in_the_queue_has_started_nothing(bench: Bench) -> None:
    """Its deadline counts there, and so does cancelling it; what waits behind it is next."""

    async def body() -> None:
        async with await connect(bench.target) as client, running(bench.target, client) as init:
            box = init.container
            async with two_stuck(bench, client, box):
                with refused(Code.DEADLINE_EXCEEDED):
                    await client.call("process.exec", command(box, "late"), deadline=0.3)
                cancelled = asyncio.create_task(client.exec_process(command(box, "cancelled")))
                behind = asyncio.create_task(client.exec_process(command(box, "behind")))
                await client.ping()  # both have been read
                cancelled.cancel()
                await asyncio.gather(cancelled, return_exceptions=True)
                await client.ping()
                assert bench.begun() == 2
            await behind
            found = [each.process for each in (await client.container_state(box)).processes]
            assert sorted(found) == ["behind", "init", "stuck0", "stuck1"]
            again = command(box, "late")
            await client.exec_process(again)  # the id is free

    asyncio.run(body())


def test_another_client_is_answered_after_a_few_of_a_flood(agent: RunningAgent, rootfs: str) -> None:
    """One asks for 256 execs at once; another for one, behind them. Events say what was started before it."""
    target = Target(agent.address, rootfs, box="", pace=1.0, execs=1)

    async def body() -> None:
        async with (
            await connect(target) as crowd,
            await connect(target) as other,
            await connect(target) as watcher,
            running(target, crowd) as init,
            await watcher.events(container=init.container) as events,
        ):
            assert other.welcome is not None
            few = 4 * other.welcome.limits.max_runtime_calls
            flood = [
                asyncio.create_task(crowd.exec_process(command(init.container, f"f{number}")))
                for number in range(FLOOD)
            ]
            started: list[str] = []
            mine: asyncio.Task[object] | None = None
            async for event in events:
                if event.type != "process.started":
                    continue
                started.append(event.process)
                if mine is None:
                    mine = asyncio.create_task(other.exec_process(command(init.container, "mine")))
                if event.process == "mine":
                    break
            assert mine is not None
            await mine
            assert len(started) < few, started
            assert not all(task.done() for task in flood)
            await asyncio.gather(*flood)

    asyncio.run(body())
