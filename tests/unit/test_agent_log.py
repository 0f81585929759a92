"""The log ring: bounded, honest about what it lost, proof against whatever is logged; the kernel's log."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent.call import Call
from gcsagent.agent.logs import context
from gcsagent.agent.seeing.logread import LogService
from gcsagent.agent.seeing.logring import LogRing
from gcsagent.agent.seeing.stacks import stacks
from protocol.errors import Code, RpcError
from protocol.families.diagnostics import AskLogs, LogEntry, LogPage, LogSource, Stacks
from protocol.method import Empty
from tests.fakes import watched_loop
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.fake_supervisor import FakeSupervisor
from tests.gcsctl_process import gcsctl, with_agent

_log = context(logging.getLogger("test.ring"))


def logged(ring: LogRing) -> logging.Logger:
    logger = logging.getLogger("test.ring")
    logger.handlers[:] = [ring]
    logger.setLevel("DEBUG")
    return logger


async def page(ring: LogRing, **asked: Any) -> LogPage:
    return await LogService(ring).logs(AskLogs(**asked), Call("agent.logs", None, _log))


def test_lines_are_numbered_and_what_left_the_ring_is_counted() -> None:
    async def scenario() -> None:
        ring = LogRing(None, 3, 32 << 10)
        logger = logged(ring)
        for number in range(500):
            logger.info("line %d", number, extra={"container": "c"})
        last = await page(ring, after=499)
        assert (last.last, last.dropped, last.entries[0].message) == (500, 0, "line 499")
        assert last.entries[0].fields == {"container": "c"}
        found = await page(ring, limit=1000)
        assert found.entries[-1] == last.entries[0]
        assert 50 < len(found.entries) == 500 - found.dropped
        assert [entry.seq for entry in found.entries] == list(range(found.dropped + 1, 501))
        again = LogRing(ring.ring.fd, 4)
        assert (await page(again, limit=1000)) == found
        logged(again).warning("later")
        [entry] = (await page(again, after=500)).entries
        assert (entry.seq, entry.level, entry.generation) == (501, "warning", 4)

    watched_loop.run(scenario())


def test_whatever_is_logged_fits() -> None:
    async def scenario() -> None:
        ring = LogRing(None, 1)
        logger = logged(ring)
        logger.error("x" * 100_000, extra={f"f{n}": object() for n in range(100)})
        logger.error("\ud800\x1b[2J", extra={"big": 1 << 90, "text": "y" * 100_000, "none": None, "ok": 1.5})
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("a fault")
        long, odd, fault = (await page(ring)).entries
        assert len(long.message) < 5000
        assert len(long.fields) == 32
        assert odd.message == "?\x1b[2J"
        assert odd.fields["big"] == str(1 << 90)
        assert (odd.fields["none"], odd.fields["ok"]) == (None, 1.5)
        assert len(odd.fields["text"]) < 1100
        assert "ValueError: why" in fault.fields["exc_info"]

    watched_loop.run(scenario())


def test_following_waits_for_a_line_and_no_longer() -> None:
    async def scenario() -> None:
        ring = LogRing(None, 1)
        waiting = asyncio.create_task(page(ring, follow=True))
        await asyncio.sleep(0)
        assert not waiting.done()
        logged(ring).info("now")
        async with asyncio.timeout(10):
            assert [entry.message for entry in (await waiting).entries] == ["now"]
        given_up = asyncio.create_task(page(ring, after=1, follow=True))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert not ring._followers

    watched_loop.run(scenario())


def line(number: int) -> dict[str, Any]:
    return {"number": number, "time_ns": 5, "level": "info", "message": f"said {number}", "pid": number}


def test_the_supervisors_lines_come_once_and_what_it_forgot_is_told() -> None:
    async def scenario() -> None:
        supervisor, ring = FakeSupervisor(), LogRing(None, 1)
        ring.follow(supervisor.client)
        for after, lines in ((0, [line(1), line(2)]), (2, [line(2), line(6)]), (6, [])):
            ident, asked = await supervisor.asked("log")
            assert asked == {"after": after}
            supervisor.answer(ident, lines)
        supervisor.notify("log", {})
        ident, asked = await supervisor.asked("log")
        assert asked == {"after": 6}
        supervisor.refuse(ident, "no")
        found = (await page(ring)).entries
        assert [entry.message for entry in found] == [
            "said 1",
            "said 2",
            "lines of the log were lost",
            "said 6",
        ]
        assert found[2].fields == {"lines": 3}
        ring.ring.mark = 2  # killed between the copy and its mark
        assert LogRing(ring.ring.fd, 2).ring.mark == 6
        supervisor.close()

    watched_loop.run(scenario())


def test_the_kernels_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        read_end, write_end = os.pipe()
        service = LogService(LogRing(None, 1), f"/proc/self/fd/{read_end}")
        os.write(write_end, b"3,7,1000000,-;disk \\x1b is bad\n SUBSYSTEM=x\n")
        found = await service.logs(
            AskLogs(source=LogSource.KERNEL, follow=True), Call("agent.logs", None, _log)
        )
        [entry] = found.entries
        assert (entry.seq, entry.level, entry.source, entry.name) == (8, "error", "kernel", "kernel")
        assert entry.message == "disk \x1b is bad"
        assert (found.last, found.dropped) == (8, 7)
        os.close(read_end)
        os.close(write_end)
        missing = LogService(LogRing(None, 1), str(tmp_path / "none"))
        with pytest.raises(RpcError) as caught:
            await missing.logs(AskLogs(source=LogSource.KERNEL), Call("agent.logs", None, _log))
        assert caught.value.code is Code.UNAVAILABLE

    watched_loop.run(scenario())


def test_stacks_go_down_to_what_is_waited_for() -> None:
    async def inner() -> None:
        await asyncio.Event().wait()

    async def outer() -> None:
        await inner()

    async def scenario() -> None:
        tasks = [asyncio.create_task(outer(), name=f"waiter {n}") for n in range(12)]
        await asyncio.sleep(0)
        found = stacks(Empty(), Call("agent.stacks", None, _log))
        assert "12 tasks waiter" in found.text
        assert "and 4 more" in found.text
        assert found.text.index(".outer") < found.text.index(".inner") < found.text.index("waits for Future")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    watched_loop.run(scenario())


ENTRIES = tuple(
    LogEntry(seq, seq * 10**9, "info", "agent", "agent.x", f"line {seq}\x1b[2J", {"to": "a\nb"}, 1)
    for seq in range(4, 9)
)


def test_gcsctl_shows_logs_stacks_and_levels(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        def pages(asked: AskLogs) -> LogPage:
            found = tuple(entry for entry in ENTRIES if entry.seq > asked.after)[:3]
            return LogPage(found, 8, max(0, 3 - asked.after))

        agent.handlers["agent.logs"] = pages
        shown = await gcsctl(agent, "agent-logs")
        assert shown.code == 0
        assert "3 entries before these are no longer there" in shown.err
        lines = shown.out.splitlines()
        assert len(lines) == 5
        assert lines[0] == "1970-01-01T00:00:04.000Z INFO agent.x: line 4\\x1b[2J to=a\\nb"
        tail = await gcsctl(agent, "--json", "agent-logs", "--tail", "2", "--kernel")
        assert [json.loads(each)["seq"] for each in tail.out.splitlines()] == [7, 8]
        assert all(call["source"] == "kernel" for call in agent.named("agent.logs")[-2:])
        since = await gcsctl(agent, "agent-logs", "--since", "1970-01-01T00:00:07Z")
        assert len(since.out.splitlines()) == 2
        agent.handlers["agent.stacks"] = lambda params: Stacks("thread \x1b:\n    x\n", True)
        shown = await gcsctl(agent, "stacks")
        assert shown.out == "thread \\x1b:\n    x\n"
        assert "more than fits" in shown.err
        agent.handlers["agent.log_level"] = lambda params: {"level": params.level or "info"}
        assert (await gcsctl(agent, "log-level")).out == "info\n"
        assert json.loads((await gcsctl(agent, "--json", "log-level", "debug")).out) == {"level": "debug"}
        assert (await gcsctl(agent, "log-level", "loud")).code == 125

    with_agent(tmp_path, body)
