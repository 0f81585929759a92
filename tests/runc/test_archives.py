"""Archives that are broken off: by the death of their process, of the agent, of the container they are in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gcsagent.host.archive import put_archive
from gcsagent.host.client import Client
from gcsagent.host.errors import ConnectionLost
from gcsagent.tarball.unpack import TEMPORARY
from protocol.errors import Code, RpcError
from protocol.families.archive import Archived, PutArchive
from protocol.families.container import CreateContainer
from tests.cases.agents import RunningAgent, children, eventually, stopped_clean
from tests.cases.files import get, put, tar
from tests.cases.target import Target, creation, name, refused, remove

BIG = tar(("small", b"whole", {}), ("big", b"b" * 2_000_000, {}))


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RunningAgent]:
    """An agent that may be killed; its end is a test as well."""
    yield from stopped_clean(RunningAgent("--log-level", "debug"))


def archivers(agent: RunningAgent) -> list[int]:
    found = []
    for pid in children(agent.pid):
        with contextlib.suppress(OSError):
            if b"gcsagent.archiver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def notes(agent: RunningAgent) -> list[Path]:
    """Where archivers at work write down what they call a file for now."""
    return [path for path in (agent.state_dir / "archives").iterdir() if not path.suffix]


class Half:
    """A source that has given the first half of an archive and waits to be told to go on."""

    def __init__(self) -> None:
        self.given, self.go_on = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield BIG[:1_000_000]
        self.given.set()
        await self.go_on.wait()
        yield BIG[1_000_000:]


@contextlib.asynccontextmanager
async def putting(client: Client, params: PutArchive) -> AsyncIterator[tuple[asyncio.Task[Archived], Half]]:
    """A put that stands still half-way."""
    half = Half()
    task = asyncio.create_task(put_archive(client, params, half.__aiter__()))
    try:
        await asyncio.wait_for(half.given.wait(), 20)
        yield task, half
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def pretend_a_temporary_file(agent: RunningAgent, directory: Path) -> Path:
    """As an archiver would leave one on a file system whose files cannot be without a name."""
    left = directory / f"{TEMPORARY}0123456789abcdef"
    left.write_text("half")
    [note] = notes(agent)
    note.write_text(json.dumps(str(left)[1:]))
    return left


def gone(path: Path) -> bool:
    return not path.exists()


def test_a_killed_archiver_is_told_and_leaves_nothing(own: RunningAgent, tmp_path: Path) -> None:
    before = own.holdings()

    async def attempt() -> None:
        async with (
            await Client.connect(own.address) as client,
            putting(client, PutArchive(path=str(tmp_path))) as (task, _),
        ):
            left = pretend_a_temporary_file(own, tmp_path)
            [pid] = archivers(own)
            os.kill(pid, signal.SIGKILL)
            with refused(Code.INTERNAL):
                await task
            assert not left.exists()

    asyncio.run(attempt())
    assert os.listdir(tmp_path) == ["small"]
    own.assert_holds(before)
    assert not notes(own)


def test_the_death_of_the_agent_does_not_touch_an_archive(own: RunningAgent, tmp_path: Path) -> None:
    async def attempt() -> None:
        async with (
            await Client.connect(own.address) as client,
            putting(client, PutArchive(path=str(tmp_path))) as (task, half),
        ):
            os.kill(own.agent_pid, signal.SIGKILL)
            own.wait_for_generation(2)
            half.go_on.set()
            assert (await asyncio.wait_for(task, 20)).entries == 2

    asyncio.run(attempt())
    assert (tmp_path / "big").read_bytes() == b"b" * 2_000_000
    assert eventually(lambda: not notes(own) and not archivers(own))


def test_what_died_with_the_agent_is_swept_by_the_next(own: RunningAgent, tmp_path: Path) -> None:
    async def attempt() -> None:
        async with (
            await Client.connect(own.address) as client,
            putting(client, PutArchive(path=str(tmp_path))) as (task, _),
        ):
            left = pretend_a_temporary_file(own, tmp_path)
            [pid] = archivers(own)
            os.kill(own.agent_pid, signal.SIGSTOP)
            os.kill(pid, signal.SIGKILL)
            os.kill(own.agent_pid, signal.SIGKILL)
            own.wait_for_generation(2)
            with pytest.raises(ConnectionLost):
                await task
            assert eventually(lambda: gone(left))

    asyncio.run(attempt())
    assert os.listdir(tmp_path) == ["small"]
    assert eventually(lambda: not list((own.state_dir / "archives").iterdir()))


def test_what_was_in_a_container_that_is_gone_is_not_looked_for_in_the_guest(
    own: RunningAgent, tmp_path: Path
) -> None:
    """An agent was killed over an archive, and the container's deletion did not wait for that any longer."""
    directory = own.state_dir / "archives"
    directory.mkdir(exist_ok=True)
    (directory / "0123.of").write_text(json.dumps("gone"))
    (directory / "0123").touch()
    left = pretend_a_temporary_file(own, tmp_path)
    os.kill(own.agent_pid, signal.SIGKILL)
    assert eventually(lambda: not list(directory.iterdir()))
    assert left.exists()


