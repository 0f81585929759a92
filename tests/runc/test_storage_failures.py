"""What mounting and unmounting meet with: tools that are missing, fail or lie, disks that hold other things.

The agent, the supervisor and the disks (loop devices) are real; the tools are scripts where they must fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gcsagent.agent import mountinfo
from gcsagent.host import storage
from gcsagent.host.client import Client
from protocol.errors import Code, RpcError
from protocol.families.storage import (
    Device,
    Format,
    FsType,
    ListMounts,
    MountKind,
    MountList,
    MountStatus,
    MountStorage,
    Verity,
)
from tests.cases import disks
from tests.cases.agents import RunningAgent, eventually, stopped_clean
from tests.cases.storage import bind, tmpfs
from tests.cases.target import MIB, Target, connect, name, refused
from tests.fakes.toolbox import Toolbox

pytestmark = pytest.mark.timeout(120)
SECONDS = 60.0
ROOT = "00" * 32


@dataclass(frozen=True, slots=True)
class Place:
    """An agent with its tools, and a directory for what a test makes."""

    agent: RunningAgent
    tools: Toolbox
    directory: Path
    nodes: list[str]

    def disk(self, content: bytes = b"", size: int = 16 * MIB) -> str:
        """A loop device with this at its beginning, zeros behind it."""
        image = disks.empty(self.directory / f"image{next(_numbers)}", size)
        with image.open("r+b") as file:
            file.write(content)
        made = subprocess.run(
            ["losetup", "-f", "--show", image], check=True, timeout=60, capture_output=True, text=True
        )
        self.nodes.append(made.stdout.strip())
        return self.nodes[-1]


_numbers = itertools.count()


@pytest.fixture(scope="module")
def toolbox(tmp_path_factory: pytest.TempPathFactory) -> Toolbox:
    return Toolbox(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def served(toolbox: Toolbox, rootfs: str) -> Iterator[RunningAgent]:
    yield from stopped_clean(toolbox.agent())


@pytest.fixture
def place(served: RunningAgent, toolbox: Toolbox, tmp_path: Path) -> Iterator[Place]:
    nodes: list[str] = []
    yield Place(served, toolbox, tmp_path, nodes)
    for node in nodes:
        subprocess.run(["losetup", "-d", node], check=True, timeout=60)


def told(agent: RunningAgent, story: Callable[[Client], Awaitable[None]]) -> None:
    """Afterwards nothing is mounted, and nothing in the state directory that was not before."""
    target = Target(agent.address, "", box="", pace=2.0, execs=1)
    before = agent.holdings()

    async def tell() -> None:
        async with await connect(target) as client, asyncio.timeout(SECONDS):
            await story(client)
            assert await storage.list_mounts(client) == ()

    asyncio.run(tell())
    agent.assert_holds(before)


def block(node: str, **more: object) -> MountStorage:
    return MountStorage(name("b"), MountKind.BLOCK, device=Device(path=node), **more)  # type: ignore[arg-type]


def swap(node: str, **more: object) -> MountStorage:
    return MountStorage(name("s"), MountKind.SWAP, device=Device(path=node), **more)  # type: ignore[arg-type]


def head(node: str, size: int = MIB) -> bytes:
    with open(node, "rb") as disk:
        return disk.read(size)


FRESH = {"format": Format.ON_FIRST_USE}


# -- tools --------------------------------------------------------------------------------------------


def test_a_missing_tool_is_named_with_its_package(place: Place) -> None:
    async def story(client: Client) -> None:
        node = place.disk()
        for tool, asked in (
            ("mkfs.ext4", block(node, **FRESH)),
            ("mkfs.xfs", block(node, fstype=FsType.XFS, **FRESH)),
            ("mkswap", swap(node, **FRESH)),
            ("mount", tmpfs(name("m"))),
            ("dd", block(node)),
        ):
            with place.tools.without(tool), refused(Code.UNIMPLEMENTED) as caught:
                await storage.mount(client, asked)
            assert caught.value.details["tool"] == tool
            assert f"no {tool}" in caught.value.message
            assert ("(package " in caught.value.message) == (tool.startswith("mk"))
        assert head(node) == bytes(MIB)

    told(place.agent, story)


def test_a_tool_that_cannot_be_executed_is_unavailable(place: Place) -> None:
    async def story(client: Client) -> None:
        with place.tools.unusable("mount"), refused(Code.UNAVAILABLE) as caught:
            await storage.mount(client, tmpfs(name("m")))
        assert "mount cannot be started" in caught.value.message

    told(place.agent, story)


def test_a_tool_that_fails_or_lies_leaves_nothing(place: Place) -> None:
    async def story(client: Client) -> None:
        where = place.directory / "new" / "place"
        asked = tmpfs(name("m"), target=str(where))
        for body, problem in (
            ("echo no such luck >&2; exit 32", "no such luck"),
            ("exit 3", "mount ended with status 3"),
            ("kill -9 $$", "mount ended with status -9"),
            ("exit 0", "it is not there; was .* moved meanwhile"),
            ("exec $REAL $*; ", None),
        ):
            with place.tools.replaced("mount", body):
                if problem is None:
                    await storage.mount(client, asked)
                    continue
                with refused(Code.INTERNAL) as caught:
                    await storage.mount(client, asked)
                caught.match(problem)
            assert not where.parent.exists()
        await storage.unmount(client, asked.mount)

    told(place.agent, story)


def test_a_mount_half_made_that_resists_is_shown_until_it_is_unmounted(place: Place) -> None:
    """The first call binds, the second makes it read only and fails; and umount does not help."""

    async def story(client: Client) -> None:
        base = await storage.mount(client, tmpfs(name("m")))
        asked = bind(name("b"), base.target, read_only=True)
        broken = 'case "$*" in *remount*) echo spoilt >&2; exit 1 ;; esac; exec $REAL "$@"'
        with place.tools.replaced("mount", broken), place.tools.replaced("umount", "echo jammed >&2; exit 1"):
            with refused(Code.INTERNAL) as caught:
                await storage.mount(client, asked)
            caught.match("spoilt")
            failed = (await storage.list_mounts(client))[-1]
            assert (failed.mount, failed.status) == (asked.mount, MountStatus.FAILED)
            assert "jammed" in failed.problem
            with refused(Code.FAILED_PRECONDITION) as caught:
                await storage.mount(client, asked)
            caught.match(r"has failed and could not be undone: .*jammed.*; unmount it first")
            with refused(Code.FAILED_PRECONDITION) as caught:
                await storage.trim(client, asked.mount)
            caught.match("is failed")
            with refused(Code.INTERNAL):
                await storage.unmount(client, asked.mount)
            assert (await storage.list_mounts(client))[-1].status is MountStatus.FAILED
        assert await storage.unmount(client, asked.mount) == (asked.mount,)
        await storage.unmount(client, base.mount)

    told(place.agent, story)


def test_an_unmount_that_fails_leaves_it_as_it_was(place: Place) -> None:
    async def story(client: Client) -> None:
        state = await storage.mount(client, tmpfs(name("m")))
        with place.tools.replaced("umount", "echo jammed >&2; exit 1"), refused(Code.INTERNAL) as caught:
            await storage.unmount(client, state.mount)
        caught.match("cannot unmount .*: jammed")
        assert await storage.list_mounts(client) == (state,)
        assert await storage.unmount(client, state.mount) == (state.mount,)

    told(place.agent, story)


def test_two_unmount_at_once(place: Place) -> None:
    """One of a mount, the other of what it lies on, with all that lies there: each mount goes once."""

    async def story(client: Client) -> None:
        base = await storage.mount(client, tmpfs(name("m")))
        upper = await storage.mount(client, tmpfs(name("m"), target=f"{base.target}/upper"))
        begun, fifo = place.directory / "begun", place.directory / "go"
        os.mkfifo(fifo)
        held = f'[ -e {begun} ] || {{ echo >{begun}; read x <{fifo}; }}; exec $REAL "$@"'
        with place.tools.replaced("umount", held):
            first = asyncio.create_task(storage.unmount(client, upper.mount))
            assert await asyncio.to_thread(eventually, begun.exists)
            again = asyncio.create_task(storage.unmount(client, upper.mount))
            both = asyncio.create_task(storage.unmount(client, base.mount, dependents=True))
            await client.ping()
            await asyncio.to_thread(fifo.write_text, "go\n")
            assert await first == (upper.mount,)
            assert await both == (base.mount,)
            with refused(Code.NOT_FOUND):
                await again

    told(place.agent, story)


# -- disks --------------------------------------------------------------------------------------------


def test_a_disk_that_holds_something_else_is_left_alone(place: Place) -> None:
    async def story(client: Client) -> None:
        foreign, xfs, empty = place.disk(b"precious"), place.disk(b"XFSB"), place.disk()
        for asked, problem in (
            (block(foreign, **FRESH), "holds something .*; this mounts ext4, xfs, erofs, squashfs"),
            (block(xfs, fstype=FsType.EXT4, **FRESH), "holds xfs, not ext4; what holds anything is not over"),
            (block(empty), "holds nothing but zeros; have it formatted with format: on_first_use"),
            (swap(foreign, **FRESH), "holds something .*, not swap space; what holds anything"),
            (swap(empty), "holds nothing but zeros; have it formatted"),
        ):
            with refused(Code.FAILED_PRECONDITION) as caught:
                await storage.mount(client, asked)
            caught.match(problem)
        with refused(Code.INTERNAL):  # its superblock is no more than a magic number
            await storage.mount(client, block(xfs))
        for node, beginning in ((foreign, b"precious"), (xfs, b"XFSB"), (empty, bytes(8))):
            assert head(node, len(beginning)) == beginning

    told(place.agent, story)


def test_what_mkfs_had_begun_is_wiped_off_again(place: Place) -> None:
    async def story(client: Client) -> None:
        node = place.disk()
        asked = block(node, **FRESH)
        half = f"printf half | $(command -v dd) of={node} bs=1 seek=5000 conv=notrunc 2>/dev/null; exit 1"
        with place.tools.replaced("mkfs.ext4", half), refused(Code.INTERNAL) as caught:
            await storage.mount(client, asked)
        caught.match("cannot format /dev/loop")
        assert head(node) == bytes(MIB)
        state = await storage.mount(client, asked)
        assert (state.fstype, state.formatted) == ("ext4", True)
        await storage.unmount(client, asked.mount)

    told(place.agent, story)


def test_two_mounts_of_one_empty_disk_format_it_once(place: Place) -> None:
    """The second comes while the first one's mkfs is at work, which fails, is repeated, and succeeds."""

    async def story(client: Client) -> None:
        node = place.disk()
        for body in ("exit 1", 'exec $REAL "$@"'):
            begun, fifo = place.directory / f"begun {len(body)}", place.directory / f"go {len(body)}"
            os.mkfifo(fifo)
            held = f'[ -e "{begun}" ] || {{ echo >"{begun}"; read x <"{fifo}"; {body}; }}; exec $REAL "$@"'
            with place.tools.replaced("mkfs.ext4", held):
                first = asyncio.create_task(storage.mount(client, block(node, **FRESH)))
                assert await asyncio.to_thread(eventually, begun.exists)
                second = asyncio.create_task(storage.mount(client, block(node, **FRESH)))
                third = asyncio.create_task(storage.mount(client, block(node)))
                await client.ping()
                await asyncio.to_thread(fifo.write_text, "go\n")
                if body == "exit 1":
                    with refused(Code.INTERNAL):
                        await first
                    states = [await second, await third]
                else:
                    states = [await first, await second, await third]
            assert [each.formatted for each in states].count(True) == 1
            Path(states[0].target, "file").write_text("precious")
            assert {Path(each.target, "file").read_text() for each in states} == {"precious"}
            for each in states:
                await storage.unmount(client, each.mount)
            assert head(node)[1080:1082] == b"\x53\xef"
            Path(node).write_bytes(bytes(MIB))

    told(place.agent, story)


