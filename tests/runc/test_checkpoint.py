"""Checkpoints without CRIU: what is said where it is missing, and everything around it with a stand-in.

tests/fakes/shelf has the stand-in, a runc that starts afresh what it is to restore; what only CRIU can do is
tested in the VM (tests/vm/test_checkpoint.py).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gcsagent.host.checkpoints import (
    delete_checkpoint,
    list_checkpoints,
    make_checkpoint,
    restore_container,
)
from gcsagent.host.client import Client
from protocol.errors import Code, RpcError
from protocol.families.checkpoint import MakeCheckpoint, Restore
from protocol.families.stream import StreamName
from protocol.types import Status, Stdio, StreamMode, StreamSpec
from tests.cases.agents import RunningAgent, eventually, stopped_clean
from tests.cases.target import PIPES, STREAM, Target, connect, expect, remove, running
from tests.fakes.toolbox import Toolbox

SHELF = Path(__file__).parents[1] / "fakes" / "shelf"
HELPERS = ("runc", "rm", "mount", "umount", "sh", "nsenter", "ip")
SPOOL = StreamSpec(StreamMode.SPOOL, limit=1 << 20)
ECHO = "read line; echo got $line; sleep 100000"


@pytest.fixture(scope="module")
def bare(rootfs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """An agent on a machine that has no CRIU."""
    programs = tmp_path_factory.mktemp("programs")
    for name in HELPERS:
        found = shutil.which(name)
        assert found is not None, name
        (programs / name).symlink_to(found)
    yield from stopped_clean(RunningAgent("--log-level", "debug", path=str(programs)))


@pytest.fixture(scope="module")
def shelf(rootfs: str) -> Iterator[RunningAgent]:
    path = f"{SHELF}:{os.environ['PATH']}"
    yield from stopped_clean(RunningAgent("--log-level", "debug", runtime="shelving", path=path))


@asynccontextmanager
async def met(agent: RunningAgent, rootfs: str) -> AsyncIterator[tuple[Target, Client]]:
    target = Target(agent.address, rootfs, box="", pace=2.0, execs=1)
    async with asyncio.timeout(60), await connect(target) as client:
        yield target, client


def test_without_criu_it_is_said_what_is_missing(bare: RunningAgent, rootfs: str) -> None:
    async def body() -> None:
        async with met(bare, rootfs) as (target, client), running(target, client) as init:
            assert client.welcome is not None
            assert "checkpoint" not in client.welcome.features
            with pytest.raises(RpcError, match="criu") as caught:
                await make_checkpoint(client, MakeCheckpoint(init.container, "k"))
            assert caught.value.code is Code.FAILED_PRECONDITION
            assert caught.value.details["missing"] == "criu"
            assert (await client.container_state(init.container)).status is Status.RUNNING

    before = bare.holdings()
    asyncio.run(body())
    bare.assert_holds(before)


def test_what_cannot_be_saved_goes_on_and_says_why(shelf: RunningAgent, rootfs: str) -> None:
    async def body() -> None:
        script = "touch /unsavable; echo ready; read line; echo got $line"
        async with (
            met(shelf, rootfs) as (target, client),
            running(target, client, "sh", "-c", script, stdio=PIPES) as init,
        ):
            assert client.welcome is not None
            assert "checkpoint" in client.welcome.features
            await expect(init.streams["stdout"], b"ready\n")
            with pytest.raises(RpcError, match=r"CRIU cannot save .*: this cannot be saved") as caught:
                await make_checkpoint(client, MakeCheckpoint(init.container, "k"))
            assert caught.value.code is Code.FAILED_PRECONDITION
            assert caught.value.details["criu_errors"] == ["this cannot be saved", "so"]
            assert await list_checkpoints(client) == ()
            await init.streams["stdin"].write(b"on\n")
            await expect(init.streams["stdout"], b"got on\n")

    before = shelf.holdings()
    asyncio.run(body())
    shelf.assert_holds(before)


def test_streams_files_and_labels_move_along(shelf: RunningAgent, rootfs: str) -> None:
    """Twice from one checkpoint, once in the place of what was saved."""

    async def body() -> None:
        stdio = Stdio(stdin=STREAM, stdout=STREAM, stderr=SPOOL)
        script = (
            "if [ -e /been ]; then cat /been; read x; else echo 123456 >&2; echo one >/been; echo two; fi"
        )
        async with met(shelf, rootfs) as (target, client):
            wait = f"{script}; exec sleep 100000"
            async with running(
                target, client, "sh", "-c", wait, stdio=stdio, attached=False, labels={"a": "b"}
            ) as init:
                name = init.container
                await _until_quiet(client, name)
                about = await make_checkpoint(client, MakeCheckpoint(name, "k"))
                assert about.streams == {"stdin": 0, "stdout": 0, "stderr": 0}
                async with await client.attach(name) as out:
                    out.finish_at(0)
                    assert await out.read() == b""
                assert (await client.wait_container(name)).signal == 9
            for ident in (name, "second"):
                await restore_container(client, Restore("k", container=ident))
                try:
                    state = await client.container_state(ident)
                    assert (state.status, state.labels) == (Status.RUNNING, {"a": "b"})
                    async with await client.attach(ident) as out:
                        assert out.offset == 0
                        await expect(out, b"^two\none\n")
                    async with await client.attach(ident, stream=StreamName.STDERR, offset=2) as err:
                        await expect(err, b"^3456\n")
                finally:
                    await remove(client, ident)
            await delete_checkpoint(client, "k")
            with pytest.raises(RpcError) as caught:
                await delete_checkpoint(client, "k")
            assert caught.value.code is Code.NOT_FOUND

    before = shelf.holdings()
    asyncio.run(body())
    shelf.assert_holds(before)


@pytest.mark.parametrize("path", [None, "elsewhere"])
def test_two_containers_cannot_be_saved_as_one_at_once(
    shelf: RunningAgent, rootfs: str, tmp_path: Path, path: str | None
) -> None:
    """By the checkpoint's id, or by different ids in one directory."""
    where = None if path is None else str(tmp_path / path)

    async def body() -> None:
        async with (
            met(shelf, rootfs) as (target, client),
            running(target, client, "sleep", "1000") as one,
            running(target, client, "sleep", "1000") as two,
        ):
            saved = await asyncio.gather(
                *(
                    make_checkpoint(
                        client,
                        MakeCheckpoint(
                            init.container, f"k{index * bool(path)}", path=where, leave_running=True
                        ),
                    )
                    for index, init in enumerate((one, two))
                ),
                return_exceptions=True,
            )
            refused = [each for each in saved if isinstance(each, RpcError)]
            assert [each.code for each in refused] == [Code.ALREADY_EXISTS], saved
            (about,) = await list_checkpoints(client)
            assert about in saved
            for init in (one, two):
                assert (await client.container_state(init.container)).status is Status.RUNNING
            await delete_checkpoint(client, about.checkpoint)

    before = shelf.holdings()
    asyncio.run(body())
    shelf.assert_holds(before)


