"""pytest fixtures for tests that need a Linux machine of their own: a VM per session, a container per test.

    def test_release(gcs_container):
        assert "Debian" in gcs_container.run("cat", "/etc/os-release", check=True).stdout

Installed with the distribution and loaded by pytest by itself. ``gcs_vm`` is a
:class:`gcsagent.host.testing.GuestVm`, ``gcs_container`` a :class:`gcsagent.host.testing.GuestContainer`.
Override the session fixture ``gcs_vm_config`` for anything the options do not say. A test that fails shows
the end of the console; a session in which the guest's kernel was in trouble does not pass.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gcsagent.host.testing import GuestContainer, GuestVm
    from gcsagent.host.vm.config import VmConfig

CONSOLE_LINES = 60

_VM = pytest.StashKey["GuestVm"]()


# With "=" in what users are told: before it knows its plugins' options, pytest takes a path that stands alone
# for one of the tests' and looks for the ini file there.
def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gcsagent", "a VM to test in")
    for name, kind, text in _OPTIONS:
        group.addoption(f"--gcs-{name}", dest=f"gcs_{name}", metavar=kind, help=text)
        parser.addini(f"gcs_{name}", f"{text} (--gcs-{name})", default="")


_OPTIONS = (
    (
        "rootfs",
        "PATH",
        "root file system of the containers: a directory, or an EROFS, squashfs or ext4 image",
    ),
    ("image", "DIR", "guest image: a directory with vmlinuz and initramfs"),
    ("memory", "MIB", "memory of the VM in MiB"),
    ("cpus", "N", "CPUs of the VM"),
    ("net", "KIND", "its network: none, or user for a card that reaches what this machine does"),
)


@pytest.fixture(scope="session")
def gcs_vm_config(pytestconfig: pytest.Config) -> VmConfig:
    """What VM ``gcs_vm`` boots, from the options ``--gcs-*`` or the ini file's ``gcs_*``."""
    from gcsagent.host.vm.config import DEFAULT_CPUS, DEFAULT_MEMORY_MIB, VmConfig

    def given(name: str) -> str:
        return str(pytestconfig.getoption(f"gcs_{name}") or pytestconfig.getini(f"gcs_{name}"))

    if not given("rootfs"):
        raise pytest.UsageError(
            "gcs_vm needs a root file system for its containers:"
            " give --gcs-rootfs=PATH or set gcs_rootfs in the ini file"
        )
    try:
        memory, cpus = int(given("memory") or DEFAULT_MEMORY_MIB), int(given("cpus") or DEFAULT_CPUS)
    except ValueError as error:
        raise pytest.UsageError(f"gcs_memory and gcs_cpus are whole numbers: {error}") from error
    return VmConfig(
        name="pytest",
        rootfs=Path(given("rootfs")),
        image=Path(given("image")) if given("image") else None,
        memory_mib=memory,
        cpus=cpus,
        net=given("net") or "none",
    )


@pytest.fixture(scope="session")
def gcs_vm(request: pytest.FixtureRequest, gcs_vm_config: VmConfig) -> Iterator[GuestVm]:
    """A VM that all tests of the session share, powered off in order at its end."""
    from gcsagent.host.testing import GuestVm
    from gcsagent.host.vm.errors import VmError

    try:
        vm = GuestVm.launch(gcs_vm_config)
    except VmError as error:
        pytest.fail(error.report(), pytrace=False)
    request.config.stash[_VM] = vm
    try:
        yield vm
        ended = vm.stop()
    finally:
        del request.config.stash[_VM]
        vm.destroy()
    if not ended.clean or ended.findings:
        pytest.fail("\n".join([ended.reason, *(str(each) for each in ended.findings)]), pytrace=False)


@pytest.fixture
def gcs_container(gcs_vm: GuestVm) -> Iterator[GuestContainer]:
    """A container of the test's own, whose changes go with it."""
    with gcs_vm.container() as container:
        yield container


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    vm = item.config.stash.get(_VM, None)
    if report.failed and vm is not None:
        report.sections.append(("the VM's console, its end", "\n".join(vm.console(CONSOLE_LINES))))
    return report