def test_a_disk_that_cannot_be_wiped_is_nobody_else_s(place: Place) -> None:
    async def story(client: Client) -> None:
        node = place.disk()
        asked, other = block(node, **FRESH), block(node)
        no_wiping = 'case "$*" in *of=*) echo jammed >&2; exit 1 ;; esac; exec $REAL "$@"'
        with place.tools.replaced("mkfs.ext4", "exit 1"), place.tools.replaced("dd", no_wiping):
            with refused(Code.INTERNAL):
                await storage.mount(client, asked)
            with refused(Code.FAILED_PRECONDITION, field="device") as caught:
                await storage.mount(client, other)
            caught.match(f"{asked.mount} has half formatted {node}, .*jammed.*; unmount it first")
        await storage.unmount(client, asked.mount)

    told(place.agent, story)


def test_a_disk_that_cannot_be_read(place: Place) -> None:
    async def story(client: Client) -> None:
        with (
            place.tools.replaced("dd", "echo dd: medium error >&2; exit 1"),
            refused(Code.INTERNAL) as caught,
        ):
            await storage.mount(client, block(place.disk()))
        caught.match("cannot read /dev/loop.*medium error")

    told(place.agent, story)


def test_swapping_that_cannot_begin(place: Place) -> None:
    async def story(client: Client) -> None:
        node = place.disk()
        with place.tools.replaced("swapon", "echo no swap here >&2; exit 1"):
            with refused(Code.INTERNAL) as caught:
                await storage.mount(client, swap(node, **FRESH))
            caught.match(f"cannot swap to {node}: no swap here")
        with place.tools.replaced("swapon", "exit 0"):  # /proc/swaps shows nothing of it: none to end
            state = await storage.mount(client, swap(node))
            for refuse in (storage.trim, storage.freeze, storage.thaw):
                with refused(Code.FAILED_PRECONDITION) as caught:
                    await refuse(client, state.mount)
                caught.match("is swap space, not a file system")
            await storage.unmount(client, state.mount)

    told(place.agent, story)


