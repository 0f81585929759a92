"""gcsctl top and events, against a scripted agent, on a pipe and on a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import termios
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from protocol.families.diagnostics import Metrics
from protocol.families.events import Subscribe, Subscribed
from protocol.types import Event
from tests.fakes.fake_agent import FakeAgent
from tests.gcsctl_process import SECONDS, gcsctl, running, until, with_agent

SAMPLES = {
    "gcs_guest_uptime_seconds": "{}",
    "gcs_guest_cpus": "2",
    'gcs_container_up{{container="{who}"}}': "1",
    'gcs_container_cpu_usage_seconds_total{{container="{who}"}}': "{}",
    'gcs_container_memory_usage_bytes{{container="{who}"}}': "1048576",
    'gcs_container_pids{{container="{who}"}}': "3",
    'gcs_container_up{{container="done"}}': "0",
}


def busy(agent: FakeAgent, who: str = "web") -> None:
    """Each reading is a guest second later, in which half a second of CPU time was used."""
    readings = 0

    def page(_params: object) -> Metrics:
        nonlocal readings
        readings += 1
        values = {"gcs_guest_uptime_seconds": readings, "gcs_container_cpu_usage": readings / 2}
        text, seen = "", set[str]()
        for key, value in SAMPLES.items():
            name = key.partition("{")[0]
            number = next((number for prefix, number in values.items() if name.startswith(prefix)), 0)
            if name not in seen:
                text += f"# HELP {name} x\n# TYPE {name} gauge\n"
            seen.add(name)
            text += f"{key.format(who=who)} {value.format(number)}\n"
        return Metrics(_together(text))

    agent.handlers["agent.metrics"] = page


def _together(text: str) -> str:
    """The second sample of a metric behind the first, as the format has it."""
    lines = text.splitlines()
    lines.insert(
        lines.index(next(each for each in lines if each.startswith("gcs_container_up"))) + 1, lines.pop()
    )
    return "".join(f"{line}\n" for line in lines)


def test_without_a_terminal_there_is_one_table(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        busy(agent, "we\\\\b\\n")
        shown = await gcsctl(agent, "top", "--interval", "0.05")
        assert (shown.code, shown.err) == (0, "")
        header, first, second = shown.out.splitlines()
        assert header.split()[:3] == ["CONTAINER", "CPU", "CPU"]
        assert first.split() == [
            "we\\b\\n",
            "50.0",
            "%",
            "1.0",
            "s",
            "1.0",
            "MiB",
            "-",
            "3",
            "0",
            "B",
            "0",
            "B",
            "0",
        ]
        assert second.split() == ["done", "-"]
        found = json.loads((await gcsctl(agent, "--json", "top", "--interval", "0.05")).out)
        assert (found[0]["cpu_percent"], found[0]["pids"], found[1]["running"]) == (50.0, 3, False)

    with_agent(tmp_path, body)


@pytest.mark.parametrize("end", ["q", "SIGTERM"])
def test_on_a_terminal_it_goes_on_until_told_and_restores_it(tmp_path: Path, end: str) -> None:
    async def body(agent: FakeAgent) -> None:
        busy(agent)
        main, side = pty.openpty()
        os.set_blocking(main, False)
        termios.tcsetwinsize(side, (3, 40))
        before = termios.tcgetattr(side)
        ends: dict[str, Any] = {"stdin": side, "stdout": side}
        async with asyncio.timeout(SECONDS), running(agent, "top", "--interval", "0.05", **ends) as process:
            seen = b""
            while seen.count(b"\x1b[H") < 3:
                seen += await _some(main)
            assert termios.tcgetattr(side) != before
            if end == "q":
                os.write(main, b"xq")
            else:
                process.terminate()
            assert await process.wait() == 0
            assert termios.tcgetattr(side) == before
            while not seen.endswith(b"\x1b[?25h\x1b[?1049l"):
                seen += await _some(main)
        assert seen.startswith(b"\x1b[?1049h\x1b[?25l\x1b[H2 containers, 2 CPUs")
        frames = seen.split(b"\x1b[H")[1:]
        assert all(frame.count(b"\r\n") == 2 for frame in frames[:3])
        os.close(main)
        os.close(side)

    with_agent(tmp_path, body)


@contextlib.asynccontextmanager
async def on_a_terminal(agent: FakeAgent) -> AsyncIterator[tuple[asyncio.subprocess.Process, int, int]]:
    """top, and both sides of its terminal; a group of its own, as a shell gives it."""
    main, side = pty.openpty()
    os.set_blocking(main, False)
    termios.tcsetwinsize(side, (5, 60))
    ends: dict[str, Any] = {"stdin": side, "stdout": side, "process_group": 0}
    try:
        async with asyncio.timeout(SECONDS), running(agent, "top", "--interval", "0.05", **ends) as process:
            yield process, main, side
    finally:
        os.close(main)
        os.close(side)


def test_an_agent_that_hangs_does_not_keep_anybody_in_it(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        busy(agent)
        answer, hanging = agent.handlers["agent.metrics"], asyncio.Event()

        async def metrics(params: Any) -> Any:
            if len(agent.named("agent.metrics")) > 3:
                hanging.set()
                await asyncio.Event().wait()
            return answer(params)

        agent.handlers["agent.metrics"] = metrics
        async with on_a_terminal(agent) as (process, _, _):
            await hanging.wait()
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
            assert time.monotonic() - begun < 5

    with_agent(tmp_path, body)


def test_stopped_it_gives_the_terminal_back(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        busy(agent)
        async with on_a_terminal(agent) as (process, main, side):
            seen = await _some(main)
            process.send_signal(signal.SIGTSTP)
            await until(lambda: _state(process.pid) == "T")
            assert termios.tcgetattr(side)[3] & termios.ICANON
            while not seen.endswith(b"\x1b[?25h\x1b[?1049l"):
                seen += await _some(main)
            process.send_signal(signal.SIGCONT)
            await until(lambda: not termios.tcgetattr(side)[3] & termios.ICANON)
            os.write(main, b"q")
            assert await process.wait() == 0

    with_agent(tmp_path, body)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def _some(fd: int) -> bytes:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
        return os.read(fd, 65536)
    finally:
        loop.remove_reader(fd)


def test_events_since_a_moment_of_one_container(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        def subscribe(params: Subscribe) -> Subscribed:
            loop = asyncio.get_running_loop()
            for seq in (1, 2, 3):
                event = Event(seq, "container.started", seq * 10**9, "web", data={"n": f"{seq}\x1b"})
                loop.call_later(0.05, agent.publish, event)
            return Subscribed(3, 4)

        agent.handlers["events.subscribe"] = subscribe
        argv = ("events", "-f", "--container", "web", "--since", "1970-01-01T00:00:02Z")
        pipe = asyncio.subprocess.PIPE
        async with asyncio.timeout(SECONDS), running(agent, *argv, stderr=pipe) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            line = await process.stdout.readline()
            assert line == b"1970-01-01T00:00:02Z container.started web n=2\\x1b\n"
            assert b"4 events were missed" in await process.stderr.readline()
        [asked] = agent.named("events.subscribe")
        assert asked == {"after": 0, "container": "web"}

    with_agent(tmp_path, body)


@pytest.mark.parametrize(
    "argv, shown",
    [
        ((), [1, 2, 3]),
        (("--after", "2"), [3]),
        (("--after", "3"), []),
        (("--container", "web"), [1]),
        (("--since", "1970-01-01T00:00:02Z"), [2, 3]),
    ],
)
def test_events_ends_with_the_newest_there_is(
    tmp_path: Path, argv: tuple[str, ...], shown: list[int]
) -> None:
    async def body(agent: FakeAgent) -> None:
        def subscribe(params: Subscribe) -> Subscribed:
            loop = asyncio.get_running_loop()
            for seq in (1, 2, 3):
                event = Event(seq, "container.started", seq * 10**9, "web" if seq == 1 else "db")
                loop.call_later(0.05, agent.publish, event)
            return Subscribed(3, 0)

        agent.handlers["events.subscribe"] = subscribe
        async with asyncio.timeout(SECONDS), running(agent, "events", "--json", *argv) as process:
            out, _ = await process.communicate()
        assert process.returncode == 0
        assert [json.loads(line)["seq"] for line in out.splitlines()] == shown

    with_agent(tmp_path, body)


def test_events_of_an_agent_that_has_none(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["events.subscribe"] = lambda params: Subscribed(0, 0)
        async with asyncio.timeout(SECONDS), running(agent, "events") as process:
            assert (await process.communicate())[0] == b""
        assert process.returncode == 0

    with_agent(tmp_path, body)
