"""The asyncio client of an agent: typed calls over one control connection, streams and events beside it.

    async with await Client.connect("unix:/run/gcsagent/gcs.sock") as client:
        await client.create_container(CreateContainer("web", spec=spec))
        await client.start_container("web")
        record = await client.wait_container("web")

Everything the agent sends is bounded and checked; the worst it can cause is RemoteProtocolError. A lost
connection fails the calls outstanding on it, except those that may safely be sent again (they change
nothing, or carry a ``request_id``): these and later calls go on over a new connection.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from gcsagent.host.caller import Caller
from gcsagent.host.events import EventStream
from gcsagent.host.spool import SpoolStream
from gcsagent.host.streams import Stream
from protocol import checks
from protocol.errors import RemoteProtocolError
from protocol.families.agent import AskInfo, Info, Pong, Shutdown, ShutdownAction
from protocol.families.container import (
    ContainerList,
    ContainerRef,
    CreateContainer,
    Created,
    DeleteContainer,
    Deleted,
    KillContainer,
    ListContainers,
    ListProcesses,
    ProcessList,
    StateContainer,
    UpdateContainer,
)
from protocol.families.events import Subscribe
from protocol.families.pod import PodRef, UpdatePod
from protocol.families.process import CloseStdin, Exec, KillProcess, ProcessRef, Resize
from protocol.families.stream import Ack, Attach, Find, Found, StreamName
from protocol.limits import MIN_SPOOL
from protocol.method import Empty
from protocol.types import ContainerState, ExitRecord, ProcessState, Winsize
from protocol.usage import ContainerProcess, ContainerStats, IoLimit

LIST_PAGE = 50
"""Containers asked for at once: some milliseconds of the agent's event loop."""

MAX_PAGES = 1024
"""Of one list: room for some 50,000 containers, and for every process there can be."""


def endless(method: str) -> RemoteProtocolError:
    """What an agent is told that has more on each page."""
    return RemoteProtocolError("endless", f"{method} does not end after {MAX_PAGES} pages")


