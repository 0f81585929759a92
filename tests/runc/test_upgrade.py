"""Other code for a real agent while containers run: promoted, rolled back, refused; nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gcsagent.host.archive import put_archive
from gcsagent.host.client import Client
from gcsagent.host.streams import Stream
from gcsagent.host.upgrade import RolledBack, pack, upgrade
from protocol.errors import Code
from protocol.families.agent import AwaitUpgrade, Upgrade
from protocol.families.archive import PutArchive
from protocol.families.storage import ListMounts
from protocol.types import UpgradeState
from tests.cases import pattern
from tests.cases.agents import REPO, RunningAgent, eventually, stopped_clean
from tests.cases.chaos import Storm, weather_the_storm
from tests.cases.spine import close_box, open_box
from tests.cases.target import MIB, OUTPUT, Target, creation, refused, run

SECONDS = 50.0
SIZE = 64 * MIB
APP = Path("gcsagent", "agent", "app.py")
CRASH = "raise RuntimeError('this code is no good')\n"
HANG = "import threading\nthreading.Event().wait()\n"


@pytest.fixture
def own(rootfs: str) -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent())


@pytest.fixture
def target(own: RunningAgent, rootfs: str) -> Target:
    return Target(own.address, rootfs, box="box", pace=2.0, execs=1)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of our own code, to be changed."""
    for package in ("gcsagent", "protocol"):
        shutil.copytree(REPO / package, tmp_path / "src" / package, ignore=shutil.ignore_patterns("*.pyc"))
    return tmp_path / "src"


def with_version(code: Path, version: str) -> bytes:
    init = code / "gcsagent" / "__init__.py"
    init.write_text(init.read_text() + f"\n__version__ = {version!r}\n")
    return pack(code)


@contextlib.asynccontextmanager
async def streaming(target: Target, client: Client) -> AsyncIterator[Stream]:
    """A container that writes stream 1 to an attached stdout, held up while nobody reads."""
    command = tuple(pattern.command(f"write(1, 1, {SIZE})"))
    await client.create_container(creation(target, "box", command, stdio=OUTPUT))
    try:
        async with await client.attach("box") as out:
            await client.start_container("box")
            yield out
    finally:
        await client.delete_container("box", force=True)


async def digest_up_to(out: Stream, total: hashlib._Hash, end: int, pause: float = 0.0) -> None:
    """Reads and hashes; ``pause`` seconds between reads make it last."""
    while out.position < end and (data := await out.read(min(65536, end - out.position))):
        total.update(data)
        await asyncio.sleep(pause)