def test_swapping_to_one_disk_under_two_names(place: Place) -> None:
    """The second is refused, and its undoing does not end the first."""

    async def story(client: Client) -> None:
        node = place.disk()
        link = Path(f"/dev/{name('link')}")
        link.symlink_to(node)
        try:
            first, second = swap(str(link), **FRESH), swap(node, **FRESH)
            await storage.mount(client, first)
            with refused(Code.FAILED_PRECONDITION, field="device") as caught:
                await storage.mount(client, second)
            caught.match(f"swaps to {node} already")
            assert node in Path("/proc/swaps").read_text()
            await storage.unmount(client, first.mount)
            assert node not in Path("/proc/swaps").read_text()
        finally:
            link.unlink()

    told(place.agent, story)


def test_an_agent_that_is_killed_as_it_swaps(place: Place) -> None:
    async def story(client: Client) -> None:
        node = place.disk()
        await storage.mount(client, formatted := swap(node, **FRESH))
        await storage.unmount(client, formatted.mount)
        done, fifo = place.directory / "done", place.directory / "go"
        os.mkfifo(fifo)
        held = f'$REAL "$@" || exit; [ -e {done} ] || {{ echo >{done}; read x <{fifo}; }}'
        with place.tools.replaced("swapon", held):
            asking = asyncio.ensure_future(storage.mount(client, swap(node)))
            assert await asyncio.to_thread(eventually, done.exists)
            os.kill(place.agent.agent_pid, signal.SIGKILL)
            await asyncio.to_thread(fifo.write_text, "go\n")
            state = await asking  # asked again, of the agent that has undone it
        assert node in Path("/proc/swaps").read_text()
        await storage.unmount(client, state.mount)
        assert node not in Path("/proc/swaps").read_text()

    told(place.agent, story)


