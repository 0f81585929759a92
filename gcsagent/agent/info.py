"""agent.ping, info and shutdown: what the agent says about itself and the guest, and how both end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from typing import Any

from gcsagent import __version__
from gcsagent.agent import proc
from gcsagent.agent.call import Call
from gcsagent.agent.container import Container
from gcsagent.agent.features import features
from gcsagent.agent.machine_facts import machine, msgpack_version
from gcsagent.agent.process_dir import read_json
from gcsagent.agent.registry import Registry
from gcsagent.agent.runtime_facts import RuntimeFacts
from gcsagent.agent.upgrade import UpgradeService
from gcsagent.common import boot
from gcsagent.common.config import Settings
from protocol import PROTOCOL_MAX, PROTOCOL_MIN
from protocol.address import UnixAddress, parse_listen
from protocol.errors import RpcError
from protocol.families.agent import AskInfo, Info, Pong, Shutdown, ShutdownAction
from protocol.method import Empty
from protocol.types import BootStage, Status

BUILD_FILE = "/etc/gcsagent/build.json"

OS_RELEASE = ("/etc/os-release", "/usr/lib/os-release")

SANDBOX_SECONDS = 1.0
"""A sandbox's grace when its pod's containers have used all of it up."""

_log = logging.getLogger("agent.info")


class AgentService:
    def __init__(self, settings: Settings, registry: Registry, generation: int, supervisor_pid: int) -> None:
        self._settings, self._registry = settings, registry
        self.supervisor_pid = supervisor_pid
        self.started = time.monotonic()
        self.stopping = False
        self.generation = generation
        self._runtimes = RuntimeFacts(registry.runtimes)
        self.upgrades = UpgradeService(
            settings.state, generation, registry.keeper.supervisor, registry.bounds
        )
        self.boot_id = proc.boot_id()

    def pong(self, came: float) -> Pong:
        """The answer to a ping that was read at ``came`` (time.monotonic)."""
        now = time.monotonic()
        return Pong(self.generation, int((now - self.started) * 1000), int((now - came) * 1_000_000))

    async def info(self, params: AskInfo, _call: Call) -> Info:
        runtimes = await self._runtimes.all(params.features)
        containers = self._registry.containers
        memory, machine_name = proc.meminfo(), os.uname()
        return Info(
            agent_version=__version__,
            generation=self.generation,
            boot_id=self.boot_id,
            hostname=machine_name.nodename,
            kernel=machine_name.release,
            os=_os_name(),
            python=".".join(map(str, sys.version_info[:3])),
            cgroups=self._registry.cgroups.version,
            runtime=runtimes[0],
            runtimes=runtimes,
            containers=len(containers),
            processes=sum(
                process.alive for container in containers.values() for process in container.processes.values()
            ),
            supervisor_pid=self.supervisor_pid,
            agent_pid=os.getpid(),
            state_dir=self._settings.state,
            time_ns=time.time_ns(),
            uptime_ms=int(proc.uptime() * 1000),
            memory_total_kib=memory.get("MemTotal", 0),
            memory_available_kib=memory.get("MemAvailable", 0),
            cpus=len(os.sched_getaffinity(0)),
            boot_stages=_boot_stages(self._settings.state) if self._settings.guest else (),
            build=_build(),
            code=self.upgrades.running,
            protocol_min=PROTOCOL_MIN,
            protocol_max=PROTOCOL_MAX,
            features=features(),
            limits=self._registry.bounds.limits,
            msgpack=msgpack_version(),
            machine=machine(self._settings.guest),
        )

    # -- the end --------------------------------------------------------------------------------

    def shutdown(self, params: Shutdown, call: Call) -> Empty:
        """Answers as soon as it is under way: afterwards nobody may be there to answer."""
        action = params.action
        if action is not ShutdownAction.EXIT and not self._settings.guest:
            action = ShutdownAction.EXIT  # outside a guest this machine is not ours to switch off
        call.commit()
        # It has a deadline of its own from here on, and asks a successor should this agent die over it.
        asked = {"action": action.value, "grace_ms": params.grace_ms}
        self._registry.keeper.supervisor.tell("stopping", asked)
        self.begin_shutdown(action.value, params.grace_ms)
        return Empty()

    def begin_shutdown(self, action: str, grace_ms: int) -> None:
        if not self.stopping:
            self.stopping = True
            self._registry.spawn(self._stop(action, grace_ms / 1000))

    async def _stop(self, action: str, grace: float) -> None:
        containers = list(self._registry.containers.values())
        _log.info("stopping", extra={"action": action, "containers": len(containers)})
        if self._registry.snapshots.made is not None:
            await self._registry.snapshots.made.end()
        await self._registry.archives.end()
        # A sandbox's end would cut short the grace of its pod's containers.
        sandboxes = [each for each in containers if each.role.sandbox is not None]
        others = [each for each in containers if each.role.sandbox is None]
        until = asyncio.get_running_loop().time() + grace
        for those in (others, sandboxes):
            left = max(SANDBOX_SECONDS, until - asyncio.get_running_loop().time())
            await asyncio.gather(*(self._stop_container(container, min(grace, left)) for container in those))
        if self._registry.storage.made is not None:
            await self._registry.storage.made.unmount_all()
        self._registry.cgroup_tree.remove_root()
        self.upgrades.clear()
        _remove_sockets(self._settings.listen)
        self._registry.keeper.supervisor.tell("stop", {"action": action})

    async def _stop_container(self, container: Container, grace: float) -> None:
        """TERM, grace, KILL; then every trace of it is removed."""
        if container.status in (Status.RUNNING, Status.PAUSED):
            try:
                container.init.signal(signal.SIGTERM)
                container.cgroup.thaw()
                async with asyncio.timeout(grace):
                    await container.init.wait()
            except (TimeoutError, RpcError):
                pass  # teardown kills what is left
        try:
            await self._registry.delete(container)
        except RpcError as error:
            _log.error("a container resists", extra={"container": container.ident, "error": str(error)})


def _remove_sockets(addresses: tuple[str, ...]) -> None:
    """A socket file nobody listens on any more tells a client "refused" where "gone" is the truth."""
    for address in map(parse_listen, addresses):
        if isinstance(address, UnixAddress):
            with contextlib.suppress(OSError):
                os.unlink(address.path)


def _os_name() -> str:
    if not any(map(os.path.exists, OS_RELEASE)):
        return ""
    import platform  # with much that no other request needs

    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _boot_stages(state: str) -> tuple[BootStage, ...]:
    return tuple(BootStage(stage, round(uptime * 1000)) for stage, uptime in boot.stages(state))


def _build() -> dict[str, Any]:
    try:
        return read_json(BUILD_FILE)
    except (OSError, ValueError):
        return {}
