"""agent.metrics: numbers for Prometheus, page by page, read when they are asked for and never otherwise."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from itertools import accumulate
from typing import Any

from gcsagent import __version__
from gcsagent.agent import proc
from gcsagent.agent.call import Call
from gcsagent.agent.registry import Registry
from gcsagent.agent.seeing.containers import add_container
from gcsagent.agent.seeing.exposition import Exposition
from gcsagent.agent.seeing.families import AGENT, CONTAINER
from gcsagent.agent.seeing.traffic import BUCKETS, Traffic
from gcsagent.agent.supervisor_client import SupervisorError
from protocol.families.diagnostics import AskMetrics, Metrics

ROOM = 512 << 10
"""Characters of a page from which on it takes no further container; one takes some 100 KiB at the most."""

_PAGE = os.sysconf("SC_PAGE_SIZE")


class MetricsService:
    def __init__(self, registry: Registry, generation: int, supervisor_pid: int, started: float) -> None:
        self._registry, self._generation, self._supervisor_pid = registry, generation, supervisor_pid
        self._started = started

    async def metrics(self, params: AskMetrics, _call: Call) -> Metrics:
        """The first page is about agent, supervisor and guest, too."""
        page = Exposition({**AGENT, **CONTAINER})
        if params.after is None:
            await self._add_agent(page)
        names = sorted(name for name in self._registry.containers if name > (params.after or ""))
        last = None
        for name in names[: params.limit]:
            await asyncio.sleep(0)  # each is some milliseconds of files
            container = self._registry.containers.get(name)
            if container is not None:
                add_container(page, container)
            last = name
            if page.size > ROOM:
                break
        return Metrics(page.text(), last if last is not None and last != names[-1] else None)

    async def _add_agent(self, page: Exposition) -> None:
        registry = self._registry
        before = time.monotonic()
        await asyncio.sleep(0)
        page.add("gcs_agent_event_loop_lag_seconds", time.monotonic() - before)
        page.add("gcs_agent_info", 1, version=__version__, code=os.environ.get("GCS_CODE", ""))
        page.add("gcs_agent_generation", self._generation)
        page.add("gcs_agent_uptime_seconds", time.monotonic() - self._started)
        page.add("gcs_agent_cpu_seconds_total", time.process_time())
        page.add("gcs_agent_resident_memory_bytes", _resident("self"))
        page.add("gcs_agent_open_fds", _descriptors("self"))
        page.add("gcs_agent_tasks", len(asyncio.all_tasks()))
        page.add("gcs_agent_sessions", registry.bounds.sessions)
        page.add("gcs_agent_requests_in_flight", registry.bounds.in_flight)
        page.add("gcs_agent_events_total", registry.events.last)
        statuses = Counter(container.status.value for container in registry.containers.values())
        for status, count in sorted(statuses.items()):
            page.add("gcs_agent_containers", count, status=status)
        page.add("gcs_agent_processes", sum(process.alive for _, process in registry.processes()))
        _add_traffic(page, registry.traffic)
        await self._add_supervisor(page)
        memory = proc.meminfo()
        page.add("gcs_guest_uptime_seconds", proc.uptime())
        page.add("gcs_guest_memory_total_bytes", memory.get("MemTotal", 0) << 10)
        page.add("gcs_guest_memory_available_bytes", memory.get("MemAvailable", 0) << 10)
        page.add("gcs_guest_cpus", len(os.sched_getaffinity(0)))

    async def _add_supervisor(self, page: Exposition) -> None:
        page.add("gcs_supervisor_agent_restarts_total", self._generation - 1)
        page.add("gcs_supervisor_resident_memory_bytes", _resident(self._supervisor_pid))
        page.add("gcs_supervisor_open_fds", _descriptors(self._supervisor_pid))
        try:
            stats: dict[str, Any] = await self._registry.keeper.supervisor.call("stats", {})
        except SupervisorError:
            return  # an earlier version's, which cannot say
        for key, value in stats.items():
            if f"gcs_supervisor_{key}" in AGENT:
                page.add(f"gcs_supervisor_{key}", value)


def _add_traffic(page: Exposition, traffic: Traffic) -> None:
    for method, codes in sorted(traffic.answers.items()):
        for code, count in sorted(codes.items()):
            page.add("gcs_agent_requests_total", count, method=method, code=code)
    name = "gcs_agent_request_duration_seconds"
    for method, latency in sorted(traffic.latencies.items()):
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), accumulate(latency.counts), strict=True):
            page.add(name, count, "_bucket", method=method, le=bound)
        page.add(name, latency.seconds, "_sum", method=method)
        page.add(name, sum(latency.counts), "_count", method=method)


def _resident(pid: int | str) -> int | None:
    """proc_pid_statm(5); getrusage(2) would only know the most there has been."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None


def _descriptors(pid: int | str) -> int | None:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
