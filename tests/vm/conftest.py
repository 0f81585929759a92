"""One VM for all tests of a session, over vsock: booted from this tree's image, powered off at the end.

Its end is a test as well: the agent powers it off in order, and its console shows no kernel trouble.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from gcsagent.host.client import Client
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.console import Finding, scan
from gcsagent.host.vm.launcher import VirtualMachine
from gcsagent.host.vm.tools import cache_dir
from tests.cases.machines import Booted, build_image

T = TypeVar("T")
BOOT_SECONDS, END_SECONDS = 240.0, 90.0
CONSOLE_LINES = 60


_VM = pytest.StashKey[VirtualMachine]()


@pytest.fixture(scope="session")
def built_image() -> Path:
    return build_image()


@pytest.fixture(scope="session")
def rootfs_image() -> Path:
    path = cache_dir() / "demo-rootfs" / "current" / "rootfs.erofs"
    if not path.is_file():
        pytest.fail(f"there is no {path}: run scripts/make-demo-rootfs.sh as root first", pytrace=False)
    return path.resolve()


@pytest.fixture(scope="session")
def vm(
    request: pytest.FixtureRequest,
    built_image: Path,
    rootfs_image: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Booted]:
    log = tmp_path_factory.mktemp("vm") / "console"
    config = VmConfig(name="tests", image=built_image, rootfs=rootfs_image, console_log=log)
    with asyncio.Runner() as runner:
        machine = runner.run(_within(BOOT_SECONDS, VirtualMachine.launch(config)))
        request.config.stash[_VM] = machine
        try:
            yield Booted(machine, runner)
            runner.run(_within(END_SECONDS, _power_off(machine)))
            assert _trouble(scan(log.read_text(errors="replace"))) == []
        finally:
            machine.destroy()


async def _within(seconds: float, work: Awaitable[T]) -> T:
    async with asyncio.timeout(seconds):
        return await work


async def _power_off(machine: VirtualMachine) -> None:
    async with await Client.connect(machine.address) as client:
        await client.shutdown()
        ended = await machine.wait()
    assert (ended.clean, ended.status, _trouble(ended.findings)) == (True, 0, []), ended


def _trouble(findings: Iterable[Finding]) -> list[Finding]:
    """What nobody meant to happen. A dm-verity disk that does not fit its hash is read with errors."""
    return [each for each in findings if "Buffer I/O error on dev dm-" not in each.line]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows the end of the console, where the guest's agent logs to."""
    report = yield
    machine = item.config.stash.get(_VM, None)
    if report.failed and machine is not None:
        report.sections.append(
            ("the VM's console, its end", "\n".join(machine.console.lines()[-CONSOLE_LINES:]))
        )
    return report
