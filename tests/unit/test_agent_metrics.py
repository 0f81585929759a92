"""Metrics: the format that is written, what is counted, and what the host makes of a hostile page."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from gcsagent.agent.seeing.exposition import Exposition
from gcsagent.agent.seeing.families import AGENT, CONTAINER
from gcsagent.agent.seeing.traffic import BUCKETS, UNKNOWN, Traffic
from gcsagent.agent.stopwatch import Stopwatch
from gcsagent.host.client import Client
from gcsagent.host.metrics import metrics, samples
from protocol.errors import Code, RemoteProtocolError, RpcError
from protocol.families.diagnostics import AskMetrics, Metrics
from tests import exposition
from tests.fakes.fake_agent import FakeAgent
from tests.gcsctl_process import gcsctl, with_agent

HOSTILE = 'a\\b"c\nd}, e="'
PAGES = {
    None: Metrics("# HELP up Is it.\n# TYPE up gauge\nup 1\n# HELP n Some.\n# TYPE n gauge\nn 2.5\n", "a"),
    "a": Metrics('# HELP up Is it.\n# TYPE up gauge\nup{c="b"} 0\n'),
}


def test_what_is_written_can_be_read_whatever_the_labels() -> None:
    page = Exposition({"x_total": ("counter", "Things."), "y": ("gauge", "Other things.")})
    page.add("x_total", 3, who=HOSTILE, why="")
    page.add("y", None)
    page.add("x_total", 1e-7)
    page.add("y", 1 << 60)
    found = exposition.parse(page.text())
    assert found["x_total"].samples == {
        ("x_total", (("who", HOSTILE), ("why", ""))): 3.0,
        ("x_total", ()): 1e-7,
    }
    assert found["y"].samples == {("y", ()): float(1 << 60)}
    assert len(page.text()) <= page.size < len(page.text()) + 200
    assert [each.labels for each in samples(page.text())] == [{"who": HOSTILE, "why": ""}, {}, {}]


@pytest.mark.parametrize("name", [*AGENT, *CONTAINER])
def test_names_have_their_units(name: str) -> None:
    kind, meaning = {**AGENT, **CONTAINER}[name]
    assert meaning.endswith(".")
    assert (kind == "counter") == name.endswith("_total")
    for wrong in ("_ms", "_us", "_kib", "_count", "_sum", "_bucket"):
        assert not name.endswith(wrong)


def test_requests_are_counted_by_what_the_contract_knows() -> None:
    traffic = Traffic()
    for method in ("agent.ping", "evil\n1", "evil\n2"):
        traffic.count(method)
    traffic.count("agent.ping", RpcError(Code.CANCELLED, "x"))
    assert traffic.answers == {"agent.ping": {"OK": 1, "CANCELLED": 1}, UNKNOWN: {"OK": 2}}
    now = time.monotonic()
    for ago in (0.0, BUCKETS[2] - 0.001, 3600.0):
        traffic.took("agent.ping", now - ago)
    latency = traffic.latencies["agent.ping"]
    assert sum(latency.counts) == 3
    assert latency.counts[-1] == 1
    assert latency.seconds >= 3600


def test_a_stopwatch_counts_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Stopwatch()
    watch.stop()
    watch.start()
    now[0] = 6.0
    watch.start()
    assert watch.seconds == 1.0
    now[0] = 7.5
    watch.stop()
    now[0] = 100.0
    assert watch.seconds == 2.5


def test_pages_become_one_text(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        def page(params: AskMetrics) -> Metrics:
            return PAGES[params.after]

        agent.handlers["agent.metrics"] = page
        shown = await gcsctl(agent, "metrics")
        assert (shown.code, shown.err) == (0, "")
        found = exposition.parse(shown.out)
        assert found["up"].samples == {("up", ()): 1.0, ("up", (("c", "b"),)): 0.0}
        printed = json.loads((await gcsctl(agent, "--json", "metrics")).out)
        assert printed[1] == {"name": "up", "labels": {"c": "b"}, "value": 0.0}

    with_agent(tmp_path, body)


@pytest.mark.parametrize(
    "text",
    [
        "up 1\n",
        "# HELP up x\nup \x1b[2J\n",
        '# HELP up x\nup{a="\x9b1"} 1\n',
        "# HELP up x\ndown 1\n",
        "\x1b\n",
    ],
)
def test_what_is_no_metric_is_not_shown(tmp_path: Path, text: str) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["agent.metrics"] = lambda params: Metrics(text)
        async with await Client.connect(agent.address) as client:
            with pytest.raises(RemoteProtocolError):
                await metrics(client)

    async def scenario() -> None:
        async with FakeAgent(tmp_path / "gcs.sock") as agent:
            await body(agent)

    asyncio.run(scenario())


def test_an_agent_that_turns_pages_for_ever_is_left(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["agent.metrics"] = lambda params: Metrics("# HELP up x\n# TYPE up gauge\nup 1\n", "a")
        shown = await gcsctl(agent, "metrics")
        assert (shown.code, len(agent.named("agent.metrics"))) == (0, 2)

    with_agent(tmp_path, body)