@pytest.mark.parametrize("successor", [False, True])
def test_deleting_a_container_breaks_its_archives_off(
    own: RunningAgent, rootfs: str, successor: bool
) -> None:
    """Also those that an earlier agent has begun: the overlay they are in goes."""
    target = Target(own.address, rootfs, box="", pace=1.0, execs=1)

    async def attempt() -> None:
        async with await Client.connect(own.address) as client:
            params: CreateContainer = creation(target, name("c"), ("sleep", "100000"))
            await client.create_container(params)
            try:
                async with putting(client, PutArchive(params.container, "/srv")) as (task, _):
                    if successor:
                        os.kill(own.agent_pid, signal.SIGKILL)
                        own.wait_for_generation(2)
                    await client.delete_container(params.container, force=True)
                    with pytest.raises((RpcError, ConnectionLost)) as caught:
                        await asyncio.wait_for(task, 20)
                    assert getattr(caught.value, "code", Code.CANCELLED) is Code.CANCELLED
            finally:
                await remove(client, params.container)

    asyncio.run(attempt())
    assert eventually(lambda: not archivers(own))


def test_archives_that_cannot_be_begun_leave_nothing(own: RunningAgent, tmp_path: Path) -> None:
    """The state directory is on a disk that is full; each request would else have left a file."""
    directory = own.state_dir / "archives"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k,nr_inodes=2", "x", directory], check=True)
    try:

        async def attempt() -> None:
            async with await Client.connect(own.address) as client:
                for _ in range(2):
                    with refused(Code.RESOURCE_EXHAUSTED):
                        await put(client, None, str(tmp_path), BIG)

        asyncio.run(attempt())
        assert os.listdir(directory) == []
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize(
    "options, code", [("size=1m", Code.RESOURCE_EXHAUSTED), ("ro", Code.PERMISSION_DENIED)]
)
def test_a_file_system_that_is_full_or_read_only(
    agent: RunningAgent, tmp_path: Path, options: str, code: Code
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path], check=True, timeout=20)
    try:

        async def attempt() -> None:
            async with await Client.connect(agent.address) as client:
                with refused(code):
                    await put(client, None, str(tmp_path), BIG)

        asyncio.run(attempt())
        assert os.listdir(tmp_path) == (["small"] if code is Code.RESOURCE_EXHAUSTED else [])
    finally:
        subprocess.run(["umount", tmp_path], check=True, timeout=20)


def test_there_are_at_most_sixteen(own: RunningAgent, tmp_path: Path) -> None:
    async def attempt() -> None:
        async with await Client.connect(own.address) as client, contextlib.AsyncExitStack() as stack:
            for _ in range(16):
                await stack.enter_async_context(putting(client, PutArchive(path=str(tmp_path))))
            with refused(Code.RESOURCE_EXHAUSTED):
                await get(client, None, str(tmp_path))

    before = own.holdings()
    asyncio.run(attempt())
    own.assert_holds(before)
    assert os.listdir(tmp_path) == ["small"]
