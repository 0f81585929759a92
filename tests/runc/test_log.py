"""The log and its level across deaths of the agent."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterator

import pytest

from gcsagent.host.agentlog import AgentLog
from gcsagent.host.client import Client
from gcsagent.host.spec import container_spec
from protocol.errors import RpcError
from protocol.families.container import CreateContainer
from protocol.families.diagnostics import Level, LogEntry, LogLevel, SetLogLevel
from tests.cases.agents import RunningAgent, stopped_clean


@pytest.fixture
def fresh() -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent())


def test_the_log_goes_on_where_it_was_and_has_the_supervisors_lines_once(fresh: RunningAgent) -> None:
    async def everything(enough: int) -> list[LogEntry]:
        """All there is once the supervisor has said so often that an agent is ready."""
        async with await Client.connect(fresh.address) as client:
            found: list[LogEntry] = []
            async for entry in AgentLog(client).entries(follow=True):
                found.append(entry)
                if [each.message for each in found].count("agent ready") == enough:
                    return found
        raise AssertionError("following ends only with an answer")

    before = asyncio.run(everything(1))
    for generation in (2, 3):
        fresh.kill_agent()
        after = asyncio.run(everything(generation))
        assert after[: len(before)] == before
        assert [entry.seq for entry in after] == list(range(1, len(after) + 1))
        told = [
            (entry.message, entry.fields["generation"])
            for entry in after
            if entry.source == "supervisor" and entry.message in ("agent ready", "the agent ended")
        ]
        assert sorted(told) == sorted(
            [("agent ready", n) for n in range(1, generation + 1)]
            + [("the agent ended", n) for n in range(1, generation)]
        )
        assert [entry.fields["generation"] for entry in after if entry.message == "serving"] == list(
            range(1, generation + 1)
        )
        before = after


def test_a_level_that_was_set_outlives_the_agent_and_rules_the_supervisor(fresh: RunningAgent) -> None:
    async def level(wanted: Level | None = None) -> Level:
        async with await Client.connect(fresh.address) as client:
            found: LogLevel = await client.call("agent.log_level", SetLogLevel(wanted))
            return found.level

    async def debug_lines() -> int:
        async with await Client.connect(fresh.address) as client:
            return sum([entry.level == "debug" async for entry in AgentLog(client).entries()])

    assert asyncio.run(level()) is Level.INFO
    assert asyncio.run(debug_lines()) == 0
    assert asyncio.run(level(Level.DEBUG)) is Level.DEBUG
    fresh.kill_agent()
    assert asyncio.run(level()) is Level.DEBUG
    assert asyncio.run(debug_lines()) > 0
    asyncio.run(level(Level.ERROR))
    quiet = fresh.log_tail().count("\n")
    fresh.kill_agent()
    assert asyncio.run(level()) is Level.ERROR
    assert "the agent ended" not in "\n".join(fresh.log_tail().split("\n")[quiet:])


def test_a_runtime_call_that_failed_can_be_repeated_from_the_log(fresh: RunningAgent, rootfs: str) -> None:
    spec = container_spec(container="broken", rootfs=rootfs, args=("true",))
    spec["process"]["apparmorProfile"] = "no-such-profile"

    async def failed() -> LogEntry:
        async with await Client.connect(fresh.address) as client:
            with pytest.raises(RpcError, match="apparmor"):
                await client.create_container(CreateContainer("broken", spec=spec))
            found = [
                each async for each in AgentLog(client).entries() if each.message == "the runtime failed"
            ]
            return found[-1]

    entry = asyncio.run(failed())
    words = shlex.split(str(entry.fields["command"]))
    assert "create" in words
    assert words[-1] == "broken"
    assert entry.fields["status"] == 1
