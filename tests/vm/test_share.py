"""Directories of this host in the guest, by virtiofsd: plugged in while it runs, and given at its start."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host import storage
from gcsagent.host.client import Client
from gcsagent.host.vm.errors import ShareError
from gcsagent.host.vm.launcher import VirtualMachine
from gcsagent.host.vm.named import VmStore
from gcsagent.host.vm.share import Share
from gcsagent.host.vm.shareplug import PluggedShare
from protocol.errors import Code
from protocol.families.storage import MountKind, MountState, MountStatus, MountStorage
from tests.cases.agents import eventually
from tests.cases.machines import Booted
from tests.cases.target import MIB, Target, connect, refused, run, running
from tests.vm.test_storage import box

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
SECONDS, BOOT_SECONDS = 30.0, 240.0
WORK = "/run/gcs/shares/work"

Story = Callable[[VirtualMachine, Target, Client], Awaitable[None]]


def daemons(directory: Path) -> set[int]:
    """The processes that share it: a daemon is two, one of them in its own namespaces."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"--shared-dir" in words and str(directory).encode() in words:
                found.add(int(entry.name))
    return found


def within(vm: Booted, *directories: Path, story: Story) -> None:
    """Runs it; afterwards nothing is mounted, shared or served that was not before."""
    target = Target(vm.machine.address, ROOTFS, box="", pace=vm.pace, execs=1)

    async def told() -> None:
        async with await connect(target) as client, asyncio.timeout(SECONDS * vm.pace):
            await story(vm.machine, target, client)
            assert await storage.list_mounts(client) == ()
            assert vm.machine.shares() == []

    vm.runner.run(told())
    assert eventually(lambda: not any(map(daemons, directories)))


def shared(tag: str, ident: str | None = None, **more: Any) -> MountStorage:
    return MountStorage(ident or tag, MountKind.VIRTIOFS, tag=tag, **more)


