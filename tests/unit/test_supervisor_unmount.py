"""What PID 1 unmounts before the machine ends, in which order, and that nothing keeps it from ending."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gcsagent.supervisor import unmount

MOUNTINFO = """\
1 1 0:2 / / rw shared:1 - rootfs rootfs rw
22 1 0:20 / /proc rw,nosuid - proc proc rw
30 1 254:0 / /run/gcs/disks/rootfs ro master:7 propagate_from:1 - erofs /dev/vda ro
31 1 254:16 / /data rw,relatime shared:4 shared:5 - ext4 /dev/vdb rw
32 31 0:40 / /data/two\\040words rw - tmpfs tmpfs rw
33 32 0:41 / /data/two\\040words/deep rw - overlay overlay rw,lowerdir=/a
34 31 254:32 / /data rw - xfs /dev/vdc rw
35 1 0:50 / /share rw - virtiofs tag rw
"""


@pytest.fixture
def mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTINFO)
    monkeypatch.setattr(unmount.mounted, "__defaults__", (str(path),))


def test_last_mounted_first_unmounted_and_nothing_of_the_kernels_own(mountinfo: None) -> None:
    assert unmount.mounted() == [
        "/share",
        "/data",
        "/data/two words/deep",
        "/data",
        "/run/gcs/disks/rootfs",
    ]


def test_nothing_but_a_space_ends_a_name(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.write_text("36 1 0:51 / /odd\rna\x0bme rw - virtiofs odd rw\n")
    assert unmount.mounted(str(path)) == ["/odd\rna\x0bme"]


def busybox(tmp_path: Path, body: str) -> str:
    """A shell that does ``body`` and then what the real one is asked to, with our umount, mount and sync."""
    path = tmp_path / "busybox"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


SHELL = """case $1 in
sh) shift; PATH={directory}:$PATH exec sh "$@" ;;
umount) echo "$@" >>{directory}/log; [ "$2" != /share ] ;;
*) echo "$@" >>{directory}/log ;;
esac"""


def test_what_is_busy_becomes_read_only_and_all_is_written_out(mountinfo: None, tmp_path: Path) -> None:
    assert unmount.unmount_all(busybox(tmp_path, SHELL.format(directory=tmp_path)), 20)
    assert (tmp_path / "log").read_text().splitlines() == [
        "umount /share",
        "mount -o remount,ro /share",
        "umount /data",
        "umount /data/two words/deep",
        "umount /data",
        "umount /run/gcs/disks/rootfs",
        "sync",
    ]


def test_a_file_system_that_hangs_does_not_keep_the_machine(mountinfo: None, tmp_path: Path) -> None:
    begun = time.monotonic()
    assert not unmount.unmount_all(busybox(tmp_path, "exec sleep 100"), 0.1)
    assert time.monotonic() - begun < 10


def test_neither_does_a_missing_program(mountinfo: None, tmp_path: Path) -> None:
    assert not unmount.unmount_all(str(tmp_path / "none"), 20)


CHILD = """
import os, subprocess, sys, time
from gcsagent.supervisor import unmount
quick = subprocess.Popen(["sleep", "0.2"])
assert unmount.reap_all(20)
slow = subprocess.Popen(["sleep", "100"])
begun = time.monotonic()
assert not unmount.reap_all(0.1)
assert time.monotonic() - begun < 10
os.kill(slow.pid, 9)
assert unmount.reap_all(20)
try:
    unmount.kill_all()
except AssertionError as refused:
    assert "not PID 1" in str(refused)
else:
    sys.exit("it would have killed everybody")
"""


def test_all_children_are_waited_for_but_not_for_ever() -> None:
    """In a process of its own, whose children are nobody else's."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", CHILD], env=environment, timeout=60, check=True)
