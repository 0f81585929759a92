"""Mounts that need no disk: who holds them, what is built on them, and where they may be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from gcsagent.host import storage
from gcsagent.host.client import Client
from protocol.errors import Code, RpcError
from protocol.families.storage import Device, Format, MountKind, MountState, MountStatus, MountStorage
from tests.cases.target import MIB, Target, case, connect, name, raw_call, refused, run, running


@contextlib.asynccontextmanager
async def unmounted(client: Client) -> AsyncIterator[None]:
    """Afterwards, whatever the block does, nothing is mounted."""
    try:
        yield
    finally:
        for state in reversed(await storage.list_mounts(client)):
            for holder in state.holders:
                with contextlib.suppress(RpcError):
                    await storage.unmount(client, holder, dependents=True)
        assert await storage.list_mounts(client) == ()


def tmpfs(ident: str, **more: object) -> MountStorage:
    return MountStorage(ident, MountKind.TMPFS, size_bytes=MIB, **more)  # type: ignore[arg-type]


def bind(ident: str, path: str, **more: object) -> MountStorage:
    return MountStorage(ident, MountKind.BIND, path=path, **more)  # type: ignore[arg-type]


async def written(target: Target, client: Client, where: MountState, *script: str) -> bytes:
    """What a shell in a container prints that has the mount as its /here."""
    mount = {"destination": "/here", "source": where.target, "type": "bind", "options": ["bind"]}
    async with running(target, client, spec=lambda spec: spec["mounts"].append(mount)) as box:
        done = await run(client, box.container, "sh", "-c", "; ".join(("cd /here", *script)))
        return done.stdout + done.stderr


@case
async def layers_become_a_containers_root(target: Target) -> None:
    """Two layers over the demo root, the second hiding a file of the first; each file where it should be."""
    async with await connect(target) as client, unmounted(client):
        low = await storage.mount(client, tmpfs(name("low")))
        high = await storage.mount(client, tmpfs(name("high")))
        await written(target, client, low, "echo low > both", "echo low > only-low")
        await written(target, client, high, "echo high > both")
        lower = (high.target, low.target, target.rootfs)
        root = await storage.mount(client, MountStorage(name("root"), MountKind.OVERLAY, lower=lower))
        assert (root.fstype, root.read_only) == ("overlay", True)

        def at_layers(spec: dict[str, dict[str, str]]) -> None:
            spec["root"]["path"] = root.target

        async with running(target, client, spec=at_layers) as box:
            done = await run(
                client, box.container, "sh", "-c", "cat /both /only-low; echo new > /both; cat /both"
            )
            assert done.stdout == b"high\nlow\nnew\n", done
            for mount in (root.mount, low.mount):
                with refused(Code.FAILED_PRECONDITION) as caught:
                    await storage.unmount(client, mount)
                assert caught.value.details.get("containers") in ([box.container], None)
                assert caught.value.details.get("mounts") in ([root.mount], None)
            with refused(Code.FAILED_PRECONDITION) as caught:
                await storage.unmount(client, low.mount, dependents=True)
            assert caught.value.details["containers"] == [box.container]
        assert await storage.unmount(client, low.mount, dependents=True) == (root.mount, low.mount)
        assert [each.mount for each in await storage.list_mounts(client)] == [high.mount]
        one = await storage.mount(client, MountStorage(name("one"), MountKind.OVERLAY, lower=(high.target,)))
        assert b"Read-only" in await written(target, client, one, "cat both", "echo x > both")


@case
async def a_mount_has_holders_and_an_order(target: Target) -> None:
    """The same again is the same; the last holder unmounts; what is nested goes first."""
    async with await connect(target) as client, unmounted(client):
        first, second = name("m"), name("m")
        base = await storage.mount(client, tmpfs(first))
        assert await storage.mount(client, tmpfs(first)) == base
        assert (base.source, base.fstype, base.status) == ("tmpfs", "tmpfs", MountStatus.MOUNTED)
        also = await storage.mount(client, tmpfs(second, target=base.target))
        assert (also.mount, also.holders, also.target) == (second, (first, second), base.target)
        for other in (tmpfs(first, read_only=True), tmpfs(name("m"), target=base.target, read_only=True)):
            with refused(Code.ALREADY_EXISTS):
                await storage.mount(client, other)
        nested = await storage.mount(client, tmpfs(name("n"), target=f"{base.target}/a/b"))
        sealed = await storage.mount(client, bind(name("b"), f"{base.target}/a", read_only=True))
        assert sealed.read_only
        listed = [each.mount for each in await storage.list_mounts(client)]
        assert listed == [first, nested.mount, sealed.mount]
        assert await storage.unmount(client, first) == ()
        with refused(Code.NOT_FOUND):
            await storage.unmount(client, first)
        with refused(Code.FAILED_PRECONDITION):
            await storage.unmount(client, second)
        gone = await storage.unmount(client, second, dependents=True)
        assert gone == (sealed.mount, nested.mount, second)
        over = tmpfs(name("o"), target=base.target.rpartition("/")[0] + "/x/y")
        await storage.mount(client, over)
        with refused(Code.FAILED_PRECONDITION, field="target"):
            await storage.mount(client, tmpfs(name("o"), target=(over.target or "").removesuffix("/y")))


@case
async def a_mount_does_not_escape(target: Target) -> None:
    """Symlinks on the way, dots, and places that are the agent's are refused, and nothing is left of it."""
    async with await connect(target) as client, unmounted(client):
        home = await storage.mount(client, tmpfs(name("home")))
        await written(target, client, home, "mkdir real", "ln -s /etc out", "ln -s real in", "echo x > file")
        for where in ("out/x", "in", "in/deep"):
            with refused(Code.PERMISSION_DENIED, field="target"):
                await storage.mount(client, tmpfs(name("e"), target=f"{home.target}/{where}"))
            with refused(Code.PERMISSION_DENIED, field="path"):
                await storage.mount(client, bind(name("e"), f"{home.target}/{where}"))
        with refused(Code.INVALID_ARGUMENT, field="target"):
            await storage.mount(client, tmpfs(name("e"), target=f"{home.target}/file/x"))
        with refused(Code.NOT_FOUND, field="path"):
            await storage.mount(client, bind(name("e"), f"{home.target}/nothing"))
        for place in ("/proc", "/proc/1", "/dev/shm", "/sys/fs", (await client.info()).state_dir, "/run"):
            if place != "/run" or (await client.info()).state_dir.startswith("/run/"):
                with refused(Code.INVALID_ARGUMENT, field="target"):
                    await storage.mount(client, tmpfs(name("e"), target=place))
        for dots in ("/a/../etc", "/a/./b", "/a//b", "/a/", "a", "/"):
            with refused(Code.INVALID_ARGUMENT, field="target"):
                await raw_call(target, "storage.mount", {"mount": "e", "kind": "tmpfs", "target": dots})
        with refused(Code.INVALID_ARGUMENT, field="device"):
            await storage.mount(client, tmpfs(name("e"), device=Device(serial="x")))
        with refused(Code.INVALID_ARGUMENT, field="options"):
            await storage.mount(client, tmpfs(name("e"), options=("remount",)))
        missing = MountStorage(name("e"), MountKind.BLOCK, device=Device(serial="none"), wait_ms=50)
        with refused(Code.NOT_FOUND, field="device"):
            await storage.mount(client, missing)
        swap = MountStorage(
            name("e"), MountKind.SWAP, device=Device(path="/dev/null"), format=Format.ON_FIRST_USE
        )
        with refused(Code.FAILED_PRECONDITION):
            await storage.mount(client, swap)
        assert await written(target, client, home, "ls -A real") == b""
        bound = await storage.mount(
            client, bind(name("f"), f"{home.target}/file", target=f"{home.target}/real/f")
        )
        assert await written(target, client, home, "cat real/f; ls real") == b"f\n"
        assert await storage.unmount(client, bound.mount) == (bound.mount,)
        assert await written(target, client, home, "ls -A real") == b""


@case
async def a_mount_that_is_given_up_leaves_nothing(target: Target) -> None:
    """A deadline and a cancel while a disk is waited for; who asked for the same meanwhile tries it anew."""
    async with await connect(target) as client, unmounted(client):
        never = MountStorage(name("d"), MountKind.BLOCK, device=Device(serial="never"), wait_ms=600_000)
        with refused(Code.DEADLINE_EXCEEDED):
            await storage.mount(client, never, deadline=0.2)
        waiting = asyncio.create_task(storage.mount(client, never))
        async with asyncio.timeout(10 * target.pace):  # the first one is being undone
            while [each.status for each in await storage.list_mounts(client)] != [MountStatus.MOUNTING]:
                await client.ping()
        second = asyncio.create_task(storage.mount(client, never, deadline=2.0))
        await client.ping()
        waiting.cancel()
        with refused(Code.DEADLINE_EXCEEDED):
            await second
        assert await storage.list_mounts(client) == ()
