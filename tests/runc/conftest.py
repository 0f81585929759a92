"""The real agent on this machine, over a UNIX socket, with the real runc. Needs root."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from gcsagent.host.vm.tools import cache_dir
from tests.cases.agents import RunningAgent, stopped_clean

_AGENT = pytest.StashKey[RunningAgent]()


@pytest.fixture(scope="session")
def rootfs() -> str:
    path = cache_dir() / "demo-rootfs" / "current" / "rootfs"
    if not path.is_dir():
        pytest.fail(f"there is no {path}: run scripts/make-demo-rootfs.sh as root first", pytrace=False)
    return str(path.resolve())


@pytest.fixture(scope="session")
def agent(request: pytest.FixtureRequest) -> Iterator[RunningAgent]:
    """One for all tests; its end is a test as well: SIGTERM, status 0, nothing left."""
    running = RunningAgent("--log-level", "debug")
    request.config.stash[_AGENT] = running
    yield from stopped_clean(running)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows the end of the agent's log."""
    report = yield
    running = item.config.stash.get(_AGENT, None)
    if report.failed and running is not None:
        report.sections.append(("the agent's log, its end", running.log_tail()))
    return report
