"""agent.upgrade and agent.upgrade_status: other code for the agent, over the wire.

    <state>/uploads/<sha256>        an archive, put there by archive.put: whole, or not at all
    <state>/code/<sha256>/          the archive unpacked: gcsagent/ and protocol/

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
from protocol.families.agent import AwaitUpgrade, Upgrade, Upgrading
from protocol.types import UpgradeState, UpgradeStatus

UNTOUCHED_SECONDS = 60.0
"""After that an archive in uploads is taken to be nobody's, and goes with the next one that is used."""

_log = logging.getLogger("agent.upgrade")


class UpgradeService:
    def __init__(self, state: str, generation: int, supervisor: SupervisorClient, bounds: Bounds) -> None:
        self._bounds = bounds
        self._uploads, self._code = os.path.join(state, "uploads"), os.path.join(state, "code")
        self._generation, self._supervisor = generation, supervisor
        self._status = UpgradeStatus()
        self._told = asyncio.Event()
        self._turn, self._preparing = asyncio.Lock(), threading.Lock()
        supervisor.topics["upgrade"] = self._take

    async def load(self) -> None:
        """Asks the supervisor where things stand. What an earlier supervisor's agents left goes."""
        if self._generation == 1:
            self.clear()
        os.makedirs(self._uploads, mode=0o700, exist_ok=True)
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

    async def upgrade(self, params: Upgrade, call: Call) -> Upgrading:
        """Answers when all that can be checked has been; then this agent ends and the new code starts.

        One at a time, until the supervisor has been told: preparing one removes the code of others.
        """
        async with self._turn:
            return await self._upgrade(params, call)

    async def _upgrade(self, params: Upgrade, call: Call) -> Upgrading:
        upload = os.path.join(self._uploads, params.sha256)
        if params.sha256 == self._status.running:  # again, or an answer that was lost
            _remove(upload)
            return Upgrading(self._generation)
        if self._status.state is UpgradeState.TRYING:
            raise RpcError(
                Code.FAILED_PRECONDITION, "an upgrade is under way: agent.upgrade_status waits for it"
            )
        path = os.path.join(self._code, params.sha256)
        await asyncio.to_thread(self._prepare, upload, path, params)
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
            size, found = os.stat(upload).st_size, ""
            if size <= self._bounds.limits.max_upload_bytes:
                found = archive.digest(upload)
        except FileNotFoundError:
            raise RpcError(
                Code.NOT_FOUND, f"put the archive into {self._uploads} first, as a file of that name"
            ) from None
        if not found:
            os.unlink(upload)
            raise self._bounds.exhausted("max_upload_bytes", "bytes are all that an archive of code may have")
        if found != params.sha256:
            os.unlink(upload)
            raise RpcError(
                Code.INVALID_ARGUMENT,
                f"the {size} bytes in {upload} are not that archive: their SHA-256 is {found}; put it again",
                field="sha256",
            )
        self.forget_others(upload)
        for name in _entries(self._code):  # of earlier tries; what runs stays
            if name != self._status.running:
                _remove(os.path.join(self._code, name))
        try:
            archive.unpack(upload, path)
        except archive.ArchiveError as error:
            raise RpcError(Code.INVALID_ARGUMENT, f"the archive: {error}", field="sha256") from error
        finally:
            os.unlink(upload)
        try:
            _check_protocol(path)
        except RpcError:
            _remove(path)
            raise

    def forget_others(self, upload: str) -> None:
        """Archives nobody asked for must not fill the guest."""
        for name in _entries(self._uploads):
            path = os.path.join(self._uploads, name)
            with contextlib.suppress(FileNotFoundError):
                if path != upload and time.time() - os.path.getctime(path) > UNTOUCHED_SECONDS:
                    _remove(path)


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