def test_dm_verity_that_cannot_be_set_up(place: Place) -> None:
    """Every step of it: the superblock, the modules, dmsetup, the device it makes, and what that holds."""
    image = disks.erofs(place.directory / "erofs", file="x" * MIB).read_bytes()
    data = image.ljust(-(-len(image) // disks.BLOCK) * disks.BLOCK, b"\0")
    tree, root = disks.verity(data)

    async def story(client: Client) -> None:
        bare, whole = place.disk(data), place.disk(data + tree)
        for verity in (Verity(root), Verity(root, Device(path=bare), 4096)):
            with refused(Code.FAILED_PRECONDITION) as caught:
                await storage.mount(client, block(bare, verity=verity))
            caught.match("no dm-verity superblock; format it with veritysetup")
        with refused(Code.NOT_FOUND, field="verity.hash_device"):
            nowhere = Verity(root, Device(path="/dev/none"))
            await storage.mount(client, block(bare, verity=nowhere, wait_ms=10))
        asked = block(whole, verity=Verity(root, hash_offset=len(data)))
        with place.tools.replaced("modprobe", "exit 0"):
            for tool, body, code, problem in (
                ("modprobe", "echo not found >&2; exit 1", Code.INTERNAL, "set dm-verity up on .*not found"),
                ("dmsetup", "echo no target >&2; exit 1", Code.INTERNAL, "set dm-verity up on .*no target"),
                ("dmsetup", "exit 0", Code.INTERNAL, "dmsetup has made no device of it"),
            ):
                with place.tools.replaced(tool, body), refused(code) as caught:
                    await storage.mount(client, asked)
                caught.match(problem)
            with place.tools.without("dmsetup"), refused(Code.UNIMPLEMENTED) as caught:
                await storage.mount(client, asked)
            caught.match(r"no dmsetup \(package dmsetup\)")

    told(place.agent, story)


# -- freezing and trimming ----------------------------------------------------------------------------


def test_a_file_system_that_cannot_be_frozen_or_trimmed(place: Place) -> None:
    async def story(client: Client) -> None:
        state = await storage.mount(client, tmpfs(name("m")))
        for body, code, problem in (
            (None, Code.FAILED_PRECONDITION, "its device has no discard"),
            ("echo 'fstrim: oh dear' >&2; exit 1", Code.INTERNAL, "cannot trim .*oh dear"),
        ):
            with contextlib.ExitStack() as stack:
                if body is not None:
                    stack.enter_context(place.tools.replaced("fstrim", body))
                with refused(code) as caught:
                    await storage.trim(client, state.mount)
                caught.match(problem)
        for said, found in (("x: 7 bytes were trimmed", 7), ("x: 1 KiB (1024 bytes) trimmed", 1024), ("", 0)):
            with place.tools.replaced("fstrim", f"echo '{said}'"):
                assert await storage.trim(client, state.mount) == found
        with place.tools.replaced("fsfreeze", "echo fsfreeze: cannot >&2; exit 1"):
            with refused(Code.FAILED_PRECONDITION) as caught:
                await storage.freeze(client, state.mount)
            caught.match("fsfreeze: cannot; tmpfs may not be able to")
        with place.tools.without("fsfreeze"), refused(Code.UNIMPLEMENTED):
            await storage.freeze(client, state.mount)
        assert [each.frozen_ms for each in await storage.list_mounts(client)] == [0]
        await storage.unmount(client, state.mount)

    told(place.agent, story)


def test_thawing_that_fails_can_be_repeated_and_unmounting_thaws(place: Place) -> None:
    async def story(client: Client) -> None:
        state = await storage.mount(client, block(place.disk(), **FRESH))
        await storage.freeze(client, state.mount, seconds=60.0)
        with place.tools.replaced("fsfreeze", "echo stuck >&2; exit 1"), refused(Code.INTERNAL) as caught:
            await storage.thaw(client, state.mount)
        caught.match("cannot thaw .*: stuck")
        assert (await storage.list_mounts(client))[0].frozen_ms > 0
        await storage.thaw(client, state.mount)
        await storage.thaw(client, state.mount)
        assert (await storage.list_mounts(client))[0].frozen_ms == 0
        await storage.freeze(client, state.mount, seconds=60.0)
        assert await storage.unmount(client, state.mount) == (state.mount,)

    told(place.agent, story)


def unfrozen(target: str) -> bool:
    """Whether it was frozen until now."""
    return subprocess.run(["fsfreeze", "--unfreeze", target], timeout=20).returncode == 0


def touching(file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["touch", file])


def test_a_freeze_that_cannot_be_written_down_is_none(place: Place) -> None:
    async def story(client: Client) -> None:
        state = await storage.mount(client, block(place.disk(), **FRESH))
        with read_only(place.agent.state_dir / "storage"), refused(Code.INTERNAL):
            await storage.freeze(client, state.mount, seconds=60.0)
        assert (await storage.list_mounts(client))[0].frozen_ms == 0
        await storage.freeze(client, state.mount, seconds=60.0)
        assert unfrozen(state.target)
        await storage.unmount(client, state.mount)

    told(place.agent, story)


def test_thawing_in_time_that_cannot_be_carried_out_is_tried_again(place: Place) -> None:
    async def story(client: Client) -> None:
        state = await storage.mount(client, block(place.disk(), **FRESH))
        await storage.freeze(client, state.mount, seconds=0.2)
        tried = place.directory / "tried"
        with place.tools.replaced("fsfreeze", f"echo >{tried}; kill -9 $$"):
            assert await asyncio.to_thread(eventually, tried.exists)
        file = Path(state.target, "file")
        written = touching(file)  # in the kernel until it is thawed
        try:
            assert await asyncio.to_thread(eventually, lambda: written.poll() is not None)
        finally:
            if written.poll() is None:
                unfrozen(state.target)
            written.wait()
        assert file.exists()
        await storage.unmount(client, state.mount)

    told(place.agent, story)


# -- places -------------------------------------------------------------------------------------------


def test_paths_that_cannot_be_walked(place: Place) -> None:
    async def story(client: Client) -> None:
        long = "x" * 300
        with refused(Code.INTERNAL, field="target") as caught:
            await storage.mount(client, tmpfs(name("m"), target=f"/tmp/{long}"))
        caught.match("File name too long")
        layers = tuple(f"{place.directory}/{'l' * 200}{number}" for number in range(25))
        for layer in layers:
            os.mkdir(layer)
        with refused(Code.INVALID_ARGUMENT, field="lower") as caught:
            await storage.mount(client, MountStorage(name("o"), MountKind.OVERLAY, lower=layers))
        caught.match("take more than 4000 bytes")

    told(place.agent, story)


def test_a_tag_that_nobody_serves(place: Place) -> None:
    """What this machine's kernel has of virtiofs decides the code: none, or a list that it is not in."""

    async def story(client: Client) -> None:
        with pytest.raises(RpcError) as caught:
            await storage.mount(client, MountStorage(name("v"), MountKind.VIRTIOFS, tag="none", wait_ms=10))
        listed = Path("/sys/fs/virtiofs").is_dir()
        assert caught.value.code is (Code.NOT_FOUND if listed else Code.INTERNAL)

    told(place.agent, story)


def test_the_next_page_of_a_list_whose_last_mount_has_gone(place: Place) -> None:
    """Else it would be the first one again."""

    async def story(client: Client) -> None:
        states = [await storage.mount(client, tmpfs(name("m"))) for _ in range(3)]
        page: MountList = await client.call("storage.list", ListMounts(limit=2))
        assert (page.mounts, page.left_out) == (tuple(states[:2]), 1)
        page = await client.call("storage.list", ListMounts(states[1].mount))
        assert page == MountList((states[2],))
        await storage.unmount(client, states[1].mount)
        with refused(Code.NOT_FOUND):
            await client.call("storage.list", ListMounts(states[1].mount))
        await storage.unmount(client, states[0].mount)
        await storage.unmount(client, states[2].mount)

    told(place.agent, story)


# -- the state directory, and the agent's end ---------------------------------------------------------


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    def mount(*words: str) -> None:
        subprocess.run(words, check=True, timeout=20)

    mount("mount", "--bind", str(path), str(path))
    try:
        mount("mount", "-o", "remount,bind,ro", str(path))
        yield
    finally:
        mount("umount", str(path))


def test_what_cannot_be_written_down_is_not_done(place: Place) -> None:
    """A disk that is full or read only: no new mount, no new holder; and none lost."""

    async def story(client: Client) -> None:
        state = await storage.mount(client, tmpfs(name("m")))
        second = tmpfs(name("m"), target=state.target)
        await storage.mount(client, second)
        with read_only(place.agent.state_dir / "storage"):
            for asked in (tmpfs(name("m")), tmpfs(name("m"), target=state.target)):
                with refused(Code.INTERNAL) as caught:
                    await storage.mount(client, asked)
                caught.match("Read-only file system")
            with refused(Code.INTERNAL):
                await storage.unmount(client, second.mount)
        [there] = await storage.list_mounts(client)
        assert there.holders == (state.mount, second.mount)
        assert await storage.unmount(client, second.mount) == ()
        assert await storage.unmount(client, state.mount) == (state.mount,)

    told(place.agent, story)


def test_an_agent_that_is_killed_over_tools_that_fail_leaves_no_riddle(place: Place) -> None:
    """The unmount goes on, and fails: it is mounted, and can be unmounted again."""
    fifo, begun = place.directory / "go", place.directory / "begun"
    os.mkfifo(fifo)
    first = f"[ -e {begun} ] || {{ echo >{begun}; read x <{fifo}; }}"

    async def killed_over(request: Awaitable[object]) -> None:
        asking = asyncio.ensure_future(request)
        assert await asyncio.to_thread(eventually, begun.exists)
        os.kill(place.agent.agent_pid, signal.SIGKILL)
        await asyncio.to_thread(fifo.write_text, "go\n")
        with pytest.raises(RpcError) as caught:
            await asking
        caught.match("jammed")

    async def story(client: Client) -> None:
        base = await storage.mount(client, tmpfs(name("m")))
        with place.tools.replaced("umount", f"{first}; echo jammed >&2; exit 1"):
            await killed_over(storage.unmount(client, base.mount))
        assert await storage.list_mounts(client) == (base,)
        assert await storage.unmount(client, base.mount) == (base.mount,)

    told(place.agent, story)


def test_an_agent_that_is_killed_behind_an_unmount_leaves_others_mounts_alone(place: Place) -> None:
    """The kernel gives the number of the mount that is gone to the next one, which is somebody else's."""
    fifo, begun, others = place.directory / "go", place.directory / "begun", place.directory / "others"
    os.mkfifo(fifo)
    others.mkdir()

    def taken(number: int) -> bool:
        """Mounts something else, and whether that has this number now."""
        point = others / str(next(_numbers))
        point.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "other", point], check=True, timeout=60)
        return mountinfo.at(str(point), mountinfo.read())[-1].ident == number

    async def story(client: Client) -> None:
        base = await storage.mount(client, tmpfs(name("m")))
        number = mountinfo.at(base.target, mountinfo.read())[-1].ident
        with place.tools.replaced("umount", f'"$REAL" "$@"; echo >{begun}; read x <{fifo}'):
            asking = asyncio.ensure_future(storage.unmount(client, base.mount))
            assert await asyncio.to_thread(eventually, begun.exists)
            assert await asyncio.to_thread(eventually, lambda: taken(number))
            os.kill(place.agent.agent_pid, signal.SIGKILL)
            await asyncio.to_thread(fifo.write_text, "go\n")
            assert await asking == (base.mount,)
        assert [mount.point for mount in mountinfo.read() if mount.ident == number] != []

    try:
        told(place.agent, story)
    finally:
        for point in others.iterdir():
            subprocess.run(["umount", point], check=True, timeout=60)


