"""What is said of VMs that did not come up, from what their consoles showed.

consoles/NAME.txt are those of tests/vm/test_boot_failures.py, as real VMs wrote them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.console import ConsoleMonitor
from gcsagent.host.vm.diagnosis import Circumstances, evidence, explain
from gcsagent.host.vm.errors import BootError
from gcsagent.host.vm.launcher import VirtualMachine
from tests.fakes.vm import FakeHost, fake_host

CONSOLES = Path(__file__).parent / "consoles"
REBUILD = "build the image anew (scripts/build-rootfs.sh)"
MODULES = "after stage 'mounts': stage 'modules' failed: "
NO_LIBRARY = "ModuleNotFoundError: No module named 'no_such_library'"

SAID = {
    "agent-import": "after stage 'agent': stage 'agent' failed: the agent ended 5 times before it was ready"
    f" (status 1): {NO_LIBRARY} (app.py, line 2)",
    "damaged": f"before its first stage: IMAGE/initramfs is damaged, {REBUILD}: Initramfs unpacking failed:"
    " ZSTD-compressed data is corrupt",
    "memory": "before its first stage: 1024 MiB of memory do not suffice, give the VM more (--memory):"
    " Out of memory and no killable processes...",
    "module-refused": f"{MODULES}modprobe -a vsock_loopback virtio_blk virtio_net evdev dm-mod failed:"
    " modprobe: can't load module vsock_loopback (kernel/net/vmw_vsock/vsock_loopback.ko): Operation not"
    " permitted",
    "no-init": f"before its first stage: IMAGE/initramfs holds no /init: {REBUILD}",
    "no-interpreter": "before its first stage: the kernel cannot execute /init of IMAGE/initramfs (it, or the"
    f" interpreter it names, is not there): {REBUILD}",
    "no-program": "before its first stage: the kernel cannot execute /init of IMAGE/initramfs (it is no"
    f" program): {REBUILD}",
    "no-transport": f"{MODULES}the vsock device has no driver: vmw_vsock_virtio_transport is missing in the"
    " image or was refused",
    "other-kernel": f"{MODULES}the image has no modules for kernel 6.12.117+deb13-cloud-amd64, which has"
    " no virtio vsock built in",
    "panic": "before its first stage: Kernel panic - not syncing: sysrq triggered crash",
    "setting": "after stage 'supervisor': stage 'supervisor' failed: gcs.watchdog=never: seconds from 1 to"
    " 3600, or off",
    "supervisor-import": "after stage 'supervisor': PID 1 ended with status 1:"
    f" {NO_LIBRARY} (main.py, line 2)",
}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    yield from fake_host(monkeypatch)


def test_every_recorded_console_is_looked_at() -> None:
    assert {path.stem for path in CONSOLES.iterdir()} == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_a_real_console_is_explained(host: FakeHost, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FAKE_CONSOLE", str(CONSOLES / f"{name}.txt"))
    config = VmConfig(cmdline=("fake=replay",), accel="tcg", vsock="vhost-user")
    with pytest.raises(BootError) as caught:
        asyncio.run(VirtualMachine.launch(config))
    said = str(caught.value).replace(str(host.root / "image"), "IMAGE")
    assert said == f"VM boot failed {SAID[name]}"


@pytest.mark.parametrize("name", ["agent-import", "supervisor-import"])
def test_the_traceback_is_shown_whole_and_alone(name: str) -> None:
    console = ConsoleMonitor()
    console.feed((CONSOLES / f"{name}.txt").read_bytes())
    shown = evidence(console)
    assert (shown[0], shown[-1]) == ("Traceback (most recent call last):", NO_LIBRARY)
    assert not [line for line in shown if line.startswith(("{", "gcs-boot", "["))]


def monitor(text: str) -> ConsoleMonitor:
    console = ConsoleMonitor()
    console.feed(text.encode())
    console.end()
    return console


def said_of(text: str, reason: str = "the guest rebooted") -> str:
    return explain(monitor(text), reason, Circumstances(256, Path("/image/initramfs")))


@pytest.mark.parametrize(
    "line, said",
    [
        (
            "Initramfs unpacking failed: write error",
            "256 MiB of memory do not suffice, give the VM more (--memory): Initramfs unpacking failed: write"
            " error",
        ),
        (
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",
            "PID 1 was killed by SIGSEGV",
        ),
        (
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000004b",
            "PID 1 was killed by signal 75",
        ),
        (
            "Failed to execute /init (error -13)",
            f"the kernel cannot execute /init of /image/initramfs (it may not be executed): {REBUILD}",
        ),
        (
            "Failed to execute /init (error -5)",
            f"the kernel cannot execute /init of /image/initramfs (error 5): {REBUILD}",
        ),
        ("it went well", "the guest rebooted; last console line: it went well"),
    ],
)
def test_what_the_kernel_says(line: str, said: str) -> None:
    assert said_of(f"[    1.500000] {line}\n".replace("[    1.500000] it", "it")) == said


def test_the_agents_last_words_are_its_last_critical_line() -> None:
    log = [
        json.dumps(
            {"level": "CRITICAL", "message": "a fault ends the agent", "exc_info": "Trace\nValueError: x"}
        ),
        json.dumps({"level": "ERROR", "message": "not that"}),
        '{"level": "CRITICAL", "message": broken',
        "gcs-boot: FAILED agent: it ended",
    ]
    assert said_of("\n".join(log)) == "stage 'agent' failed: it ended: a fault ends the agent: ValueError: x"
    assert said_of(log[-1]) == "stage 'agent' failed: it ended"


def test_of_two_tracebacks_the_last_counts_and_its_words_are_bounded() -> None:
    trace = 'Traceback (most recent call last):\n  File "/a/b.py", line %d, in x\n%s: %s\n'
    text = (
        trace % (1, "KeyError", "one")
        + "\nDuring handling of the above:\n\n"
        + trace % (2, "OSError", "n" * 999)
    )
    said = said_of(f"{text}gcs-boot: FAILED agent: it ended\n")
    assert said.startswith("stage 'agent' failed: it ended: OSError: nnn")
    assert len(said) < 350


def test_a_traceback_cut_off_by_the_end_is_none_to_quote_wrongly() -> None:
    assert said_of("Traceback (most recent call last):\ngcs-boot: FAILED agent: it ended\n").endswith(
        "it ended"
    )