class Client(Caller):
    """The methods of the contract, and the connections that are streams or events."""

    async def ping(self) -> Pong:
        result: Pong = await self.call("agent.ping", Empty())
        return result

    async def info(self, *, features: bool = False) -> Info:
        """``features``: also what the runtimes say they can do; the agent asks them once."""
        result: Info = await self.call("agent.info", AskInfo(features))
        return result

    async def shutdown(
        self,
        action: ShutdownAction = ShutdownAction.POWEROFF,
        *,
        grace: float = 10.0,
    ) -> None:
        """Stops the containers (TERM, ``grace`` seconds, KILL), then does ``action``."""
        await self.call("agent.shutdown", Shutdown(action, round(grace * 1000)))

    async def create_container(
        self,
        params: CreateContainer,
        *,
        deadline: float | None = None,
        request_id: str | None = None,
    ) -> Created:
        """Raises RpcError; UNIMPLEMENTED for a pod where the agent has none, and would just ignore it."""
        if params.sandbox is not None or params.pod is not None:
            await self._require("pods")
        result: Created = await self.call(
            "container.create", params, deadline=deadline, request_id=request_id
        )
        return result

    async def start_container(self, container: str) -> Created:
        result: Created = await self.call("container.start", ContainerRef(container))
        return result

    async def container_state(self, container: str, *, ask_runtime: bool = False) -> ContainerState:
        """``ask_runtime``: with ``runtime_view``, what the runtime and the kernel say."""
        params = StateContainer(container, ask_runtime)
        result: ContainerState = await self.call("container.state", params)
        return result

    async def list_containers(self, *, processes: bool = True) -> tuple[ContainerState, ...]:
        """In the order they were created; page by page, so that others are answered in between.

        What is created or deleted meanwhile may or may not be among them.
        """
        found: list[ContainerState] = []
        for _ in range(MAX_PAGES):
            after = found[-1].container if found else ""
            page: ContainerList = await self.call(
                "container.list", ListContainers(processes, after, LIST_PAGE)
            )
            found += page.containers
            if not page.left_out or not page.containers or page.containers[-1].container <= after:
                return tuple(sorted(found, key=lambda container: container.created_at_ns))
        raise endless("container.list")

    async def kill_container(
        self, container: str, signal: int | str = "SIGTERM", *, everyone: bool = False
    ) -> None:
        """Signals init, or with ``everyone`` each process of the container."""
        await self.call("container.kill", KillContainer(container, signal, everyone))

    async def pause_container(self, container: str) -> None:
        """Freezes every process of it."""
        await self.call("container.pause", ContainerRef(container))

    async def resume_container(self, container: str) -> None:
        await self.call("container.resume", ContainerRef(container))

    async def update_container(
        self,
        container: str,
        *,
        memory_bytes: int | None = None,
        memory_swap_bytes: int | None = None,
        memory_reservation_bytes: int | None = None,
        cpus: float | None = None,
        cpu_shares: int | None = None,
        cpuset_cpus: str | None = None,
        cpuset_mems: str | None = None,
        pids: int | None = None,
        io_weight: int | None = None,
        io: Sequence[IoLimit] = (),
    ) -> None:
        """Sets other limits, all of them or none; what is not given stays as it is, -1 takes one away."""
        params = UpdateContainer(
            container,
            memory_bytes=memory_bytes,
            memory_swap_bytes=memory_swap_bytes,
            memory_reservation_bytes=memory_reservation_bytes,
            cpus=cpus,
            cpu_shares=cpu_shares,
            cpuset_cpus=cpuset_cpus,
            cpuset_mems=cpuset_mems,
            pids=pids,
            io_weight=io_weight,
            io=tuple(io),
        )
        await self.call("container.update", params)

    async def update_pod(
        self,
        sandbox: str,
        *,
        memory_bytes: int | None = None,
        cpus: float | None = None,
        cpu_shares: int | None = None,
        pids: int | None = None,
    ) -> None:
        """Sets other limits for a pod, all of them or none; what is not given stays, -1 takes one away."""
        await self.call("pod.update", UpdatePod(sandbox, memory_bytes, cpus, cpu_shares, pids))

    async def pod_stats(self, sandbox: str) -> ContainerStats:
        """What all containers of a pod use together."""
        result: ContainerStats = await self.call("pod.stats", PodRef(sandbox))
        return result

    async def container_processes(self, container: str) -> tuple[ContainerProcess, ...]:
        """Every process in it, by pid; as many requests as it takes. What comes or goes meanwhile may be
        missing."""
        found: list[ContainerProcess] = []
        for _ in range(MAX_PAGES):
            after = found[-1].pid if found else 0
            page: ProcessList = await self.call("container.processes", ListProcesses(container, after))
            found += page.processes
            if not page.left_out or not page.processes or page.processes[-1].pid <= after:
                return tuple(found)
        raise endless("container.processes")

    async def container_stats(self, container: str) -> ContainerStats:
        """What it uses of memory, CPU, processes and block devices."""
        result: ContainerStats = await self.call("container.stats", ContainerRef(container))
        return result

    async def wait_container(self, container: str, *, deadline: float | None = None) -> ExitRecord:
        """Returns when every exec and then init have ended; without ``deadline``, however long that takes."""
        result: ExitRecord = await self.call("container.wait", ContainerRef(container), deadline=deadline)
        return result

    async def delete_container(self, container: str, *, force: bool = False) -> ExitRecord | None:
        """Removes it and all it left; ``force`` kills what runs. Returns init's exit record, if any."""
        result: Deleted = await self.call("container.delete", DeleteContainer(container, force))
        return result.exit

    async def exec_process(
        self, params: Exec, *, deadline: float | None = None, request_id: str | None = None
    ) -> Created:
        result: Created = await self.call("process.exec", params, deadline=deadline, request_id=request_id)
        return result

    async def process_state(self, container: str, process: str = checks.INIT) -> ProcessState:
        result: ProcessState = await self.call("process.state", ProcessRef(container, process))
        return result

    async def kill_process(
        self, container: str, process: str = checks.INIT, signal: int | str = "SIGTERM"
    ) -> None:
        await self.call("process.kill", KillProcess(container, process, signal))

    async def resize_process(self, container: str, process: str, winsize: Winsize) -> None:
        await self.call("process.resize", Resize(container, process, winsize))

    async def close_stdin(self, container: str, process: str, offset: int | None = None) -> None:
        """Ends stdin once ``offset`` bytes of it are in the process's pipe; without it, at once."""
        params = CloseStdin(container, process, offset)
        await self.call("process.close_stdin", params, request_id=secrets.token_hex(8))

    async def wait_process(
        self, container: str, process: str = checks.INIT, *, deadline: float | None = None
    ) -> ExitRecord:
        result: ExitRecord = await self.call(
            "process.wait", ProcessRef(container, process), deadline=deadline
        )
        return result

    async def delete_process(self, container: str, process: str) -> ExitRecord | None:
        """Forgets an exec that has ended."""
        result: Deleted = await self.call("process.delete", ProcessRef(container, process))
        return result.exit

    async def ack_stream(self, container: str, process: str, stream: StreamName, offset: int) -> None:
        """Releases what a spool keeps before ``offset``."""
        await self.call("stream.ack", Ack(container, process, stream, offset))

    async def find_in_stream(
        self,
        container: str,
        process: str,
        stream: StreamName,
        *,
        since_ns: int | None = None,
        tail: int | None = None,
    ) -> Found:
        """Where to attach to a spool to read what was written since a time, or the last lines."""
        result: Found = await self.call("stream.find", Find(container, process, stream, since_ns, tail))
        return result

    # -- connections of their own ---------------------------------------------------------------

    async def attach_spool(
        self,
        container: str,
        process: str,
        stream: StreamName,
        *,
        offset: int | None = None,
        acknowledge: bool,
        passive: bool = False,
        take: bool = False,
        limit: int = MIN_SPOOL,
    ) -> SpoolStream:
        """Attaches to a spool, again and again if need be; ``acknowledge`` releases what has been read.

        ``passive``: as a reader that a spool with ``tee`` does not wait for. ``limit``: its own, in bytes.
        ``take`` and what is raised are :meth:`attach`'s.
        """
        wanted = Attach(container, process, stream, offset, take, passive=passive)
        return await SpoolStream.attach(self, wanted, acknowledge=acknowledge, limit=limit)

    async def attach(
        self,
        container: str,
        process: str = checks.INIT,
        stream: StreamName = StreamName.STDOUT,
        *,
        take: bool = False,
        offset: int | None = None,
        exec_request: str | None = None,
        launching: asyncio.Future[Any] | None = None,
    ) -> Stream:
        """Attaches to one stream over a new connection; closing it detaches and does nothing else.

        ``offset`` is where to begin, for a spool. Raises what :meth:`call` raises; FAILED_PRECONDITION when
        somebody else is attached and not ``take``, or the spool has no such offset (any more).
        ``launching`` is an exec under way with the request_id ``exec_request``, not to be waited for first.
        """
        wanted = Attach(container, process, stream, offset, take, exec_request=exec_request)
        return await Stream.open(
            self.address, wanted, timeout=self.timeout, client_name=self.client_name, launching=launching
        )

    async def events(
        self, *, after: int | None = None, container: str | None = None, strict: bool = False
    ) -> EventStream:
        """Subscribes over a new connection, which it replaces when lost, going on where it was.

        With ``after`` what the agent still remembers beyond that sequence number comes first; should its
        numbers have begun anew since, everything. ``strict``: raise EventsMissed where some are gone.
        """
        wanted = Subscribe(after, container)
        return await EventStream.open(
            self.address, wanted, timeout=self.timeout, client_name=self.client_name, strict=strict
        )
