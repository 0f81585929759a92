"""gcsctl's commands about a VM that runs, on a named one: what they do, and the fields of their --json."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.vm.found import FoundVm
from gcsagent.host.vm.named import VmStore
from tests.cases.agents import REPO
from tests.runc.test_gcsctl_json import kept

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
SECONDS = 240.0
MIB = 1 << 20


class Named:
    """A VM called `dev`, in a state directory of its own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._env = {**os.environ, "XDG_STATE_HOME": str(state)}

    def __call__(self, *words: str) -> str:
        """What gcsctl prints; it must end well."""
        argv = [sys.executable, "-m", "gcsagent.host", *words]
        done = subprocess.run(
            argv, cwd=REPO, env=self._env, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, command: str, *words: str) -> Any:
        """The document of a command, with the fields that JSON.md promises."""
        printed = self(*command.split(), *words, "--json")
        assert kept(command, printed, "") == []
        return json.loads(printed)


@pytest.fixture(scope="module")
def dev(built_image: Path, rootfs_image: Path) -> Iterator[Named]:
    with tempfile.TemporaryDirectory(prefix="gcs-") as state:
        named = Named(Path(state))
        options = ("--guest-image", str(built_image), "--rootfs", str(rootfs_image), "--max-memory", "1024")
        started = named.json("vm start", "dev", "--memory", "512", *options)
        try:
            assert [each["name"] for each in named.json("vm ls")] == ["dev"]
            yield named
        finally:
            named.json("vm stop", "dev")
        assert json.loads(named("vm", "ls", "--json")) == []
        assert not Path(f"/proc/{started['qemu_pid']}").exists()


def test_its_hardware(dev: Named, tmp_path: Path) -> None:
    (tmp_path / "data.img").write_bytes(b"")
    os.truncate(tmp_path / "data.img", 64 * MIB)
    assert dev.json("vm disk add", "dev", str(tmp_path / "data.img"))["serial"] == "data"
    disks = {each["serial"]: each for each in dev.json("vm disk ls", "dev")}
    assert (disks["data"]["removable"], disks["rootfs"]["removable"]) == (True, False)
    mounted = json.loads(
        dev("--vm", "dev", "storage", "mount", "db", "--serial", "data", "--format", "--json")
    )
    assert (mounted["fstype"], mounted["formatted"]) == ("ext4", True)
    dev("--vm", "dev", "storage", "unmount", "db")
    assert dev.json("vm disk rm", "dev", "data") == {"serial": "data"}

    mac = dev.json("vm net add", "dev")["mac"]
    assert [each["mac"] for each in dev.json("vm net ls", "dev")] == [mac]
    assert dev.json("vm net rm", "dev", mac) == {"mac": mac}

    (tmp_path / "index.html").write_text("the host says hello\n")
    shared = dev.json("vm share add", "dev", f"{tmp_path}:www:ro")
    assert [each["tag"] for each in dev.json("vm share ls", "dev")] == ["www"]
    root = ("--overlay", "--rootfs", "/run/gcs/disks/rootfs", "-v", f"{shared['target']}:/srv:ro")
    read = dev("--vm", "dev", "run", "--rm", *root, "--", "cat", "/srv/index.html")
    assert read == "the host says hello\n"
    assert dev.json("vm share rm", "dev", "www") == {"tag": "www"}

    before = json.loads(dev("--vm", "dev", "resources", "--json"))["memory"]["total_kib"]
    grown = dev.json("vm grow", "dev", "--memory", "256")
    assert grown["memory"]["total_kib"] > before + 200 * 1024


def test_a_program_gives_it_disks_side_by_side(dev: Named, tmp_path: Path) -> None:
    async def body() -> None:
        vm = FoundVm.named("dev", VmStore(dev.state / "gcsctl" / "vms"))
        serials = ["one", "two", "three"]
        for serial in serials:
            (tmp_path / serial).write_bytes(bytes(MIB))
        await asyncio.gather(*(vm.plug_disk(tmp_path / serial, serial) for serial in serials))
        assert {disk.serial for disk in await vm.disks()} >= set(serials)
        await asyncio.gather(*(vm.unplug_disk(serial) for serial in serials))
        assert not {disk.serial for disk in await vm.disks()} & set(serials)

    asyncio.run(body())


def test_its_vsock_device_is_plugged_in_again(dev: Named) -> None:
    root = ("--overlay", "--rootfs", "/run/gcs/disks/rootfs")
    dev("--vm", "dev", "run", "-d", "--id", "web", *root, "--", "sleep", "1000")
    before = dev.json("vm ls")[0]
    again = dev.json("vm replug", "dev")
    after = dev.json("vm ls")[0]
    assert (again["address"], after["address"]) == (before["address"],) * 2
    assert again["daemon_pid"] == after["daemon_pid"]
    if before["daemon_pid"] is not None:
        assert again["daemon_pid"] != before["daemon_pid"]
        assert not Path(f"/proc/{before['daemon_pid']}").exists()
    assert "running" in dev("--vm", "dev", "ps")
    assert dev("vm", "replug", "dev") == "dev: plugged in again, and its agent answers\n"
    assert json.loads(dev("--vm", "dev", "ping", "--json"))["generation"] == 1
    dev("--vm", "dev", "delete", "--force", "web")
