"""gcsctl storage and vm disk, against a scripted agent and a scripted monitor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.dataclass import replace
from protocol.errors import Code, RpcError
from protocol.families.storage import (
    Device,
    Format,
    FreezeStorage,
    FsType,
    ListMounts,
    MountKind,
    MountList,
    MountRef,
    MountState,
    MountStatus,
    MountStorage,
    Trimmed,
    Unmounted,
    UnmountStorage,
    Verity,
)
from protocol.method import Empty
from tests.fakes.fake_agent import FakeAgent
from tests.gcsctl_process import gcsctl, refusing, with_agent

STATE = MountState(
    "data",
    MountKind.BLOCK,
    MountStatus.MOUNTED,
    target="/run/gcs/mounts/data",
    source="/dev/vdb",
    fstype="ext4",
    holders=("data", "more"),
    frozen_ms=5000,
)

HASH = "ab" * 32


@pytest.mark.parametrize(
    "words, wanted",
    [
        (
            "--serial s --format --type xfs -o noatime -o discard --wait 0.5",
            MountStorage(
                "m",
                MountKind.BLOCK,
                device=Device(serial="s"),
                fstype=FsType.XFS,
                format=Format.ON_FIRST_USE,
                options=("noatime", "discard"),
                wait_ms=500,
            ),
        ),
        (
            f"--pci 02.1/00.0 --root-hash {HASH} --hash-serial h --hash-offset 4K --target /t",
            MountStorage(
                "m",
                MountKind.BLOCK,
                target="/t",
                device=Device(pci="02.1/00.0"),
                verity=Verity(HASH, Device(serial="h"), 4096),
            ),
        ),
        ("--device /dev/vdb --swap", MountStorage("m", MountKind.SWAP, device=Device(path="/dev/vdb"))),
        ("--virtiofs t --read-only", MountStorage("m", MountKind.VIRTIOFS, tag="t", read_only=True)),
        ("--tmpfs 64M", MountStorage("m", MountKind.TMPFS, size_bytes=64 << 20)),
        ("--bind /a", MountStorage("m", MountKind.BIND, path="/a")),
        (
            "--overlay /b:/a --upper /u",
            MountStorage("m", MountKind.OVERLAY, lower=("/b", "/a"), upper="/u", work="/u.work"),
        ),
    ],
)
def test_mount_asks_for_what_was_said(tmp_path: Path, words: str, wanted: MountStorage) -> None:
    asked: list[MountStorage] = []

    def mount(params: MountStorage) -> MountState:
        asked.append(params)
        return STATE

    async def body(agent: FakeAgent) -> None:
        agent.handlers["storage.mount"] = mount
        shown = await gcsctl(agent, "storage", "mount", *words.split(), "m")
        assert (shown.code, shown.out, shown.err) == (0, "/run/gcs/mounts/data\n", "")
        assert asked == [wanted]
        found = json.loads((await gcsctl(agent, "--json", "storage", "mount", *words.split(), "m")).out)
        assert (found["status"], found["source"]) == ("mounted", "/dev/vdb")

    with_agent(tmp_path, body)


@pytest.mark.parametrize(
    "words, problem",
    [
        ("m", "one of the arguments"),
        ("--serial s --tmpfs 1M m", "not allowed with"),
        ("--bind a m", "absolute path"),
        ("--bind /a/../b m", "without '.', '..'"),
        ("--tmpfs 1M --swap m", "--swap needs a disk"),
        ("--serial s --type vfat m", "invalid"),
        ("--serial s --root-hash xyz m", "hex digits"),
        ("--serial s -o a,b m", "without a comma"),
        ("--serial s --wait 601 m", "seconds from 0 to 600"),
        ("--serial s --hash-offset x m", "number of bytes"),
        ("--serial s .m", "must be letters"),
    ],
)
def test_mount_refuses_what_makes_no_sense(tmp_path: Path, words: str, problem: str) -> None:
    async def body(agent: FakeAgent) -> None:
        shown = await gcsctl(agent, "storage", "mount", *words.split())
        assert (shown.code, shown.out) == (125, "")
        assert problem in shown.err

    with_agent(tmp_path, body)


def test_the_other_commands(tmp_path: Path) -> None:
    asked: list[object] = []

    def note(result: object) -> Callable[[Any], Any]:
        def handler(params: object) -> object:
            asked.append(params)
            return result

        return handler

    async def body(agent: FakeAgent) -> None:
        agent.handlers |= {
            "storage.list": note(MountList((STATE,))),
            "storage.unmount": note(Unmounted(("x", "data"))),
            "storage.trim": note(Trimmed(3 << 20)),
            "storage.freeze": note(Empty()),
            "storage.thaw": note(Empty()),
        }
        table = (await gcsctl(agent, "storage", "ls")).out.splitlines()
        assert table[0].split() == ["MOUNT", "STATUS", "TYPE", "SOURCE", "TARGET"]
        assert "data,more  mounted (frozen for 5 s)  ext4  /dev/vdb  /run/gcs/mounts/data" in table[1]
        assert json.loads((await gcsctl(agent, "storage", "ls", "--json")).out)[0]["mount"] == "data"
        assert (await gcsctl(agent, "storage", "unmount", "--dependents", "data")).out == ""
        gone = json.loads((await gcsctl(agent, "storage", "unmount", "--json", "data")).out)
        assert gone == {"unmounted": ["x", "data"]}
        assert (await gcsctl(agent, "storage", "trim", "data")).out == "3.0 MiB\n"
        assert (await gcsctl(agent, "storage", "freeze", "--for", "2.5", "data")).code == 0
        assert (await gcsctl(agent, "storage", "thaw", "data")).code == 0
        assert asked == [
            ListMounts(),
            ListMounts(),
            UnmountStorage("data", True),
            UnmountStorage("data", False),
            MountRef("data"),
            FreezeStorage("data", 2500),
            MountRef("data"),
        ]

    with_agent(tmp_path, body)


def test_a_list_is_begun_anew_when_its_last_known_mount_has_gone(tmp_path: Path) -> None:
    mounts = [replace(STATE, mount=name, holders=(name,)) for name in ("a", "b", "c")]

    def pages(params: ListMounts) -> MountList:
        """Two at a time; b goes when it has been told of."""
        names = [each.mount for each in mounts]
        if params.after and params.after not in names:
            raise RpcError(Code.NOT_FOUND, f"there is no mount {params.after}")
        left = mounts[names.index(params.after) + 1 :] if params.after else mounts
        mounts[:] = [each for each in mounts if each.mount != "b"]
        return MountList(tuple(left[:2]), len(left[2:]))

    async def body(agent: FakeAgent) -> None:
        agent.handlers["storage.list"] = pages
        shown = json.loads((await gcsctl(agent, "storage", "ls", "--json")).out)
        assert [each["mount"] for each in shown] == ["a", "c"]

    with_agent(tmp_path, body)


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["storage.unmount"] = refusing(Code.FAILED_PRECONDITION, "container web uses it")
        shown = await gcsctl(agent, "storage", "unmount", "data")
        assert (shown.code, shown.out) == (125, "")
        assert shown.err == "gcsctl: container web uses it (`gcsctl storage ls` shows how things stand)\n"

    with_agent(tmp_path, body)
