"""The forwards there are: opens them, finds them by name, ends them with their container."""

from __future__ import annotations

import itertools
import logging
import socket

from gcsagent.agent.attachable import Attachment
from gcsagent.agent.call import Call
from gcsagent.agent.container import Container
from gcsagent.agent.forwarding import connecting
from gcsagent.agent.forwarding.forward import HELD, PREFIX, Forward, Identity
from gcsagent.agent.forwarding.hangups import Hangups
from gcsagent.agent.registry import Registry
from gcsagent.agent.supervisor_client import SupervisorClient
from gcsagent.common.channel import MAX_FDS
from protocol.errors import Code, RpcError
from protocol.families.forward import CloseWrite, ForwardEnd, ForwardOpened, ForwardRef, OpenForward
from protocol.method import Empty
from protocol.types import Event

_log = logging.getLogger("agent.forward")


class Forwards:
    """``prefix`` keeps names apart from those an earlier agent gave: the generation."""

    def __init__(self, registry: Registry, prefix: str) -> None:
        self._registry, self._prefix = registry, prefix
        self._numbers = itertools.count(1)
        self._forwards: dict[str, Forward] = {}
        self._opening = 0
        self._hangups = Hangups()
        registry.events.listen(self._on_event)

    async def open(self, params: OpenForward) -> _Opened:
        """Connects. Raises RpcError."""
        connecting.check(params)
        container = None if params.container is None else self._registry.get(params.container)
        if container is not None:
            container.check("forward into")
        limit = self._registry.bounds.limits.max_forwards
        if len(self._forwards) + self._opening >= limit:
            raise self._registry.bounds.exhausted("max_forwards", "connections are forwarded: close some")
        self._opening += 1
        try:
            target, to = await connecting.connect(params, container)
        finally:
            self._opening -= 1
        try:
            return _Opened(self._add(target, container), to)
        except BaseException:
            target.close()
            raise

    def _add(self, target: socket.socket, container: Container | None) -> Forward:
        """Takes ``target`` over. Raises RpcError, and leaves it the caller's."""
        if container is not None and self._registry.containers.get(container.ident) is not container:
            raise RpcError(Code.FAILED_PRECONDITION, f"container {container.ident} has been deleted")
        counters = self._registry.keeper.counters
        try:
            slots = counters.allocate(), counters.allocate(), counters.allocate()
        except OverflowError as error:
            raise RpcError(Code.RESOURCE_EXHAUSTED, str(error)) from error
        ident = f"{self._prefix}-{next(self._numbers)}"
        identity = Identity(ident, container.ident if container is not None else "", slots)
        return self._keep(identity, target.detach())

    def _keep(self, identity: Identity, fd: int) -> Forward:
        forward = Forward(self._registry.keeper, identity, fd, self._hangups, self._gone)
        self._forwards[identity.ident] = forward
        return forward

    def _gone(self, forward: Forward) -> None:
        self._forwards.pop(forward.identity.ident, None)

    async def wait(self, params: ForwardRef, _call: Call) -> ForwardEnd:
        return await self._get(params.forward).wait()

    async def close_write(self, params: CloseWrite, call: Call) -> Empty:
        await self._get(params.forward).close_write(params.offset)
        return Empty()

    def _get(self, ident: str) -> Forward:
        forward = self._forwards.get(ident)
        if forward is None:
            raise RpcError(Code.NOT_FOUND, f"there is no forward {ident}: its connection has been closed")
        return forward

    def _on_event(self, event: Event) -> None:
        """Without this a deleted container's network would live on for as long as a host likes."""
        if event.type == "container.deleted":
            for forward in list(self._forwards.values()):
                if forward.identity.container == event.container:
                    forward.abort()

    # -- a successor ----------------------------------------------------------------------------

    @staticmethod
    def claimed(held: set[str]) -> set[int]:
        """The counters of the forwards that have ``held`` names in the supervisor's store."""
        return {slot for name in held for slot in Identity.parse(split(name)[0]).slots}

    async def restore(self, supervisor: SupervisorClient, held: set[str]) -> None:
        """Goes on with those an earlier agent had: ``held`` are all names in the supervisor's store.

        To be called when containers are known and their counters claimed; this claims its own.
        """
        found: dict[str, set[str]] = {}
        for name in held:
            if name.startswith(PREFIX):
                base, suffix = split(name)
                found.setdefault(base, set()).add(suffix)
        for base, suffixes in found.items():
            await self._restore(supervisor, base, suffixes)

    async def _restore(self, supervisor: SupervisorClient, base: str, suffixes: set[str]) -> None:
        identity = Identity.parse(base)
        counters = self._registry.keeper.counters
        names = [f"{base}.{suffix}" if suffix else base for suffix in sorted(suffixes)]
        there = not identity.container or identity.container in self._registry.containers
        if not there or not suffixes >= HELD:
            _log.info("what was left of a forward is closed", extra={"forward": identity.ident})
            supervisor.release(*names)
            for slot in identity.slots:
                counters.free(slot)
            return
        assert len(names) <= MAX_FDS
        fds = dict(zip(sorted(suffixes), await supervisor.fetch(names), strict=True))
        self._keep(identity, fds.pop("")).restore(fds)
        assert not fds, fds


def split(name: str) -> tuple[str, str]:
    """The forward's name, and which of its descriptors this is; a container's id may have dots."""
    head, slash, tail = name.rpartition("/")
    tail, _, suffix = tail.partition(".")
    return f"{head}{slash}{tail}", suffix


class _Opened:
    """A Takeover."""

    def __init__(self, forward: Forward, to: str) -> None:
        self._forward, self._to = forward, to

    def result(self) -> ForwardOpened:
        return ForwardOpened(self._forward.identity.ident, self._to)

    def take(self, connection: socket.socket, reply: bytes, refusal: bytes) -> None:
        self._forward.attach(Attachment(connection, reply, refusal))

    def drop(self) -> None:
        self._forward.abort()