async def all_as_it_was(client: Client, out: Stream, total: hashlib._Hash) -> None:
    """The stream comes whole, an exec works, and the container's end is told."""
    await digest_up_to(out, total, SIZE // 2)
    completed = await run(client, "box", "echo", "still here")
    assert (completed.exit.exit_code, completed.stdout) == (0, b"still here\n")
    waiting = asyncio.create_task(client.wait_container("box"))
    await digest_up_to(out, total, SIZE)
    record = await waiting
    assert (out.position, total.hexdigest()) == (SIZE, pattern.digest(1, SIZE))
    assert (record.exit_code, record.streams["stdout"]) == (0, SIZE)


def test_new_code_takes_over_in_the_middle_of_a_stream(target: Target, code: Path) -> None:
    archive = with_version(code, "9.9.9")

    async def scene() -> None:
        async with asyncio.timeout(SECONDS), await Client.connect(target.address) as client:
            before = await client.info()
            async with streaming(target, client) as out:
                total = hashlib.sha256()
                await digest_up_to(out, total, SIZE // 8)
                flowing = asyncio.create_task(digest_up_to(out, total, SIZE // 4, pause=0.005))
                status = await upgrade(client, archive)
                assert not flowing.done()  # it went on throughout
                await flowing
                sha256 = hashlib.sha256(archive).hexdigest()
                assert (status.state, status.running) == (UpgradeState.PROMOTED, sha256)
                after = await client.info()
                assert (after.agent_version, after.code, before.code) == ("9.9.9", sha256, "")
                assert (after.generation, after.supervisor_pid) == (
                    before.generation + 1,
                    before.supervisor_pid,
                )
                await all_as_it_was(client, out, total)
            again = await upgrade(client, archive)
            assert again.running == sha256
            assert (await client.ping()).generation == after.generation

    asyncio.run(scene())


@pytest.mark.parametrize(
    "fault, trial, says",
    [
        (CRASH, 20.0, "the new code ended with status 1 before it was ready"),
        (HANG, 2.0, "the new code did not become ready within 2 s"),
    ],
)
def test_code_that_is_no_good_gives_way_to_the_old(
    own: RunningAgent, target: Target, code: Path, fault: str, trial: float, says: str
) -> None:
    (code / APP).write_text(fault)
    archive = pack(code)

    async def scene() -> None:
        async with asyncio.timeout(SECONDS), await Client.connect(target.address) as client:
            before = await client.info()
            async with streaming(target, client) as out:
                total = hashlib.sha256()
                await digest_up_to(out, total, SIZE // 8)
                with pytest.raises(RolledBack, match=says) as caught:
                    await upgrade(client, archive, trial=trial)
                assert caught.value.status.state is UpgradeState.ROLLED_BACK
                after = await client.info()
                assert (after.generation, after.code) == (before.generation + 2, "")
                await all_as_it_was(client, out, total)

    asyncio.run(scene())
    log = own.log_tail()
    if fault == CRASH:
        assert "this code is no good" in log
    else:
        assert "Fatal Python error: Aborted" in log
        assert f'"status": {-signal.SIGABRT}' in log


def test_what_is_loaded_later_is_of_the_code_that_runs(target: Target, code: Path) -> None:
    """Services are imported with their first request, here after an upgrade, or one that came to nothing."""
    service = code / "gcsagent/agent/storage/service.py"
    first = "        after = self.table"
    mark = "raise RpcError(Code.INTERNAL, 'this is the new code')"
    service.write_text(service.read_text().replace(first, f"        {mark}\n{first}"))
    assert mark in service.read_text()
    good = pack(code)
    (code / APP).write_text(CRASH)
    bad = pack(code)

    async def scene() -> None:
        async with asyncio.timeout(SECONDS), await Client.connect(target.address) as client:
            with pytest.raises(RolledBack):
                await upgrade(client, bad)
            assert (await client.call("storage.list", ListMounts())).mounts == ()
            await upgrade(client, good)
            with refused(Code.INTERNAL) as caught:
                await client.call("storage.list", ListMounts())
            assert "this is the new code" in caught.value.message

    asyncio.run(scene())


@pytest.mark.parametrize("spoken", ["PROTOCOL_MIN = 2\nPROTOCOL_MAX = 3\n", "PROTOCOL_MAX = 'x'\n", "][\n"])
def test_code_that_no_host_of_today_can_talk_to_is_refused(target: Target, code: Path, spoken: str) -> None:
    (code / "protocol" / "__init__.py").write_text(f"DEFAULT_PORT = 1024\n{spoken}")

    async def body() -> None:
        async with asyncio.timeout(SECONDS), await Client.connect(target.address) as client:
            before = (await client.ping()).generation
            with refused(Code.FAILED_PRECONDITION):
                await upgrade(client, pack(code))
            assert (await client.ping()).generation == before
            assert (await client.info()).code == ""

    asyncio.run(body())


def test_what_was_promoted_is_what_comes_back(target: Target, code: Path) -> None:
    good = with_version(code, "9.9.9")
    (code / APP).write_text(CRASH)
    bad = pack(code)

    async def scene() -> None:
        async with asyncio.timeout(SECONDS), await Client.connect(target.address) as client:
            await upgrade(client, good)
            with pytest.raises(RolledBack):
                await upgrade(client, bad)
            assert (await client.info()).agent_version == "9.9.9"

    asyncio.run(scene())


# -- what is refused before anything happens --------------------------------------------------------


def test_upgrades_in_the_middle_of_everything(target: Target, code: Path) -> None:
    """Stdout, stdin, a raw terminal, a spool and execs, through two promotions, a crash and a hang."""
    good = [with_version(code, version) for version in ("9.1", "9.2")]
    bad = []
    for fault in (CRASH, HANG):
        (code / APP).write_text(fault)
        bad.append(pack(code))
    plan = [(good[0], True), (bad[0], False), (good[1], True), (bad[1], False)]
    storm = Storm(kills=len(plan), stdout=SIZE, stdin=24 * MIB, tty=MIB, spool=16 * MIB, execs=8)

    async def scene() -> None:
        async with asyncio.timeout(2 * SECONDS), await Client.connect(target.address, patience=30) as client:

            async def switch() -> None:
                archive, promoted = plan.pop(0)
                with contextlib.nullcontext() if promoted else pytest.raises(RolledBack):
                    await upgrade(client, archive, trial=20.0 if archive is not bad[1] else 2.0)

            await open_box(target)
            try:
                await weather_the_storm(target, storm, switch)
            finally:
                await close_box(target)
            assert (await client.info()).agent_version == "9.2"

    asyncio.run(scene())


async def send(client: Client, name: str, data: bytes) -> None:
    """A file of that name, where an upgrade looks for it."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as made:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        made.addfile(member, io.BytesIO(data))
    uploads = PutArchive(path=f"{(await client.info()).state_dir}/uploads")
    await put_archive(client, uploads, pieces(tar.getvalue()))


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 100_000):
        yield data[at : at + 100_000]


async def broken_off(data: bytes) -> AsyncIterator[bytes]:
    yield data
    raise ConnectionResetError("the host is gone")


def test_an_archive_that_is_not_what_was_promised_changes_nothing(own: RunningAgent, code: Path) -> None:
    archive = pack(code)
    sha256 = hashlib.sha256(archive).hexdigest()
    outside = io.BytesIO()
    with tarfile.open(fileobj=outside, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("gcsagent/__init__.py"))
        tar.addfile(tarfile.TarInfo("../../../escaped"))
    uploads = own.state_dir / "uploads"

    async def scene() -> None:
        async with asyncio.timeout(SECONDS), await Client.connect(own.address) as client:
            with refused(Code.NOT_FOUND):
                await client.call("agent.upgrade", Upgrade(sha256))
            for wrong in (archive[:-1000], archive[:-1] + bytes([archive[-1] ^ 1])):
                await send(client, sha256, wrong)
                with refused(Code.INVALID_ARGUMENT, field="sha256"):
                    await client.call("agent.upgrade", Upgrade(sha256))
                assert not any(uploads.iterdir())
            other = hashlib.sha256(outside.getvalue()).hexdigest()
            await send(client, other, outside.getvalue())
            with refused(Code.INVALID_ARGUMENT, field="sha256"):
                await client.call("agent.upgrade", Upgrade(other))
            assert not any(uploads.iterdir())
            status = await client.call("agent.upgrade_status", AwaitUpgrade(wait=True))
            assert status.state is UpgradeState.NONE
            assert (await client.ping()).generation == 1
            (uploads / "stale").touch()
            await send(client, sha256, archive)
            await client.call("agent.upgrade", Upgrade(sha256))
            status = await client.call("agent.upgrade_status", AwaitUpgrade(wait=True))
            assert status.running == sha256
            assert [path.name for path in uploads.iterdir()] == ["stale"]  # somebody may be about to use it

    asyncio.run(scene())
    assert not list(own.directory.rglob("escaped"))
    assert not (own.directory.parent / "escaped").exists()


def test_a_transfer_that_is_broken_off_leaves_nothing(own: RunningAgent, code: Path) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        member = tarfile.TarInfo("0" * 64)
        member.size = 4 * MIB
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    uploads = own.state_dir / "uploads"

    async def scene() -> None:
        async with asyncio.timeout(SECONDS), await Client.connect(own.address) as client:
            with pytest.raises(ConnectionResetError):
                await put_archive(
                    client, PutArchive(path=str(uploads)), broken_off(whole.getvalue()[: 2 * MIB])
                )
            with refused(Code.NOT_FOUND):
                await client.call("agent.upgrade", Upgrade("0" * 64))

    asyncio.run(scene())
    assert eventually(lambda: not any(uploads.iterdir()))


# -- gcsctl -----------------------------------------------------------------------------------------


def gcsctl(own: RunningAgent, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gcsagent.host", "--address", own.address, *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_gcsctl_upgrades_and_says_how_it_ended(own: RunningAgent, code: Path, tmp_path: Path) -> None:
    archive = with_version(code, "9.9.9")
    (tmp_path / "new.tar.gz").write_bytes(archive)
    done = gcsctl(own, "upgrade", str(tmp_path / "new.tar.gz"))
    sha256 = hashlib.sha256(archive).hexdigest()
    assert (done.returncode, done.stdout, done.stderr) == (0, f"promoted: the agent runs {sha256[:12]}\n", "")
    (code / APP).write_text(CRASH)
    done = gcsctl(own, "upgrade", str(code))
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("gcsctl: rolled back: the new code ended with status 1")
    assert done.stderr.count("\n") == 1
    assert sha256 in gcsctl(own, "info").stdout