def test_a_directory_is_the_same_on_both_sides(vm: Booted, tmp_path: Path) -> None:
    """Read and written from either, and no way out of it; the guest hears of it when it comes."""
    work, secret = tmp_path / "work", tmp_path / "secret"
    work.mkdir()
    secret.write_text("not shared")
    (work / "hello").write_text("from the host\n")
    (work / "absolute").symlink_to(secret)
    (work / "up").symlink_to("../secret")
    (work / "deep").mkdir()
    content = hashlib.sha256(b"seed").digest() * (8 * MIB // 32)

    async def story(machine: VirtualMachine, target: Target, client: Client) -> None:
        mounting = asyncio.create_task(storage.mount(client, shared("work")))
        await client.ping()
        assert (await storage.list_mounts(client))[0].status is MountStatus.MOUNTING
        await machine.plug_share(Share(work, "work"))
        state = await mounting
        assert (state.fstype, state.source, state.read_only) == ("virtiofs", "work", False)
        assert machine.shares() == [PluggedShare("work", str(work), False, True)]
        assert len(daemons(work)) == 2
        async with box(target, client, both=state) as script:
            assert await script("cat /both/hello") == "from the host\n"
            (work / "content").write_bytes(content)
            said = await script("sha256sum </both/content", "echo from the guest >/both/deep/answer")
            assert said.split()[0] == hashlib.sha256(content).hexdigest()
            assert (work / "deep/answer").read_text() == "from the guest\n"
            await script(
                "cp /both/content /both/copy; mv /both/deep /both/moved; rm /both/hello; id >/both/id"
            )
            assert (work / "copy").read_bytes() == content
            assert sorted(path.name for path in work.iterdir()) == [
                "absolute", "content", "copy", "id", "moved", "up"
            ]  # fmt: skip
            tried = await script("cat /both/absolute /both/up /both/../secret 2>&1 || true")
            assert tried.count("No such file") == 3
        for path in ("absolute", "up"):
            with refused(Code.PERMISSION_DENIED, field="path"):
                await storage.mount(
                    client, MountStorage("out", MountKind.BIND, path=f"{state.target}/{path}")
                )
            with refused(Code.PERMISSION_DENIED, field="target"):
                inside = f"{state.target}/{path}/x"
                await storage.mount(client, MountStorage("out", MountKind.TMPFS, target=inside))
        assert await storage.unmount(client, "work") == ("work",)
        await machine.unplug_share("work")
        with refused(Code.NOT_FOUND, field="tag"):
            await storage.mount(client, shared("work", wait_ms=100))

    within(vm, work, story=story)


def test_a_containers_root_is_a_directory_of_the_host_that_nobody_writes_to(
    vm: Booted, rootfs_image: Path, tmp_path: Path
) -> None:
    """The daemon keeps the guest from writing, whatever the guest does; layers lie over it."""
    root = rootfs_image.parent / "rootfs"

    async def story(machine: VirtualMachine, target: Target, client: Client) -> None:
        await machine.plug_share(Share(root, "root", read_only=True))
        state = await storage.mount(client, shared("root"))
        assert state.read_only is False  # nothing but the daemon is in the way of writing

        def at_share(spec: dict[str, Any]) -> None:
            spec["root"]["path"] = state.target

        async with running(target, client, spec=at_share) as inside:
            done = await run(client, inside.container, "sh", "-c", "cat /etc/hostname; echo x >/new; ls /new")
            assert done.stdout == b"demo\n/new\n", done
            with refused(Code.FAILED_PRECONDITION) as caught:
                await storage.unmount(client, "root")
            assert caught.value.details["containers"] == [inside.container]
        async with box(target, client, base=state) as script:
            tried = await script("touch /base/new /base/etc/hostname 2>&1 || true; rm /base/bin 2>&1 || true")
            assert tried.count("Read-only file system") + tried.count("not permitted") == 3, tried
        sealed = await storage.mount(client, shared("root", "sealed", read_only=True))
        layers = MountStorage("layers", MountKind.OVERLAY, lower=(sealed.target,))
        layered = await storage.mount(client, layers)
        assert (sealed.read_only, layered.fstype) == (True, "overlay")
        assert await storage.unmount(client, "sealed", dependents=True) == ("layers", "sealed")
        await storage.unmount(client, "root")
        await machine.unplug_share("root")

    within(vm, root, story=story)
    assert not (root / "new").exists()


def test_a_share_that_is_taken_away_while_it_is_used_gives_errors(vm: Booted, tmp_path: Path) -> None:
    async def story(machine: VirtualMachine, target: Target, client: Client) -> None:
        with pytest.raises(ShareError, match="not a directory"):
            await machine.plug_share(Share(tmp_path / "none", "gone"))
        await machine.plug_share(Share(tmp_path, "gone"))
        state: MountState = await storage.mount(client, shared("gone"))
        async with box(target, client, gone=state) as script:
            await script("echo x >/gone/file")
            await machine.unplug_share("gone")
            tried = await script("cat /gone/file 2>&1 || true", "ls /gone 2>&1 || true")
            assert "not connected" in tried, tried
        await storage.unmount(client, "gone")

    within(vm, tmp_path, story=story)
    assert (tmp_path / "file").read_text() == "x\n"


OWNER = """
import asyncio, os, sys
from pathlib import Path
from gcsagent.host.vm.share import ServedShare, Share

async def own():
    served = ServedShare.start(Share(Path(sys.argv[1]), "x"), Path(sys.argv[2]))
    print(*os.listdir(sys.argv[2]), flush=True)
    await served.ended()

asyncio.run(own())
"""


def test_a_daemon_goes_with_whoever_started_it(tmp_path: Path) -> None:
    shared, sockets = tmp_path / "shared", tmp_path / "sockets"
    shared.mkdir()
    sockets.mkdir()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, shared, sockets],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.PIPE,
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"\n"  # no socket has a path
        assert eventually(lambda: len(daemons(shared)) == 2)
    finally:
        owner.kill()
        owner.communicate(timeout=SECONDS)
    assert eventually(lambda: not daemons(shared))
    assert list(sockets.iterdir()) == []


