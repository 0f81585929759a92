"""Cases about what the agent shows of itself and its containers: metrics, stacks, levels, the log."""

from __future__ import annotations

import asyncio

from gcsagent.host.agentlog import AgentLog
from gcsagent.host.client import Client
from gcsagent.host.metrics import metrics
from protocol.errors import Code
from protocol.families.diagnostics import AskLogs, AskMetrics, LogEntry, LogPage, Metrics, Stacks
from protocol.method import Empty
from protocol.types import Stdio
from tests import exposition
from tests.cases.target import OUTPUT, STREAM, Target, case, connect, raw_call, refused, running
from tests.exposition import Family


def value(families: dict[str, Family], name: str, **labels: str) -> float:
    return families[name].samples[name, tuple(sorted(labels.items()))]


async def look(client: Client) -> dict[str, Family]:
    return exposition.parse(await metrics(client))


@case
async def metrics_tell_of_agent_supervisor_and_containers(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(
            target, client, "sh", "-c", "echo hello; head -c 4000000 /dev/zero >&2; sleep 99", stdio=OUTPUT
        ) as init,
    ):
        assert await init.streams["stdout"].read() == b"hello\n"
        with refused(Code.NOT_FOUND):
            await raw_call(target, "container.state", {"container": "there-is-none"})
        with refused(Code.UNIMPLEMENTED):
            await raw_call(target, "no.such_method", {})
        _, before, found = [await look(client) for _ in range(3)]
        info, name = await client.info(), init.container
        assert value(found, "gcs_agent_generation") == info.generation
        assert value(found, "gcs_supervisor_agent_restarts_total") == info.generation - 1
        assert 1 << 22 < value(found, "gcs_agent_resident_memory_bytes") < 1 << 28
        assert 3 < value(found, "gcs_supervisor_held_fds") < value(found, "gcs_supervisor_max_held_fds")
        assert value(found, "gcs_supervisor_processes") >= 2
        assert value(found, "gcs_supervisor_calls_total") >= 2
        assert value(found, "gcs_agent_sessions") >= 1
        assert value(found, "gcs_agent_requests_in_flight") >= 1
        assert value(found, "gcs_agent_containers", status="running") == 2
        requests = "gcs_agent_requests_total"
        assert value(found, requests, method="container.state", code="NOT_FOUND") >= 1
        assert value(found, requests, method="unknown", code="UNIMPLEMENTED") >= 1
        metric = {"method": "agent.metrics", "code": "OK"}
        assert value(found, requests, **metric) > value(before, requests, **metric)
        durations = found["gcs_agent_request_duration_seconds"].samples
        took = durations["gcs_agent_request_duration_seconds_sum", (("method", "container.create"),)]
        assert 0.001 < took < 600
        assert value(found, "gcs_container_up", container=name) == 1
        assert value(found, "gcs_container_cpu_usage_seconds_total", container=name) > 0
        assert value(found, "gcs_container_memory_usage_bytes", container=name) > 0
        assert value(found, "gcs_container_pids", container=name) >= 1
        assert value(found, "gcs_container_oom_kills_total", container=name) == 0
        stdout = {"container": name, "process": "init", "stream": "stdout"}
        assert value(found, "gcs_stream_bytes_total", **stdout) == len("hello\n")
        assert value(found, "gcs_stream_queued_bytes", **stdout) == 0
        assert value(found, "gcs_stream_attached", **stdout) == 1
        assert value(found, "gcs_container_up", container=target.box) == 1


@case
async def a_stream_nobody_takes_from_shows_as_queued_and_blocked(target: Target) -> None:
    script = "head -c 8000000 /dev/zero; echo written >&2; sleep 99"
    async with (
        await connect(target) as client,
        running(target, client, "sh", "-c", script, stdio=Stdio(stdout=STREAM, stderr=STREAM)) as init,
    ):
        stdout = {"container": init.container, "process": "init", "stream": "stdout"}
        first = await look(client)
        while not value(first, "gcs_stream_blocked_seconds_total", **stdout):
            first = await look(client)  # until every buffer on the way to us is full
        assert value(first, "gcs_stream_queued_bytes", **stdout) > 0
        later = await look(client)
        blocked = "gcs_stream_blocked_seconds_total"
        assert value(later, blocked, **stdout) > value(first, blocked, **stdout)
        taken = 0
        while taken < 8_000_000:
            taken += len(await init.streams["stdout"].read())
        assert await init.streams["stderr"].read() == b"written\n"
        drained = await look(client)
        assert value(drained, "gcs_stream_queued_bytes", **stdout) == 0
        assert value(drained, "gcs_stream_bytes_total", **stdout) == 8_000_000


@case
async def metrics_come_page_by_page(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client) as one,
        running(target, client) as two,
    ):
        names = sorted([target.box, one.container, two.container])
        after, seen = None, list[str]()
        for name in names:
            page: Metrics = await client.call("agent.metrics", AskMetrics(after, 1))
            found = exposition.parse(page.text)
            assert ("gcs_agent_generation" in found) == (after is None)
            assert value(found, "gcs_container_up", container=name) == 1
            assert len(found["gcs_container_up"].samples) == 1
            seen, after = [*seen, name], page.next
        assert (seen, after) == (names, None)
        for field, wrong in (("limit", 0), ("limit", 257), ("after", "../x")):
            with refused(Code.INVALID_ARGUMENT, field=field):
                await raw_call(target, "agent.metrics", {field: wrong})


@case
async def stacks_show_who_waits_where(target: Target) -> None:
    async with await connect(target) as client, running(target, client) as init:
        wait = asyncio.create_task(client.wait_container(init.container))
        found: Stacks = await client.call("agent.stacks", Empty())
        while "in Lifecycle.wait" not in found.text:  # until the request has got so far
            found = await client.call("agent.stacks", Empty())
        assert not found.truncated
        assert "thread MainThread" in found.text
        assert "in stacks" in found.text
        wait.cancel()


@case
async def the_log_has_what_happens_and_says_when_there_is_more(target: Target) -> None:
    async with await connect(target) as client:
        log = AgentLog(client)
        log.after = await log.last()
        following = asyncio.create_task(_until_ended(log))
        async with running(target, client, "sh", "-c", "exit 7") as init:
            await init.wait()
            entry = await following
        assert (entry.source, entry.level, entry.fields["container"]) == ("agent", "info", init.container)
        assert entry.fields["exit_code"] == 7
        assert abs(entry.time_ns - (await client.info()).time_ns) < 600 * 10**9
        seen = [each.seq async for each in AgentLog(client).entries()]
        assert entry.seq in seen
        assert seen == list(range(seen[0], seen[-1] + 1))
        page: LogPage = await client.call("agent.logs", AskLogs(entry.seq - 1, 1))
        assert page.entries == (entry,)
        for field, wrong in (("limit", 0), ("after", -1), ("source", "x")):
            with refused(Code.INVALID_ARGUMENT, field=field):
                await raw_call(target, "agent.logs", {field: wrong})


async def _until_ended(log: AgentLog) -> LogEntry:
    async for entry in log.entries(follow=True):
        if entry.message == "process ended":
            return entry
    raise AssertionError("following ends only with an answer")
