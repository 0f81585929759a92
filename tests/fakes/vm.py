"""An environment in which the VM launcher finds fake programs, a dummy image and private directories."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gcsagent.host.vm.named import VmStore
from gcsagent.host.vm.process import open_pidfd, start_time, wait_pidfd

_FAKES = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class FakeHost:
    """Where the launcher's files go while fakes are in place."""

    root: Path

    def leftovers(self) -> list[str]:
        """Files of VMs that are still there."""
        places = (self.root / "run", self.root / "cache" / "scratch", self.root / "state" / "gcsctl" / "vms")
        found = [str(path) for place in places if place.is_dir() for path in place.iterdir()]
        return [path for path in found if not path.endswith("/.lock")]

    def processes(self) -> list[int]:
        """Fake programs that still run on behalf of this host: their environment names its files."""
        marker = os.fsencode(self.root)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and marker in _environ(entry) and start_time(int(entry.name)) is not None:
                found.append(int(entry.name))
        return found


def fake_host(patch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    """Puts the fakes in place; for use in a fixture."""
    # Not tmp_path: a UNIX socket's path must be short.
    root = Path(tempfile.mkdtemp(prefix="gcs"))
    for name in ("run", "image"):
        (root / name).mkdir()
    (root / "image" / "vmlinuz").write_bytes(bytes(0x202) + b"HdrS")
    (root / "image" / "initramfs").write_bytes(b"070701")
    patch.setenv("GCS_QEMU", str(program(root / "qemu", "fake_qemu.py")))
    patch.setenv("GCS_VHOST_DEVICE_VSOCK", str(program(root / "vsock", "fake_vsock_daemon.py")))
    patch.setenv("GCS_VIRTIOFSD", str(program(root / "virtiofsd", "fake_virtiofsd.py")))
    patch.setenv("GCS_IMAGE", str(root / "image"))
    patch.setenv("GCS_CACHE", str(root / "cache"))
    patch.setenv("XDG_RUNTIME_DIR", str(root / "run"))
    patch.setenv("XDG_STATE_HOME", str(root / "state"))
    yield FakeHost(root)
    shutil.rmtree(root)


def fake_host_of_named(patch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    """Likewise, where VMs with names are stopped in the end."""
    for host in fake_host(patch):
        yield host
        for vm in VmStore().list():
            asyncio.run(VmStore().stop(vm.name, timeout=0.1))


def program(path: Path, fake: str) -> Path:
    """An executable at `path` that runs the fake."""
    return script(path, f'exec {sys.executable} -I {_FAKES / fake} "$@"')


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def end_of(pid: int) -> bool:
    """Waits for a process that is not ours to end."""
    started = start_time(pid)
    pidfd = None if started is None else open_pidfd(pid, started)
    if pidfd is None:
        return True
    try:
        return asyncio.run(wait_pidfd(pidfd, 20.0))
    finally:
        os.close(pidfd)


def _environ(entry: Path) -> bytes:
    try:
        return (entry / "environ").read_bytes()
    except OSError:
        return b""
