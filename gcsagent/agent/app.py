"""Wires the agent together; the only module that knows which runtimes there are."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import TYPE_CHECKING

from gcsagent.agent import logs, methods, services
from gcsagent.agent.attachable import Keeper
from gcsagent.agent.bounds import Bounds, limits_of
from gcsagent.agent.calls import Caller
from gcsagent.agent.cgroups import CgroupMounts
from gcsagent.agent.counters import CounterSlots
from gcsagent.agent.dispatch import Dispatcher
from gcsagent.agent.events import EventLog
from gcsagent.agent.info import AgentService
from gcsagent.agent.kernfs import KernelFiles
from gcsagent.agent.kmsg import KernelLog
from gcsagent.agent.later import Later
from gcsagent.agent.oom import OomWatch
from gcsagent.agent.registry import Registry
from gcsagent.agent.reload import reload
from gcsagent.agent.runc import Runc
from gcsagent.agent.runtimes import Runtimes
from gcsagent.agent.seeing.logring import LogRing
from gcsagent.agent.server import ListenError, Server, listen
from gcsagent.agent.session import Session
from gcsagent.agent.supervisor_client import SupervisorClient
from gcsagent.common import boot
from gcsagent.common.config import Settings

if TYPE_CHECKING:
    from gcsagent.agent.container import Container
    from gcsagent.agent.forwarding.service import Forwards

EX_CONFIG = 78
"""sysexits.h: starting again will not help; the supervisor knows it (agentproc)."""

WORDS_PER_DEADLINE = 3
"""How often the event loop tells the supervisor within the watchdog's deadline that it goes round."""

_log = logging.getLogger("agent")


def main() -> int:
    settings = Settings.from_json(os.environ["GCS_SETTINGS"])
    generation = int(os.environ["GCS_GENERATION"])
    if settings.guest:
        boot.reached("loaded", settings.state)
    logs.set_up(os.environ.get("GCS_LOG_LEVEL") or settings.log_level)
    try:
        return asyncio.run(_run(settings, generation))
    except ListenError as error:
        _log.critical(str(error))
        return EX_CONFIG
    except Exception:
        _log.critical("a fault ends the agent", exc_info=True)
        return 1


async def _run(settings: Settings, generation: int) -> int:
    gone = asyncio.Event()
    channel = socket.socket(fileno=int(os.environ["GCS_CHANNEL_FD"]))
    os.set_inheritable(channel.fileno(), False)
    supervisor = SupervisorClient(channel, gone.set)
    if settings.watchdog:
        supervisor.keep_telling_alive(settings.watchdog / WORDS_PER_DEADLINE)
    held = set(await supervisor.everything("names"))
    counters = CounterSlots(await _memory(supervisor, held, "counters"))
    bounds = Bounds(limits_of(settings.limits))
    events = EventLog(await _memory(supervisor, held, "events"), bounds.limits.max_event_bytes)
    log = LogRing(await _memory(supervisor, held, "log"), generation)
    logging.getLogger().addHandler(log)
    for name, fd in (("counters", counters.fd), ("events", events.fd), ("log", log.ring.fd)):
        if name not in held:
            supervisor.hold(name, fd)
    log.follow(supervisor)
    keeper = Keeper(supervisor, counters)
    registry, agent = _assemble(settings, generation, supervisor, keeper, events, bounds)
    await agent.upgrades.load()
    forwards = services.forwards(registry, f"g{generation}")
    await _take_up(registry, supervisor, forwards, held)
    table = methods.build(registry, agent, forwards, log)
    openers = methods.openers(forwards)
    dispatcher = Dispatcher(table, registry.journal, lambda: agent.stopping, openers, registry.quiet)

    def make_session(sock: socket.socket, peer: str, server: Server) -> Session:
        return Session(sock, peer, dispatcher, registry, agent, server)

    server = Server(settings.peer_cid, make_session, registry.bounds)
    for address in settings.listen:
        server.serve(await _listener(supervisor, held, address))
    supervisor.topics["shutdown"] = lambda data: agent.begin_shutdown(data["action"], data["grace_ms"])
    await supervisor.call("ready", {})
    supervisor.tell_alive()  # said behind READY, it is what promotes new code
    _log.info("serving", extra={"listen": list(settings.listen), "generation": generation})
    await gone.wait()
    _log.warning("the supervisor is gone; so am I")
    return 1


async def _take_up(
    registry: Registry, supervisor: SupervisorClient, forwards: Later[Forwards], held: set[str]
) -> None:
    """Goes on with what an earlier agent left. What it never had is not loaded for that."""

    def has_left(name: str) -> bool:
        return os.path.exists(os.path.join(registry.state, name))

    forwarded = {name for name in held if name.startswith("forward/")}
    await reload(registry, supervisor, forwards.get().claimed(forwarded) if forwarded else set())
    registry.archives.resume()
    if has_left("storage"):
        from gcsagent.agent.storage.recovery import recover

        await recover(registry, registry.storage.get())
    if has_left("snapshot.json"):
        registry.snapshots.get().recover()
    if forwarded:
        await forwards.get().restore(supervisor, forwarded)
    if any(name.startswith("pressure/") for name in held):
        await registry.pressure.get().take_up(held)


def _assemble(
    settings: Settings,
    generation: int,
    supervisor: SupervisorClient,
    keeper: Keeper,
    events: EventLog,
    bounds: Bounds,
) -> tuple[Registry, AgentService]:
    # A runtime call is too short for the threads that runc, written in Go, would start for each CPU: with one
    # it takes a tenth less of them, and leaves the others to other calls.
    env = {"PATH": os.environ["PATH"], "GOMAXPROCS": "1"}
    caller = Caller(supervisor, env, f"g{generation}", bounds.limits)

    def runtime(binary: str) -> Runc:
        extra = tuple(settings.runtime_args) if binary == settings.runtime else ()
        consoles = os.path.join(settings.state, "console")
        return Runc(caller, binary, settings.state, consoles, extra, settings.no_pivot)

    runtimes = Runtimes(runtime, settings.offered_runtimes)
    oom = OomWatch(events, KernelLog(), KernelFiles())
    cgroups = CgroupMounts()
    registry = Registry(
        settings.state, settings.guest, runtimes, caller, keeper, events, cgroups, oom, bounds
    )
    registry.storage = services.storage(registry, settings.state, settings.guest)
    registry.snapshots = services.snapshots(registry, settings.state)
    registry.checkpoints, registry.pressure = services.checkpoints(registry), services.pressure(registry)
    registry.own_network = settings.guest or settings.own_network

    async def tear_down(container: Container, seconds: float) -> None:
        from gcsagent.agent import teardown

        await teardown.tear_down(registry, container, seconds)

    registry.tear_down = tear_down
    agent = AgentService(settings, registry, generation, int(os.environ["GCS_SUPERVISOR_PID"]))
    return registry, agent


async def _memory(supervisor: SupervisorClient, held: set[str], name: str) -> int | None:
    """The memfd an earlier agent left under ``name``, if it did."""
    if name not in held:
        return None
    _, fds = await supervisor.request("fetch", {"names": [name]})
    return int(fds[0])


async def _listener(supervisor: SupervisorClient, held: set[str], address: str) -> socket.socket:
    name = f"listen/{address}"
    if name in held:
        _, fds = await supervisor.request("fetch", {"names": [name]})
        return socket.socket(fileno=fds[0])
    listener = listen(address)
    supervisor.hold(name, listener.fileno())
    return listener
