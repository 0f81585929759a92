"""The real agent on this machine, over a UNIX socket, with the real runc. Needs root."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from gcsagent.host.vm.tools import cache_dir
from protocol.address import UnixAddress
from tests.cases.agents import RunningAgent, stopped_clean
from tests.cases.shells import SLEEP, Shelled, start
from tests.cases.target import Target
from tests.fakes.slow_runc import Slow, slow_agent


@pytest.fixture(scope="session")
def rootfs() -> str:
    path = cache_dir() / "demo-rootfs" / "current" / "rootfs"
    if not path.is_dir():
        pytest.fail(f"there is no {path}: run scripts/make-demo-rootfs.sh as root first", pytrace=False)
    return str(path.resolve())


@pytest.fixture(scope="session")
def agent() -> Iterator[RunningAgent]:
    """One for all tests; its end is a test as well: SIGTERM, status 0, nothing left."""
    yield from stopped_clean(RunningAgent("--log-level", "debug"))


@pytest.fixture(scope="session")
def crun_agent() -> Iterator[RunningAgent]:
    """Likewise, with crun: its end is a test, too."""
    yield from stopped_clean(RunningAgent("--log-level", "debug", runtime="crun"))


@pytest.fixture(scope="session")
def shelled(tmp_path_factory: pytest.TempPathFactory, rootfs: str) -> Iterator[Shelled]:
    """Its end is a test, too: status 0, no process, no socket."""
    path = tmp_path_factory.mktemp("shell") / "shell.sock"
    running = RunningAgent("--shell", f"unix:{path}", "--watchdog", "off")
    found = Shelled(running, UnixAddress(str(path)), Target(running.address, rootfs, "box", 1.0, 1))
    for _ in stopped_clean(running):
        found.run(lambda: start(found.target, "box", *SLEEP))
        yield found
        found.run(found.clear)
    assert not path.exists()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows the end of the log of the agent it met."""
    report = yield
    for value in getattr(item, "funcargs", {}).values() if report.failed else ():
        running = getattr(value, "running", value)
        if isinstance(running, RunningAgent):
            report.sections.append(("the agent's log, its end", running.log_tail()))
    return report


@pytest.fixture
def slow(tmp_path: Path, rootfs: str) -> Iterator[Slow]:
    yield from slow_agent(tmp_path, rootfs)