def test_a_mount_that_resists_does_not_hold_up_the_end(toolbox: Toolbox) -> None:
    agent = toolbox.agent()
    try:
        target = Target(agent.address, "", box="", pace=2.0, execs=1)

        async def story() -> None:
            async with await connect(target) as client:
                await storage.mount(client, tmpfs(name("m")))
                await storage.mount(client, tmpfs(name("m")))

        asyncio.run(story())
        with toolbox.replaced("umount", "echo jammed >&2; exit 1"):
            assert agent.stop() == 0
        assert agent.log_tail().count("a mount resists") == 2
        assert eventually(lambda: "jammed" in agent.log_tail())
    finally:
        agent.destroy()


def test_a_place_whose_name_has_a_carriage_return(place: Place) -> None:
    """The kernel shows it as it is in its tables of mounts, where it ends no line."""

    async def story(client: Client) -> None:
        target = place.directory / "a\rb\x0bc\u2028d\x85e"
        state = await storage.mount(client, tmpfs(name("m"), target=str(target)))
        other = await storage.mount(client, tmpfs(name("m")))
        os.kill(place.agent.agent_pid, signal.SIGKILL)
        assert await storage.list_mounts(client) == (state, other)
        for each in (other, state):
            await storage.unmount(client, each.mount)
        assert not target.exists()

    told(place.agent, story)