async def gcsctl(*words: str) -> str:
    """What it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gcsagent.host", *words),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), BOOT_SECONDS)
    if process.returncode != 0:
        raise RuntimeError(err.decode())
    return out.decode()


def test_gcsctl_starts_a_vm_with_all_that_it_shall_have(
    built_image: Path, rootfs_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares, a disk, a forward, a kernel; one more share while it runs; then the power button."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    site, work, late, disk = (tmp_path / name for name in ("site", "work", "late", "disk"))
    for directory in (site, work, late):
        directory.mkdir()
    (site / "page").write_text("hello\n")
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    serve = (
        "import http.server, signal, sys\n"
        f"signal.signal(15, lambda *_: (open('{WORK}/tidy', 'w').write('tidy'), sys.exit()))\n"
        "http.server.test(lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory='/srv'), port=80)\n"
    )

    async def story() -> None:
        options = ("--guest-image", str(built_image), "--kernel", str(built_image / "vmlinuz"))
        given = ("--share", f"{site}:ro", "--share", str(work), "--disk", f"{disk}:data")
        where = ("--rootfs", str(rootfs_image), "--forward", "0:web:80")
        shown = json.loads(await gcsctl("--json", "vm", "start", "dev", *options, *given, *where))
        vm = ("--vm", "dev")
        mount = json.loads(
            await gcsctl("--json", *vm, "storage", "mount", "db", "--serial", "data", "--format")
        )
        assert (mount["fstype"], mount["formatted"]) == ("ext4", True)
        volumes = (
            "-v",
            "/run/gcs/shares/site:/srv:ro",
            "-v",
            f"{WORK}:{WORK}",
            "-v",
            "/run/gcs/shares:/shares",
        )
        run = (*vm, "run", "-d", "--id", "web", "--overlay", "--rootfs", ROOTFS, *volumes)
        await gcsctl(*run, "--", "python3", "-c", serve)
        [forward] = shown["forwards"]
        address, _, target = forward.partition(" -> ")
        assert target == "web:80"
        assert await page(address) == "hello\n"
        (site / "page").unlink()
        (site / "page").write_text("changed on the host\n")
        assert await page(address, "changed") == "changed on the host\n"
        denied = await gcsctl(*vm, "exec", "web", "--", "sh", "-c", "touch /shares/site/x 2>&1 || true")
        assert "Read-only file system" in denied
        assert await gcsctl("vm", "share", "add", "dev", str(late)) == "/run/gcs/shares/late\n"
        listed = json.loads(await gcsctl("--json", "vm", "share", "ls", "dev"))
        assert [(each["tag"], each["read_only"], each["removable"]) for each in listed] == [
            ("late", False, True),
            ("site", True, False),
            ("work", False, False),
        ]
        reader = ("--rm", "--overlay", "--rootfs", ROOTFS, "-v", "/run/gcs/shares/late:/late")
        await gcsctl(*vm, "run", *reader, "--", "sh", "-c", "echo late >/late/file")
        assert (late / "file").read_text() == "late\n"
        await gcsctl(*vm, "run", "-d", "--id", "user", *reader[1:], "--", "sleep", "1000")
        with pytest.raises(RuntimeError, match="container user uses it"):
            await gcsctl("vm", "share", "rm", "dev", "late")
        await gcsctl(*vm, "delete", "--force", "user")
        await gcsctl("vm", "share", "rm", "dev", "late")
        assert not daemons(late)
        with pytest.raises(RuntimeError, match="since the boot"):
            await gcsctl("vm", "share", "rm", "dev", "site")
        await gcsctl("vm", "stop", "dev", "--timeout", "100")

    try:
        asyncio.run(story())
    finally:
        for vm in VmStore().list():
            asyncio.run(VmStore().stop(vm.name, 1.0))
    assert (work / "tidy").read_text() == "tidy"
    assert VmStore().list() == []
    assert eventually(lambda: not any(map(daemons, (site, work, late))))


async def page(address: str, wanted: str = "") -> str:
    """What is served there, once that is so; the guest may not look at a file anew for a second."""
    host, _, port = address.rpartition(":")

    async def get() -> str:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /page HTTP/1.0\r\n\r\n")
        answer = (await reader.read()).decode()
        writer.close()
        return answer.partition("\r\n\r\n")[2]

    async with asyncio.timeout(SECONDS):
        while True:
            try:
                if wanted in (found := await get()) and found:
                    return found
            except ConnectionError:
                pass  # it does not listen yet
