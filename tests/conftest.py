"""For all tests: assertions in the shared cases explain themselves, and nothing may be skipped."""

from __future__ import annotations

import signal

import pytest

pytest.register_assert_rewrite("tests.cases")

# A shell starts what it puts into the background with SIGINT ignored, and nohup(1) with SIGHUP, which gcsctl
# would inherit, and respect.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for kind in ("skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(kind, []):
            terminalreporter.write_line(f"{kind.upper()} IS A FAILURE HERE: {report.nodeid}", red=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A test that cannot run must say so by failing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and any(reporter.stats.get(kind) for kind in ("skipped", "xfailed", "xpassed")):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
