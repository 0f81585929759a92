"""The metrics of one container: its cgroup's numbers, its streams'."""

from __future__ import annotations

from itertools import islice

from gcsagent.agent.cgroup_stats import read_stats
from gcsagent.agent.container import Container
from gcsagent.agent.process import Process
from gcsagent.agent.seeing.exposition import Exposition
from protocol.types import Status, StreamMode
from protocol.usage import ContainerStats, Pressure

MAX_PROCESSES = 32
"""Processes of a container whose streams are shown, live ones first: bounds the series of one container."""

MICRO = 1e-6


def add_container(page: Exposition, container: Container) -> None:
    """All there is about it. A file of its cgroup that is gone leaves its numbers out."""
    name = container.ident
    page.add("gcs_container_up", int(container.status in (Status.RUNNING, Status.PAUSED)), container=name)
    alive = sum(process.alive for process in container.processes.values())
    page.add("gcs_container_processes", alive, container=name)
    if container.status in (Status.CREATED, Status.RUNNING, Status.PAUSED):
        _add_usage(page, name, read_stats(name, container.cgroup))
    processes = sorted(container.processes.values(), key=lambda each: (not each.is_init, not each.alive))
    for process in islice(processes, MAX_PROCESSES):
        _add_streams(page, name, process)
    left_out = sum(len(process.streams) for process in processes[MAX_PROCESSES:])
    page.add("gcs_container_streams_left_out", left_out or None, container=name)


def _add_usage(page: Exposition, name: str, stats: ContainerStats) -> None:
    memory, cpu, pids, io = stats.memory, stats.cpu, stats.pids, stats.io
    values: dict[str, float | None] = {
        "memory_usage_bytes": memory.current,
        "memory_working_set_bytes": memory.working_set,
        "memory_limit_bytes": memory.limit,
        "memory_peak_bytes": memory.peak,
        "memory_anon_bytes": memory.anon,
        "memory_file_bytes": memory.file,
        "memory_kernel_bytes": memory.kernel,
        "memory_swap_bytes": memory.swap,
        "page_faults_total": memory.page_faults,
        "major_page_faults_total": memory.major_faults,
        "oom_kills_total": memory.oom_kills,
        "cpu_usage_seconds_total": _seconds(cpu.usage_us),
        "cpu_user_seconds_total": _seconds(cpu.user_us),
        "cpu_system_seconds_total": _seconds(cpu.system_us),
        "cpu_limit_cpus": cpu.limit,
        "cpu_periods_total": cpu.periods,
        "cpu_throttled_periods_total": cpu.throttled_periods,
        "cpu_throttled_seconds_total": _seconds(cpu.throttled_us),
        "pids": pids.current,
        "pids_limit": pids.limit,
        "io_read_bytes_total": io.read_bytes,
        "io_written_bytes_total": io.write_bytes,
        "io_reads_total": io.reads,
        "io_writes_total": io.writes,
    }
    for metric, value in values.items():
        page.add(f"gcs_container_{metric}", value, container=name)
    _add_pressure(page, name, "memory", stats.memory_pressure)
    _add_pressure(page, name, "cpu", stats.cpu_pressure)
    _add_pressure(page, name, "io", stats.io_pressure)


def _add_pressure(page: Exposition, name: str, resource: str, pressure: Pressure | None) -> None:
    if pressure is not None:
        labels = {"container": name, "resource": resource}
        waiting, stalled = _seconds(pressure.some_total_us), _seconds(pressure.full_total_us)
        page.add("gcs_container_pressure_waiting_seconds_total", waiting, **labels)
        page.add("gcs_container_pressure_stalled_seconds_total", stalled, **labels)


def _add_streams(page: Exposition, name: str, process: Process) -> None:
    for stream_name, stream in process.streams.items():
        state = stream.state()
        if state.mode in (StreamMode.NULL, StreamMode.FIFO):
            continue  # nothing of it passes the agent
        labels = {"container": name, "process": process.ident, "stream": stream_name}
        load = stream.load()
        page.add("gcs_stream_bytes_total", state.bytes, **labels)
        page.add("gcs_stream_queued_bytes", load.queued, **labels)
        page.add("gcs_stream_blocked_seconds_total", load.blocked, **labels)
        page.add("gcs_stream_attached", int(state.attached), **labels)
        if state.mode is StreamMode.SPOOL:
            page.add("gcs_stream_spooled_bytes", state.bytes - state.first, **labels)


def _seconds(micros: int | None) -> float | None:
    return None if micros is None else micros * MICRO
