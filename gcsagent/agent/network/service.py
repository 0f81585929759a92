"""network.apply, state and remove. One change at a time; looking needs no turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator

from gcsagent.agent.call import Call
from gcsagent.agent.network import files, kernel, namespaces, nat, place, plan
from gcsagent.agent.network.arrivals import LinkWatch
from gcsagent.agent.network.changes import Changes, refusal
from gcsagent.agent.network.kernel import Link, Snapshot
from gcsagent.agent.network.place import NotYet, Placing
from gcsagent.agent.network.tools import OTHER, Namespace, ToolFailed, Tools
from gcsagent.agent.pods.files import resolv_conf
from gcsagent.agent.registry import Registry
from protocol.errors import Code, RpcError
from protocol.families.network import (
    Applied,
    ApplyNetwork,
    Interface,
    NetworkRef,
    NetworkState,
    RemoveInterface,
)
from protocol.method import Empty
from protocol.pods import Dns

LOOK_SECONDS = 30.0
"""What a tool may take to tell what there is."""

UNDO_SECONDS = 12.0
"""What taking a request back may take altogether: within CLEANUP_SECONDS."""

_log = logging.getLogger("agent.network")


class NetworkService:
    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.tools = Tools(registry.caller)
        self._turn = asyncio.Lock()
        self._settled = False

    # -- the requests ---------------------------------------------------------------------------

    async def apply(self, params: ApplyNetwork, call: Call) -> Applied:
        loop = asyncio.get_running_loop()
        until = loop.time() + params.wait_ms / 1000
        with namespaces.guest() as guest, LinkWatch() as watch:
            while True:
                try:
                    return await self._apply_once(params, call, guest)
                except NotYet as missing:
                    error = missing.error
                try:
                    async with asyncio.timeout_at(until):
                        await watch.changed()
                except TimeoutError:
                    raise error from None

    async def state(self, params: NetworkRef, _call: Call) -> NetworkState:
        with namespaces.guest() as guest, self.namespace(params.container, guest) as target:
            links = await kernel.links(self.tools, target, LOOK_SECONDS)
            return NetworkState(
                interfaces=tuple(link.state for link in links.values()),
                routes=await kernel.routes(self.tools, target, LOOK_SECONDS),
                neighbours=await kernel.neighbours(self.tools, target, LOOK_SECONDS),
                dns=_dns(target),
                masquerade=await self.masqueraded(target),
            )

    async def remove(self, params: RemoveInterface, call: Call) -> Empty:
        name = params.interface
        with namespaces.guest() as guest, self.namespace(params.container, guest) as target:
            if target.is_guest:
                namespaces.check_own(self.registry)
            async with self.changing(guest) as changes:
                target.check_lives()
                links = await kernel.links(self.tools, target, LOOK_SECONDS)
                if call.begun_before and name not in links:
                    return Empty()  # an agent was killed over this very request, when that had happened
                step = _removal(name, links, target)
                self.registry.journal.begun(call.mark)
                masquerade = await self._without(links[name], target)
                if masquerade is not None:
                    await self._masquerade(changes, target, masquerade, call.timeout)
                await changes.ip(target, [step], call.timeout)
                call.commit()
        return Empty()

    # -- the parts ------------------------------------------------------------------------------

    async def _apply_once(self, params: ApplyNetwork, call: Call, guest: Namespace) -> Applied:
        with self.namespace(params.container, guest) as target:
            async with self.changing(guest) as changes:
                target.check_lives()  # its turn may have come late
                found = await self.carry_out(params, target, guest, changes, call)
                call.commit()
        named = {interface.name for interface in params.interfaces}
        states = tuple(link.state for name, link in found.items() if name in named)
        return Applied(tuple(changes.done), states)

    async def carry_out(
        self, params: ApplyNetwork, target: Namespace, guest: Namespace, changes: Changes, call: Call
    ) -> dict[str, Link]:
        """All that ``params`` says about the namespace; returns its interfaces as they are then.

        Raises NotYet before anything has been changed, RpcError.
        """
        if target.is_guest:
            namespaces.check_own(self.registry)
        links = await self.put_in_place(params, target, guest, changes, call)
        sysctls = nat.forwarding(params.masquerade or ()) | params.sysctls
        await self._sysctls(changes, target, sysctls, call.timeout)
        now = Snapshot(
            links or await kernel.links(self.tools, target, LOOK_SECONDS),
            await kernel.routes(self.tools, target, LOOK_SECONDS) if _touches_routes(params) else (),
            await kernel.neighbours(self.tools, target, LOOK_SECONDS)
            if params.neighbours is not None
            else (),
        )
        steps = plan.steps(params, now)
        await self._sysctls(changes, target, plan.settings(params, now), call.timeout)
        await changes.ip(target, steps, call.timeout)
        if params.masquerade is not None:
            await self._masquerade(changes, target, params.masquerade, call.timeout)
        self._files(changes, target, params)
        return await kernel.links(self.tools, target, LOOK_SECONDS) if steps else now.links

    async def put_in_place(
        self, params: ApplyNetwork, target: Namespace, guest: Namespace, changes: Changes, call: Call
    ) -> dict[str, Link] | None:
        """The target's interfaces, where nothing had to be moved or made."""
        if not params.interfaces:
            return None
        names = [each.name for each in params.interfaces]
        for index, name in enumerate(names):
            if name in names[:index]:
                field = f"interfaces[{index}].name"
                raise RpcError(Code.INVALID_ARGUMENT, f"{field}: {name} is there twice", field=field)
        here = await kernel.links(self.tools, target, LOOK_SECONDS)
        out = here if target.is_guest else await kernel.links(self.tools, guest, LOOK_SECONDS)
        placings = [
            place.placing(each, here, out, target.is_guest, params.container or "", f"interfaces[{index}]")
            for index, each in enumerate(params.interfaces)
        ]
        if any(each.steps and each.where == "guest" for each in placings):
            namespaces.check_own(self.registry)
        moved = False
        for wanted, placing in zip(params.interfaces, placings, strict=True):
            if placing.steps:
                moved = True
                await self._move(wanted, placing, target, guest, changes, call)
        return None if moved else here

    async def _move(
        self,
        wanted: Interface,
        placing: Placing,
        target: Namespace,
        guest: Namespace,
        changes: Changes,
        call: Call,
    ) -> None:
        steps = list(placing.steps)
        if placing.where == "target":
            await changes.ip(target, steps, call.timeout)
        elif placing.where == "guest":
            await changes.ip(guest, steps, call.timeout, target)
            if wanted.veth is None:
                before = steps[0].do.split()[3]
                changes.later(target, place.come_back(wanted, before).do)
        else:
            with namespaces.of_container(self.registry, placing.where) as home:
                await changes.ip(home, steps, call.timeout, target)

    async def _sysctls(
        self, changes: Changes, target: Namespace, wanted: dict[str, str], timeout: float
    ) -> None:
        for key, value in wanted.items():
            # Without a dot before the slash the names of interfaces may have dots, in sysctl(8) and busybox.
            path = key if "/" in key else key.replace(".", "/")
            field = f"sysctls.{key}"
            try:
                said = await self.tools.ask(target, ["sysctl", "-n", path], LOOK_SECONDS)
            except ToolFailed as failure:
                raise RpcError(
                    Code.NOT_FOUND, f"{field}: the kernel has no such setting here", field=field
                ) from failure
            before = said.decode(errors="replace").strip()
            if before.split() != value.split():
                argv, undo = (["sysctl", "-w", f"{path}={text}"] for text in (value, before))
                await changes.tool(target, argv, field, timeout, undo=undo)

    async def masqueraded(self, target: Namespace, *, sure: bool = False) -> tuple[str, ...]:
        """Nothing where there is no table yet, or no ``nft``; without ``sure`` also where nobody can tell.
        Raises RpcError."""
        try:
            return nat.parse(await self.tools.ask(target, nat.LIST, LOOK_SECONDS))
        except ToolFailed as failure:
            if sure and nat.NO_TABLE not in failure.outcome.stderr:
                raise refusal(failure, plan.Step(" ".join(nat.LIST), "", "masquerade")) from failure
            return ()
        except RpcError as error:
            if error.code is not Code.UNIMPLEMENTED:
                raise
            return ()

    async def _masquerade(
        self, changes: Changes, target: Namespace, networks: tuple[str, ...], timeout: float
    ) -> None:
        before = await self.masqueraded(target, sure=bool(networks))
        if set(before) != set(networks):
            await changes.tool(
                target,
                nat.LOAD,
                "masquerade",
                timeout,
                data=nat.ruleset(tuple(dict.fromkeys(networks))),
                undo=nat.LOAD,
                undo_data=nat.ruleset(before),
            )

    async def _without(self, link: Link, target: Namespace) -> tuple[str, ...] | None:
        """What stays masqueraded when a bridge goes; None: nothing changes."""
        if link.state.kind != "bridge":
            return None
        before = await self.masqueraded(target)
        gone = {plan.network_of(each) for each in link.state.addresses}
        kept = tuple(each for each in before if each not in gone)
        return None if kept == before else kept

    def _files(self, changes: Changes, target: Namespace, params: ApplyNetwork) -> None:
        wanted = {}
        if params.dns is not None:
            wanted["dns"] = files.RESOLV_CONF, resolv_conf(params.dns)
        if params.hosts is not None:
            wanted["hosts"] = files.HOSTS, files.hosts(params.hosts)
        for field, (name, text) in wanted.items():
            try:
                before = files.read(target, name)
                if before != text:
                    self._write(changes, target, name, text, before)
            except ProcessLookupError:
                raise
            except OSError as error:
                raise RpcError(
                    Code.FAILED_PRECONDITION,
                    f"{field}: /etc/{name} cannot be written: {error.strerror}",
                    field=field,
                    errno=error.errno or 0,
                ) from error

    def _write(self, changes: Changes, target: Namespace, name: str, text: str, before: str | None) -> None:
        back = _write_back(target, name, before)
        try:
            files.write(target, name, text)
        except OSError:
            with contextlib.suppress(OSError):
                back()  # in place, it was cut off before it was written
            raise
        changes.note(f"write /etc/{name}", back)

    # -- around them ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def namespace(self, container: str | None, guest: Namespace) -> Iterator[Namespace]:
        if container is None:
            yield guest
            return
        with namespaces.of_container(self.registry, container) as found:
            yield found

    @contextlib.asynccontextmanager
    async def changing(self, guest: Namespace) -> AsyncIterator[Changes]:
        """A turn; what is done in it is taken back when it ends with an exception."""
        async with self._turn:
            if not self._settled:
                await self.tools.settle()
                self._settled = True
            changes = Changes(self.tools, guest)
            try:
                yield changes
            except BaseException as error:
                undoing = asyncio.ensure_future(changes.undo())
                done, _ = await asyncio.wait([undoing], timeout=UNDO_SECONDS)
                if not done:  # the descriptors it works with are about to be closed
                    undoing.cancel()
                    await asyncio.wait([undoing])
                left = undoing.result() if done else ["what had been begun"]
                if left and isinstance(error, RpcError):
                    raise RpcError(
                        error.code,
                        f"{error.message}; and what had been done by then could not all be taken back",
                        **{**error.details, "left": left},
                    ) from error
                raise


def _touches_routes(params: ApplyNetwork) -> bool:
    return params.routes is not None or any(each.addresses is not None for each in params.interfaces)


def _write_back(target: Namespace, name: str, text: str | None) -> Callable[[], None]:
    return lambda: files.write(target, name, text)


def _dns(target: Namespace) -> Dns:
    try:
        return files.parse_resolv_conf(files.read(target, files.RESOLV_CONF) or "")
    except OSError:
        return Dns()


def _removal(name: str, links: dict[str, Link], target: Namespace) -> plan.Step:
    link = links.get(name)
    if link is None:
        raise RpcError(
            Code.NOT_FOUND,
            f"interface: there is no {name} (there are: {', '.join(links)})",
            field="interface",
        )
    if link.state.kind == "loopback" or (not link.state.kind and target.is_guest):
        raise RpcError(
            Code.FAILED_PRECONDITION,
            f"interface: {name} is the guest's own device: it is unplugged, not removed",
            field="interface",
        )
    if link.state.kind:
        return plan.Step(f"link del dev {name}", "", "interface")
    return plan.Step(f"link set dev {name} netns {OTHER}", "", "interface")
