"""What others do to our mounts: mount on them, sit in them, unmount them, write to an overlay."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

from gcsagent.host import storage
from gcsagent.host.client import Client
from protocol.errors import Code
from protocol.families.storage import MountKind, MountStorage
from tests.cases.agents import RunningAgent
from tests.cases.storage import tmpfs, unmounted
from tests.cases.target import Target, connect, name, refused


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, timeout=10)


def umount(path: str) -> None:
    subprocess.run(["umount", path], check=True, timeout=10)


def sitting(path: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "100"], cwd=path)


def told(agent: RunningAgent, rootfs: str, story: object) -> None:
    target = Target(agent.address, rootfs, box="", pace=2.0, execs=1)

    async def tell() -> None:
        async with await connect(target) as client, unmounted(client), asyncio.timeout(30):
            await story(client)  # type: ignore[operator]

    asyncio.run(tell())


def test_a_mount_of_somebody_else_is_in_the_way(agent: RunningAgent, rootfs: str) -> None:
    async def story(client: Client) -> None:
        ours = await storage.mount(client, tmpfs(name("m")))
        for where in (Path(ours.target, "inside"), Path(ours.target)):
            where.mkdir(exist_ok=True)
            mount("-t", "tmpfs", "foreign", str(where))
            try:
                with refused(Code.FAILED_PRECONDITION) as caught:
                    await storage.unmount(client, ours.mount)
                assert caught.value.details["paths"] == [str(where)]
            finally:
                umount(str(where))
        assert await storage.unmount(client, ours.mount) == (ours.mount,)

    told(agent, rootfs, story)


def test_a_process_that_sits_in_it_is_in_the_way(agent: RunningAgent, rootfs: str) -> None:
    async def story(client: Client) -> None:
        ours = await storage.mount(client, tmpfs(name("m")))
        with sitting(ours.target) as sitter:
            try:
                with refused(Code.FAILED_PRECONDITION) as caught:
                    await storage.unmount(client, ours.mount)
                assert "files open" in caught.value.message
                assert await storage.list_mounts(client) == (ours,)
            finally:
                sitter.kill()
        assert await storage.unmount(client, ours.mount) == (ours.mount,)

    told(agent, rootfs, story)


def test_what_was_unmounted_by_hand_is_forgotten(agent: RunningAgent, rootfs: str) -> None:
    async def story(client: Client) -> None:
        ours = await storage.mount(client, tmpfs(name("m")))
        umount(ours.target)
        assert await storage.unmount(client, ours.mount) == (ours.mount,)
        assert not Path(ours.target).exists()

    told(agent, rootfs, story)


def test_what_is_written_to_an_overlay_is_in_its_upper_directory(agent: RunningAgent, rootfs: str) -> None:
    async def story(client: Client) -> None:
        base = await storage.mount(client, tmpfs(name("m")))
        low, high = await storage.mount(client, tmpfs(name("l"))), f"{base.target}/new/upper"
        Path(low.target, "file").write_text("low")
        wanted = MountStorage(
            name("o"), MountKind.OVERLAY, lower=(low.target,), upper=high, work=f"{base.target}/new/work"
        )
        over = await storage.mount(client, wanted)
        Path(over.target, "file").write_text("high")
        with refused(Code.FAILED_PRECONDITION) as caught:
            await storage.unmount(client, base.mount)
        assert caught.value.details["mounts"] == [over.mount]
        await storage.unmount(client, over.mount)
        assert (Path(high, "file").read_text(), Path(low.target, "file").read_text()) == ("high", "low")
        bad = MountStorage(
            name("o"),
            MountKind.OVERLAY,
            lower=(low.target,),
            upper=f"{low.target}/u",
            work=f"{base.target}/w",
        )
        with refused(Code.INTERNAL):  # the kernel wants both on one file system
            await storage.mount(client, bad)
        assert not Path(base.target, "w").exists()
        assert not Path(low.target, "u").exists()

    told(agent, rootfs, story)
