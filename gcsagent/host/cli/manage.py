"""The commands that ask or tell the agent one thing."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Mapping
from typing import Any

from gcsagent.host.cli.common import (
    UsageError,
    connect,
    describe_oom,
    exit_code,
    print_json,
    print_pairs,
    print_table,
    report_oom,
    say,
    when,
)
from gcsagent.host.cli.processes import age, show_processes
from gcsagent.host.client import Client
from gcsagent.host.upgrade import RolledBack, pack, upgrade
from protocol.errors import Code, RpcError
from protocol.types import ContainerState, ExitRecord, ProcessState, Status
from protocol.usage import RuntimeView

Document = Mapping[str, Any]


async def ping(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        started = time.monotonic()
        pong = await client.ping()
        round_trip = time.monotonic() - started
    if args.json:
        print_json(
            {
                "generation": pong.generation,
                "uptime_ms": pong.uptime_ms,
                "loop_lag_us": pong.loop_lag_us,
                "round_trip_us": round(round_trip * 1e6),
            }
        )
    else:
        print(
            f"{client.address}: up {pong.uptime_ms / 1000:.1f} s, generation {pong.generation},"
            f" loop lag {pong.loop_lag_us / 1000:.1f} ms, round trip {round_trip * 1000:.1f} ms"
        )
    return 0


async def upgrade_agent(args: argparse.Namespace) -> int:
    """Raises RolledBack when the old code runs again."""
    archive = pack(args.path)
    async with await connect(args) as client:
        try:
            status = await upgrade(client, archive, trial=args.trial)
        except RolledBack as error:
            if args.json:
                print_json(error.status)
            raise
    if args.json:
        print_json(status)
    else:
        say(f"promoted: the agent runs {status.running[:12]}")
    return 0


async def start(client: Client, _args: argparse.Namespace, container: str) -> Document:
    created = await client.start_container(container)
    return {"container": container, "pid": created.pid}


async def state(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        container = await client.container_state(args.id, ask_runtime=True)
    if args.json:
        print_json(container)
        return 0
    pairs: list[tuple[str, object]] = [
        ("container", container.container),
        ("status", container.status.value),
        ("pid", container.pid),
        ("bundle", container.bundle),
        ("created", when(container.created_at_ns)),
        ("runtime", container.runtime),
    ]
    if container.pod:
        role = ", ".join(container.share) or "nothing"
        shown = "its sandbox" if container.pod == container.container else f"sharing {role}"
        pairs.append(("pod", f"{container.pod}, {shown}"))
    pairs += _runtime_pairs(container.runtime_view)
    pairs += [("problem", container.problem)] if container.problem else []
    pairs += [(f"label {name}", value) for name, value in container.labels.items()]
    pairs += [(f"process {process.process}", _process_line(process)) for process in container.processes]
    print_pairs(pairs)
    return 0


async def wait(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        record = await client.wait_container(args.id)
    if args.json:
        print_json(record)
    else:
        report_oom(record, args.id)
    return exit_code(record)


async def kill(client: Client, args: argparse.Namespace, container: str) -> Document:
    """Raises UsageError."""
    if args.all and args.process is not None:
        raise UsageError("--all is every process; give it or --process, not both")
    if args.process is not None:
        await client.kill_process(container, args.process, args.signal)
    else:
        await client.kill_container(container, args.signal, everyone=args.all)
    return {"container": container, "signal": args.signal}


async def stop(client: Client, args: argparse.Namespace, container: str) -> Document:
    """One that has ended already is as well as stopped."""
    try:
        await client.kill_container(container, args.signal)
        record = await client.wait_container(container, deadline=args.time)
    except RpcError as error:
        if error.code not in (Code.DEADLINE_EXCEEDED, Code.FAILED_PRECONDITION):
            raise
        record = await _killed(client, container, error)
    return {"container": container, "exit": record}


async def _killed(client: Client, container: str, why_not: RpcError) -> ExitRecord:
    """How it ended; what has not by now is killed. Raises RpcError, ``why_not`` if it cannot have been."""
    if why_not.code is Code.DEADLINE_EXCEEDED:
        with contextlib.suppress(RpcError):  # it has ended in this moment
            await client.kill_container(container, "SIGKILL", everyone=True)
    elif (await client.container_state(container)).status is not Status.STOPPED:
        raise why_not
    return await client.wait_container(container)


async def pause(client: Client, _args: argparse.Namespace, container: str) -> Document:
    await client.pause_container(container)
    return {"container": container, "status": "paused"}


async def resume(client: Client, _args: argparse.Namespace, container: str) -> Document:
    await client.resume_container(container)
    return {"container": container, "status": "running"}


async def delete(client: Client, args: argparse.Namespace, container: str) -> Document:
    record = await client.delete_container(container, force=args.force)
    if args.vm:
        from gcsagent.host.cli import image_roots  # a launcher's worth of modules

        await image_roots.release(args.vm, client)
    return {"container": container, "exit": record}


async def ps(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        if args.id is not None:
            show_processes(await client.container_processes(args.id), args.json)
        else:
            _show_containers(await client.list_containers(), args.json)
    return 0


def _show_containers(containers: tuple[ContainerState, ...], as_json: bool) -> None:
    if as_json:
        print_json(containers)
        return
    rows = []
    pods = any(container.pod for container in containers)
    for container in containers:
        init = container.processes[0] if container.processes else None
        ended = _ending(init.exit) if init is not None and init.exit is not None else ""
        command = " ".join(init.args) if init is not None else ""
        status = f"{container.status.value} {ended}".strip()
        pod = (container.pod or "-",) if pods else ()
        created = age(container.created_at_ns)
        rows.append((container.container, *pod, status, container.pid or "-", created, command))
    print_table(("CONTAINER", *(("POD",) if pods else ()), "STATUS", "PID", "AGE", "COMMAND"), rows)


def _runtime_pairs(view: RuntimeView | None) -> list[tuple[str, object]]:
    if view is None:
        return []
    said = view.problem or f"{view.status}, pid {view.pid}, created {when(view.created_at_ns)}"
    pairs: list[tuple[str, object]] = [("runtime says", said)]
    if view.init_started_at_ns:
        pairs.append(("init made", when(view.init_started_at_ns)))
    return pairs + [("DIFFERENCE", difference) for difference in view.differences]


def _process_line(process: ProcessState) -> str:
    ended = _ending(process.exit)
    told = process.exit.oom if process.exit is not None else None
    oom = f" ({describe_oom(told)})" if told is not None else ""
    return f"{process.status.value} {ended or f'pid {process.pid}'}: {' '.join(process.args)}{oom}"


def _ending(record: ExitRecord | None) -> str:
    if record is None:
        return ""
    how = f"signal {record.signal}" if record.signal else f"exit {record.exit_code}"
    return f"({how})" if record.reason.value in ("exited", "signalled") else f"({record.reason.value}, {how})"
