"""agent.upgrade asked for twice at once. tests/runc/test_upgrade.py has the switch itself."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path
from typing import Any, cast

import pytest

from gcsagent.agent.bounds import Bounds
from gcsagent.agent.call import Call
from gcsagent.agent.logs import ContextLogger
from gcsagent.agent.supervisor_client import SupervisorClient, SupervisorError
from gcsagent.agent.upgrade import UpgradeService
from gcsagent.host.upgrade import pack
from protocol import PROTOCOL_MAX
from protocol.families.agent import Upgrade, Upgrading
from tests.fakes import watched_loop


class Hesitating:
    """A supervisor that refuses to switch, once it is let through."""

    def __init__(self) -> None:
        self.topics: dict[str, Any] = {}
        self.asked: list[str] = []
        self.begun, self.through = asyncio.Event(), asyncio.Event()

    async def call(self, _operation: str, arguments: dict[str, Any]) -> None:
        self.asked.append(os.path.basename(arguments["path"]))
        assert os.path.exists(arguments["path"])
        self.begun.set()
        await self.through.wait()
        assert os.path.exists(arguments["path"])
        raise SupervisorError("not now", 0)


def uploaded(state: Path, tmp_path: Path, version: str) -> str:
    source = tmp_path / version
    for package in ("gcsagent", "protocol"):
        (source / package).mkdir(parents=True)
        (source / package / "__init__.py").write_text(f"PROTOCOL_MIN = PROTOCOL_MAX = {PROTOCOL_MAX}\n")
    (source / "gcsagent" / "version").write_text(version)
    data = pack(source)
    sha256 = hashlib.sha256(data).hexdigest()
    (state / "uploads").mkdir(parents=True, exist_ok=True)
    (state / "uploads" / sha256).write_bytes(data)
    return sha256


def test_a_second_upgrade_leaves_the_first_one_s_code_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        supervisor = Hesitating()
        service = UpgradeService(str(tmp_path), 1, cast("SupervisorClient", supervisor), Bounds())
        log = ContextLogger(logging.getLogger("test"), {})
        (tmp_path / "code").mkdir()
        wanted = [uploaded(tmp_path, tmp_path, version) for version in ("1", "2")]

        def asked(sha256: str) -> asyncio.Task[Upgrading]:
            return asyncio.ensure_future(service.upgrade(Upgrade(sha256), Call("agent.upgrade", None, log)))

        first = asked(wanted[0])
        await asyncio.wait_for(supervisor.begun.wait(), 10)
        second = asked(wanted[1])
        done, _ = await asyncio.wait([second], timeout=0.3)
        assert (done, supervisor.asked) == (set(), wanted[:1])
        supervisor.through.set()
        for each in (first, second):
            with pytest.raises(SupervisorError):
                await each
        assert supervisor.asked == wanted

    watched_loop.run(scenario())
