"""What gcsctl sends for an upgrade, and what it makes of the answers, against a scripted agent."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.client import Client
from gcsagent.host.upgrade import RolledBack, UnusableCode, pack, upgrade
from protocol.families.agent import Upgrading
from protocol.limits import MAX_CHUNK, MAX_UPLOAD
from protocol.types import UpgradeState, UpgradeStatus
from tests.fakes.fake_agent import FakeAgent
from tests.unit.test_protocol_vectors import VECTORS


@pytest.fixture
def code(tmp_path: Path) -> Path:
    for name in (
        "gcsagent/__init__.py",
        "gcsagent/agent/app.py",
        "gcsagent/agent/__pycache__/app.cpython-311.pyc",
        "gcsagent/host/client.py",
        "protocol/__init__.py",
        "tests/big.bin",
    ):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "src"


def test_a_directory_is_packed_without_what_no_guest_needs_and_always_alike(code: Path) -> None:
    first = pack(code)
    os.utime(code / "gcsagent/__init__.py", (1, 1))
    (code / "gcsagent/__init__.py").chmod(0o600)
    assert pack(code) == first
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        assert tar.getnames() == ["gcsagent/__init__.py", "gcsagent/agent/app.py", "protocol/__init__.py"]
        assert {member.mode for member in tar} == {0o644}


def test_an_archive_is_sent_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "code.tar").write_bytes(b"whatever: the guest will say")
    assert pack(tmp_path / "code.tar") == b"whatever: the guest will say"


def test_what_cannot_be_an_agents_code_is_refused_here(tmp_path: Path) -> None:
    with pytest.raises(UnusableCode, match="holds no gcsagent/"):
        pack(tmp_path)
    with pytest.raises(UnusableCode, match="No such file"):
        pack(tmp_path / "missing")
    with open(tmp_path / "huge", "wb") as huge:
        huge.truncate(MAX_UPLOAD + 1)
    with pytest.raises(UnusableCode, match="more than"):
        pack(tmp_path / "huge")


def told(method: str) -> dict[str, Any]:
    """The golden result of ``method``."""
    for case in json.loads((VECTORS / "results.json").read_text()):
        if case["name"] == method:
            result: dict[str, Any] = case["message"]["response"]["result"]
            return result
    raise LookupError(method)


class Guest:
    """What a guest's agents have taken, and what they say about it."""

    def __init__(self, agent: FakeAgent, after: UpgradeStatus, before: UpgradeStatus) -> None:
        self.agent, self.after, self.status = agent, after, before
        agent.handlers |= {
            "agent.info": lambda params: {**told("agent.info"), "state_dir": "/run/gcs"},
            "agent.upgrade": self._upgrade,
            "agent.upgrade_status": lambda params: self.status,
        }

    def sent(self) -> tuple[str, bytes]:
        """The one file of the one archive: its name and what is in it."""
        (data,) = self.agent.archives
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            (member,) = tar.getmembers()
            file = tar.extractfile(member)
            assert file is not None
            return member.name, file.read()

    def _upgrade(self, params: Any) -> Upgrading:
        assert self.sent()[0] == params.sha256
        self.status = self.after
        asyncio.get_running_loop().call_later(0.05, self.agent.drop_all)  # as the switch does
        return Upgrading(2)


def scene(tmp_path: Path, archive: bytes, after: UpgradeStatus, **status: Any) -> tuple[Any, Guest]:
    async def run() -> tuple[Any, Guest]:
        async with FakeAgent(tmp_path / "s") as agent:
            guest = Guest(agent, after, UpgradeStatus(**status))
            async with asyncio.timeout(20), await Client.connect(agent.address) as client:
                try:
                    return await upgrade(client, archive, trial=2.5), guest
                except RolledBack as error:
                    return error, guest

    return asyncio.run(run())


ARCHIVE = os.urandom(2 * MAX_CHUNK + 17)
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()
PROMOTED = UpgradeStatus(UpgradeState.PROMOTED, SHA256, "", SHA256)


def test_it_is_sent_as_a_file_and_the_switch_survived(tmp_path: Path) -> None:
    result, guest = scene(tmp_path, ARCHIVE, PROMOTED)
    assert result == PROMOTED
    assert guest.sent() == (SHA256, ARCHIVE)
    [put] = guest.agent.named("archive.put")
    assert put["path"] == "/run/gcs/uploads"
    [asked] = guest.agent.named("agent.upgrade")
    assert asked["trial_ms"] == 2500


def test_code_that_runs_already_is_not_sent(tmp_path: Path) -> None:
    result, guest = scene(tmp_path, ARCHIVE, PROMOTED, running=SHA256)
    assert result.running == SHA256
    assert not guest.agent.archives


def test_a_roll_back_is_an_error_with_its_reason(tmp_path: Path) -> None:
    after = UpgradeStatus(UpgradeState.ROLLED_BACK, SHA256, "it did not start", "")
    result, _ = scene(tmp_path, ARCHIVE, after)
    assert isinstance(result, RolledBack)
    assert str(result) == "rolled back: it did not start"
    assert result.status == after


def test_somebody_elses_upgrade_is_not_taken_for_ours(tmp_path: Path) -> None:
    other = UpgradeStatus(UpgradeState.PROMOTED, "0" * 64, "", "0" * 64)
    result, _ = scene(tmp_path, ARCHIVE, other)
    assert str(result) == "rolled back: another upgrade came in between"


@pytest.mark.parametrize(
    "arguments", [["upgrade"], ["upgrade", "--trial", "0", "x"], ["upgrade", "/nowhere"]]
)
def test_a_wrong_command_line_is_one_line_and_125(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gcsagent.host", "--address", "unix:/nowhere/s", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 125
    assert done.stderr.count("\n") == 1
