"""Undoing that takes longer than its request waits for it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from gcsagent.agent import undoing
from gcsagent.agent.call import Call
from gcsagent.agent.calls import Outcome
from gcsagent.agent.guest.snapshot import SnapshotService
from gcsagent.agent.logs import ContextLogger
from gcsagent.agent.quiet import Quiet
from gcsagent.agent.undoing import Held, bounded
from protocol.errors import Code, RpcError
from protocol.families.snapshot import PrepareSnapshot
from protocol.families.storage import MountKind, MountStatus
from tests.fakes import watched_loop

if TYPE_CHECKING:
    from gcsagent.agent.registry import Registry


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undoing, "CLEANUP_SECONDS", 0.01)


@pytest.mark.parametrize("long", [False, True])
def test_a_lock_is_held_until_all_is_undone(long: bool) -> None:
    async def scenario() -> None:
        lock, through = asyncio.Lock(), asyncio.Event()

        async def undo() -> None:
            assert lock.locked()
            if long:
                await through.wait()

        async def request() -> None:
            async with Held(lock) as held:
                await bounded(undo(), held)

        await asyncio.wait_for(request(), 5)
        assert lock.locked() is long
        through.set()
        async with asyncio.timeout(5), Held(lock):
            pass
        assert not lock.locked()

    watched_loop.run(scenario())


class Sticky:
    """A freezer that fails when it has frozen, and does not thaw until it is let through."""

    def __init__(self) -> None:
        self.frozen = 0
        self.through = asyncio.Event()

    async def freeze(self, entry: Any, *_: object) -> None:
        self.frozen += 1
        entry.frozen_until_ns = 1
        if self.frozen == 1:
            raise RpcError(Code.INTERNAL, "no such luck")

    async def thaw(self, entry: Any, *_: object, **__: object) -> None:
        await self.through.wait()
        entry.frozen_until_ns = 0


def test_a_snapshot_is_prepared_when_the_one_before_has_been_undone(tmp_path: Path) -> None:
    """Else that would thaw, and let in, what has been frozen for this one."""

    async def scenario() -> None:
        async def synced(*_: object) -> Outcome:
            return Outcome(0, False, "")

        entry = SimpleNamespace(
            number=1,
            ident="m",
            asked=SimpleNamespace(kind=MountKind.BLOCK),
            status=MountStatus.MOUNTED,
            device="/dev/vdb",
            read_only=False,
            frozen_until_ns=0,
            changing=asyncio.Lock(),
        )
        freezer = Sticky()
        storage = SimpleNamespace(table=[entry], freezer=freezer)
        registry = SimpleNamespace(
            containers={},
            quiet=Quiet(),
            archives=SimpleNamespace(under_way=()),
            caller=SimpleNamespace(run=synced),
            storage=SimpleNamespace(get=lambda: storage),
            events=SimpleNamespace(last=0, publish=lambda *_, **__: None),
            spawn=asyncio.ensure_future,
        )
        service = SnapshotService(cast("Registry", registry), str(tmp_path))

        def prepare() -> asyncio.Task[Any]:
            call = Call("guest.snapshot_prepare", None, ContextLogger(logging.getLogger("test"), {}))
            return asyncio.ensure_future(service.prepare(PrepareSnapshot("s", 60_000), call))

        with pytest.raises(RpcError, match="no such luck"):
            await prepare()
        again = prepare()
        done, _ = await asyncio.wait([again], timeout=0.05)
        assert not done
        freezer.through.set()
        assert (await again).frozen == ("m",)
        assert (entry.frozen_until_ns, registry.quiet.refusal("container.create") is None) == (1, False)

    watched_loop.run(scenario())
