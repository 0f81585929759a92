"""Gives an agent other code: packs it, sends it, and waits until it has been promoted or rolled back."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

from gcsagent.host.archive import put_archive
from gcsagent.host.client import Client
from gcsagent.host.dialogue import despite_losses
from gcsagent.host.errors import HostError
from protocol.families.agent import AwaitUpgrade, Upgrade
from protocol.families.archive import PutArchive
from protocol.limits import MAX_UPLOAD
from protocol.types import UpgradeStatus

PACKAGES = ("gcsagent", "protocol")
_LEFT_OUT = ("gcsagent/host/",)
"""Not in the guest."""

TRIAL_SECONDS = 30.0
COMING_BACK_SECONDS = 30.0
"""What an agent may take to answer again beyond the trial."""


class UnusableCode(HostError):
    """What was to be sent is no agent's code."""


class RolledBack(HostError):
    """The new code did not do; the old code runs again. ``status`` is the agent's own account."""

    def __init__(self, status: UpgradeStatus, sha256: str) -> None:
        why = status.error if status.sha256 == sha256 else "another upgrade came in between"
        super().__init__(f"rolled back: {why}")
        self.status = status


def pack(path: Path) -> bytes:
    """The archive for ``path``: itself, or the packages of that directory as a tar.gz.

    The same code gives the same bytes, and with them the same SHA-256. Raises UnusableCode.
    """
    try:
        archive = _pack_directory(path) if path.is_dir() else path.read_bytes()
    except OSError as error:
        raise UnusableCode(f"{path}: {error.strerror or error}") from error
    if len(archive) > MAX_UPLOAD:
        raise UnusableCode(f"{path}: {len(archive)} bytes, more than the {MAX_UPLOAD} an agent takes")
    return archive


def _pack_directory(path: Path) -> bytes:
    for package in PACKAGES:
        if not (path / package / "__init__.py").is_file():
            raise UnusableCode(f"{path} holds no {package}/: give the directory with gcsagent/ and protocol/")
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name in _files(path):
            data = (path / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def _files(path: Path) -> list[str]:
    found = []
    for package in PACKAGES:
        for parent, directories, files in os.walk(path / package):
            directories[:] = [name for name in directories if name != "__pycache__"]
            found += [os.path.relpath(os.path.join(parent, name), path) for name in files]
    return sorted(name for name in found if not name.startswith(_LEFT_OUT) and not name.endswith(".pyc"))


async def upgrade(client: Client, archive: bytes, *, trial: float = TRIAL_SECONDS) -> UpgradeStatus:
    """Sends ``archive`` and has the agent replaced by it; containers and streams go on.

    ``trial`` is how many seconds the new code may take to prove itself. Returns when it is promoted, at
    once if it runs already. Raises RolledBack, and what Client.call raises; INVALID_ARGUMENT: the archive
    is none.
    """
    sha256 = hashlib.sha256(archive).hexdigest()
    status: UpgradeStatus = await client.call("agent.upgrade_status", AwaitUpgrade(wait=True))
    if status.running != sha256:
        status = await _send_and_switch(client, archive, sha256, trial)
    if status.running != sha256:
        raise RolledBack(status, sha256)
    return status


async def _send_and_switch(client: Client, archive: bytes, sha256: str, trial: float) -> UpgradeStatus:
    directory = f"{(await client.info()).state_dir}/uploads"
    file = _as_file(sha256, archive)
    async for attempt in despite_losses():
        with attempt:
            await put_archive(client, PutArchive(path=directory), _once(file), digest=True)
    patience, client.timeout = client.timeout, max(client.timeout, trial + COMING_BACK_SECONDS)
    try:
        await client.call("agent.upgrade", Upgrade(sha256, round(trial * 1000)))
        status: UpgradeStatus = await client.call("agent.upgrade_status", AwaitUpgrade(wait=True))
    finally:
        client.timeout = patience
    return status


def _as_file(name: str, data: bytes) -> bytes:
    """A tar of one file: it gets its name in the guest when all of it is there."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o600
        tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
