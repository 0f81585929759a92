"""agent.upload, agent.upgrade and agent.upgrade_status: other code for the agent, over the wire.

    <state>/uploads/<upload id>     what has arrived of an archive
    <state>/code/<sha256>/          an archive unpacked: gcsagent/ and protocol/

The switch itself is the supervisor's (gcsagent.supervisor.upgrade): this agent answers, and is gone at the
next instruction, as if it had been killed. What is then on disk must suit both versions until the new one is
promoted: see process_dir.VERSION.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import threading
import time
from typing import Any

from gcsagent.agent.bounds import Bounds
from gcsagent.agent.call import Call
from gcsagent.agent.supervisor_client import SupervisorClient, SupervisorError
from protocol import PROTOCOL_MAX, PROTOCOL_MIN
from protocol.errors import Code, RpcError
from protocol.families.agent import AwaitUpgrade, Upgrade, Upgrading, Upload, Uploaded
from protocol.types import UpgradeState, UpgradeStatus

UNTOUCHED_SECONDS = 60.0
"""After that an upload is taken to be nobody's, and gives way to another."""

_log = logging.getLogger("agent.upgrade")


class UpgradeService:
    def __init__(self, state: str, generation: int, supervisor: SupervisorClient, bounds: Bounds) -> None:
        self._bounds = bounds
        self._uploads, self._code = os.path.join(state, "uploads"), os.path.join(state, "code")
        self._generation, self._supervisor = generation, supervisor
        self._status = UpgradeStatus()
        self._told = asyncio.Event()
        self._preparing = threading.Lock()
        supervisor.topics["upgrade"] = self._take

    async def load(self) -> None:
        """Asks the supervisor where things stand. What an earlier supervisor's agents left goes."""
        if self._generation == 1:
            self.clear()
        try:
            self._take(await self._supervisor.call("upgrade_status", {}))
        except SupervisorError as error:  # one that is older than this
            _log.warning("the supervisor cannot upgrade", extra={"error": str(error)})

    def clear(self) -> None:
        """Removes everything uploaded."""
        for directory in (self._uploads, self._code):
            for entry in _entries(directory):
                _remove(os.path.join(directory, entry))

    @property
    def running(self) -> str:
        """SHA-256 of the archive whose code this is; "" is what was installed."""
        return self._status.running

    def _take(self, status: dict[str, Any]) -> None:
        self._status = UpgradeStatus(
            state=UpgradeState(status["state"]),
            sha256=os.path.basename(status["path"]),
            error=status["error"],
            running=os.path.basename(status["running"]),
        )
        self._told.set()
        self._told = asyncio.Event()

    # -- requests -------------------------------------------------------------------------------

    def upload(self, params: Upload, call: Call) -> Uploaded:
        path = os.path.join(self._uploads, params.upload_id)
        os.makedirs(self._uploads, mode=0o700, exist_ok=True)
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if params.offset > size:
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"there are {size} bytes of {params.upload_id}: go on from there",
                offset=size,
            )
        if params.offset + len(params.data) > self._bounds.limits.max_upload_bytes:
            raise self._bounds.exhausted("max_upload_bytes", "bytes are all that an upload may have")
        self._make_room(params.upload_id)
        call.commit()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.seek(params.offset)
            file.write(params.data)
        return Uploaded(max(size, params.offset + len(params.data)))

    def _make_room(self, upload: str) -> None:
        """Uploads nobody finished must not fill the guest. Raises RESOURCE_EXHAUSTED while all are in use."""
        others = [os.path.join(self._uploads, name) for name in _entries(self._uploads) if name != upload]
        if len(others) < self._bounds.limits.max_uploads:
            return
        oldest = min(others, key=os.path.getmtime)
        if time.time() - os.path.getmtime(oldest) < UNTOUCHED_SECONDS:
            raise self._bounds.exhausted("max_uploads", "uploads are under way: wait until one has been used")
        os.unlink(oldest)

    async def upgrade(self, params: Upgrade, call: Call) -> Upgrading:
        """Answers when all that can be checked has been; then this agent ends and the new code starts."""
        if params.sha256 == self._status.running:  # again, or an answer that was lost
            _remove(os.path.join(self._uploads, params.upload_id))
            return Upgrading(self._generation)
        if self._status.state is UpgradeState.TRYING:
            raise RpcError(
                Code.FAILED_PRECONDITION, "an upgrade is under way: agent.upgrade_status waits for it"
            )
        path = os.path.join(self._code, params.sha256)
        await asyncio.to_thread(self._prepare, os.path.join(self._uploads, params.upload_id), path, params)
        call.commit()
        seconds = params.trial_ms / 1000
        await self._supervisor.call("upgrade", {"path": path, "seconds": seconds})
        call.afterwards = _end
        _log.info("upgrading", extra={"sha256": params.sha256, "trial_s": seconds})
        return Upgrading(self._generation + 1)

    async def status(self, params: AwaitUpgrade, _call: Call) -> UpgradeStatus:
        while params.wait and self._status.state is UpgradeState.TRYING:
            await self._told.wait()
        return self._status

    def _prepare(self, upload: str, path: str, params: Upgrade) -> None:
        """In a thread: hashing and unpacking take seconds in a slow guest. One at a time: a request that
        was cancelled leaves its thread behind."""
        if not self._preparing.acquire(blocking=False):
            raise RpcError(Code.FAILED_PRECONDITION, "another archive is being unpacked; wait for its end")
        try:
            self._check_and_unpack(upload, path, params)
        finally:
            self._preparing.release()

    def _check_and_unpack(self, upload: str, path: str, params: Upgrade) -> None:
        from gcsagent.agent import archive

        try:
            found = archive.digest(upload)
        except FileNotFoundError:
            raise RpcError(Code.NOT_FOUND, f"there is no upload {params.upload_id}") from None
        if found != params.sha256:
            raise RpcError(
                Code.INVALID_ARGUMENT,
                f"what arrived of {params.upload_id}, {os.path.getsize(upload)} bytes, is not that archive:"
                f" its SHA-256 is {found}",
                field="sha256",
            )
        for name in _entries(self._code):  # of earlier tries; what runs stays
            if name != self._status.running:
                _remove(os.path.join(self._code, name))
        try:
            archive.unpack(upload, path)
        except archive.ArchiveError as error:
            raise RpcError(Code.INVALID_ARGUMENT, f"the archive: {error}", field="upload_id") from error
        finally:
            os.unlink(upload)
        try:
            _check_protocol(path)
        except RpcError:
            _remove(path)
            raise


def _check_protocol(path: str) -> None:
    """Refuses code that none of today's hosts could talk to: it would be promoted, and out of reach.

    Its range is read, not imported: nothing of it runs before the trial.
    """
    low, high = _protocol_range(os.path.join(path, "protocol", "__init__.py"))
    if low is None or high is None or low > PROTOCOL_MAX or high < PROTOCOL_MIN:
        raise RpcError(
            Code.FAILED_PRECONDITION,
            f"the new code speaks protocol {low} to {high}, this agent and its hosts {PROTOCOL_MIN} to"
            f" {PROTOCOL_MAX}: upgrade by way of a version that speaks both",
        )


def _protocol_range(path: str) -> tuple[int | None, int | None]:
    import ast  # half a megabyte that no other request needs

    found: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None, None
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and type(node.value.value) is int:
                    found[target.id] = node.value.value
    return found.get("PROTOCOL_MIN"), found.get("PROTOCOL_MAX")


def _end() -> None:
    """Nothing is tidied up: what SIGKILL may do at any instruction, this may do here."""
    os._exit(0)


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
