"""VMs broken on purpose, each in another way: the launcher's one line names what is wrong.

All are booted before the first test looks at its own, two at a time: each takes seconds, and most of them
one CPU. What the consoles showed is in tests/unit/consoles, for the unit tests of the diagnosis.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.errors import BootError, VmError
from gcsagent.host.vm.greeting import ANSWER_SECONDS
from gcsagent.host.vm.launcher import VirtualMachine

REPO = Path(__file__).resolve().parents[2]

# The first test boots all of them, and may build the image.
pytestmark = pytest.mark.timeout(1300)

AT_A_TIME = 2
BOOT_SECONDS = 120.0
OURS = "usr/lib/python3/dist-packages/gcsagent"
SITE_ERROR = "ModuleNotFoundError: No module named 'no_such_library'"
BAD_IMPORT = "\nimport no_such_library\n"
CRASH = """\
#!/bin/busybox sh
/bin/busybox mkdir /proc
/bin/busybox mount -t proc proc /proc
echo c >/proc/sysrq-trigger
"""
GONE = "a link to nowhere"


@dataclass(frozen=True)
class Broken:
    """What is wrong with a VM, and the line that tells of it, behind "VM boot failed"."""

    says: str
    files: tuple[tuple[str, str], ...] = ()
    """In place of the image's own; KERNEL is the release of its kernel."""
    alone: bool = False
    """They are all that is in the initramfs."""
    damage: Callable[[bytes], bytes] = bytes
    append: tuple[str, ...] = ()
    memory_mib: int = 512
    shows: str = ""
    """What is in the lines below."""
    long: bool = False
    """Like another one: in make test-long only."""


BROKEN = {
    "damaged": Broken(
        r"before its first stage: /.*/initramfs is damaged, build the image anew .*:"
        r" Initramfs unpacking failed: .+",
        damage=lambda initramfs: initramfs[:2_000_000] + bytes(1000) + initramfs[2_001_000:],
    ),
    "no-init": Broken(
        r"before its first stage: /.*/initramfs holds no /init: build the image anew .*",
        files=(("readme", "nothing to run here"),),
        alone=True,
    ),
    "no-interpreter": Broken(
        r"before its first stage: the kernel cannot execute /init of /.*/initramfs \(it, or the interpreter"
        r" it names, is not there\): build the image anew .*",
        files=(("init", "#!/bin/sh"),),
        alone=True,
        long=True,
    ),
    "no-program": Broken(
        r"before its first stage: the kernel cannot execute /init of /.*/initramfs \(it is no program\): .*",
        files=(("init", "what is this?"),),
        alone=True,
        long=True,
    ),
    "panic": Broken(
        r"before its first stage: Kernel panic - not syncing: sysrq triggered crash",
        files=(("init", CRASH),),
        shows="Call Trace:",
    ),
    "memory": Broken(
        r".*: 128 MiB of memory do not suffice, give the VM more \(--memory\): .+",
        append=("mem=96M",),
        memory_mib=128,
    ),
    "other-kernel": Broken(
        r"after stage 'mounts': stage 'modules' failed: the image has no modules for kernel 6\..*",
        files=(("usr/lib/modules/KERNEL/modules.dep", GONE),),
        long=True,
    ),
    "module-refused": Broken(
        r"after stage 'mounts': stage 'modules' failed: modprobe -a .*vsock_loopback.*: .+",
        append=("module_blacklist=vsock_loopback",),
        long=True,
    ),
    "no-transport": Broken(
        r"after stage 'mounts': stage 'modules' failed: the vsock device has no driver: .*",
        append=("module_blacklist=vmw_vsock_virtio_transport",),
    ),
    "setting": Broken(
        r"after stage 'supervisor': stage 'supervisor' failed: gcs\.watchdog=never: seconds from 1 to 3600,"
        r" or off",
        append=("gcs.watchdog=never",),
        long=True,
    ),
    "supervisor-import": Broken(
        rf"after stage 'supervisor': PID 1 ended with status 1: {SITE_ERROR} \(main\.py, line 2\)",
        files=((f"{OURS}/supervisor/main.py", BAD_IMPORT),),
        shows="Traceback (most recent call last):",
    ),
    "agent-import": Broken(
        r"after stage 'agent': stage 'agent' failed: the agent ended 5 times before it was ready"
        rf" \(status 1\): {SITE_ERROR} \(app\.py, line 2\)",
        files=((f"{OURS}/agent/app.py", BAD_IMPORT),),
        shows="Traceback (most recent call last):",
    ),
    "out-of-reach": Broken(
        r"after stage 'ready': the agent is ready but cannot be reached over vsock: no agent answered in .*",
        append=("gcs.port=1025",),
    ),
    "stranger": Broken(
        r"after stage 'ready': the agent is ready but cannot be reached over vsock: no agent answered in .*",
        append=("gcs.peer_cid=7",),
        long=True,
    ),
}
CHOSEN = [name for name, broken in BROKEN.items() if not broken.long or os.environ.get("GCS_BOOT") == "long"]


def _archive(broken: Broken, kernel: str, folder: Path) -> bytes:
    """Its files as an archive, which overrides what is in those before it."""
    for name, text in broken.files:
        path = folder / "files" / name.replace("KERNEL", kernel)
        path.parent.mkdir(parents=True, exist_ok=True)
        if text == GONE:
            path.symlink_to("nowhere")
        else:
            path.write_text(text)
            path.chmod(0o755)
    command = [sys.executable, str(REPO / "scripts/pack_newc.py"), str(folder / "files"), "0"]
    return subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=True).stdout


def _config(name: str, image: Path, folder: Path) -> VmConfig:
    broken = BROKEN[name]
    (folder / "vmlinuz").symlink_to(image / "vmlinuz")
    whole = b"" if broken.alone else broken.damage((image / "initramfs").read_bytes())
    if broken.files:
        kernel = json.loads((image / "manifest.json").read_text())["kernel"]
        # The kernel wants each archive at a multiple of 4.
        whole += bytes(-len(whole) % 4) + _archive(broken, kernel, folder)
    (folder / "initramfs").write_bytes(whole)
    return VmConfig(
        name=name,
        image=folder,
        cmdline=broken.append,
        cpus=1,
        memory_mib=broken.memory_mib,
        boot_timeout=BOOT_SECONDS,
        console_log=folder / "console",
    )


@pytest.fixture(scope="module")
def failures(built_image: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, VmError]:
    """How each of them failed."""

    async def boot(name: str, turns: asyncio.Semaphore) -> VmError:
        config = _config(name, built_image, tmp_path_factory.mktemp(name))
        async with turns:
            try:
                vm = await VirtualMachine.launch(config)
            except VmError as error:
                return error
            vm.destroy()
            pytest.fail(f"{name}: it came up")

    async def boot_all() -> list[VmError]:
        turns = asyncio.Semaphore(AT_A_TIME)
        return await asyncio.gather(*(boot(name, turns) for name in CHOSEN))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ANSWER_SECONDS, "tcg", 5.0)
        return dict(zip(CHOSEN, asyncio.run(boot_all()), strict=True))


@pytest.mark.parametrize("name", CHOSEN)
def test_a_broken_vm_says_what_is_wrong(failures: dict[str, VmError], name: str) -> None:
    error, broken = failures[name], BROKEN[name]
    assert isinstance(error, BootError), repr(error)
    assert re.fullmatch(f"VM boot failed {broken.says}", str(error)), error.report()
    assert broken.shows in error.report()