def test_a_deletion_that_fails_can_be_repeated(rootfs: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    toolbox = Toolbox(tmp_path_factory.mktemp("tools"))
    for program in SHELF.iterdir():
        (toolbox.directory / program.name).unlink(missing_ok=True)
        (toolbox.directory / program.name).symlink_to(program)

    async def body(agent: RunningAgent) -> None:
        async with met(agent, rootfs) as (target, client), running(target, client, "sleep", "1000") as init:
            asked = MakeCheckpoint(init.container, "k", leave_running=True)
            await make_checkpoint(client, asked)
            with toolbox.replaced("rm", "echo jammed >&2; exit 1"):
                for _ in range(2):
                    with pytest.raises(RpcError, match="jammed"):
                        await delete_checkpoint(client, "k")
                assert await list_checkpoints(client) == ()
            await delete_checkpoint(client, "k")
            await make_checkpoint(client, asked)
            await delete_checkpoint(client, "k")

    shelving = RunningAgent("--log-level", "debug", runtime="shelving", path=str(toolbox.directory))
    for agent in stopped_clean(shelving):
        asyncio.run(body(agent))
        assert not any((agent.state_dir / "checkpoints").iterdir())


def test_what_others_put_in_a_checkpoint_s_place_is_theirs(
    shelf: RunningAgent, rootfs: str, tmp_path: Path
) -> None:
    """Deleted, or swept up by the next agent: only the checkpoint's name goes."""
    place = tmp_path / "place"

    async def body() -> None:
        async with met(shelf, rootfs) as (target, client), running(target, client, "sleep", "1000") as init:
            asked = MakeCheckpoint(init.container, "k", path=str(place), leave_running=True)
            for deleted in (True, False):
                await make_checkpoint(client, asked)
                shutil.rmtree(place)
                place.mkdir()
                (place / "file").write_text("precious")
                if deleted:
                    await delete_checkpoint(client, "k")
                else:
                    os.kill(shelf.agent_pid, signal.SIGKILL)
                link = shelf.state_dir / "checkpoints" / "k"
                assert await asyncio.to_thread(eventually, lambda link=link: not link.is_symlink())
                assert (place / "file").read_text() == "precious"
                shutil.rmtree(place)

    before = shelf.holdings()
    asyncio.run(body())
    shelf.assert_holds(before)


async def _until_quiet(client: Client, name: str) -> None:
    while (await client.process_state(name, "init")).streams["stderr"].bytes < 7:
        pass  # each question is a round trip
    there = 0
    while not there:
        found = await client.container_processes(name)
        there = sum(each.command.startswith("sleep") for each in found)
