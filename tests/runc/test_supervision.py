"""What the supervisor does when its agent dies, and how both end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from protocol.families.agent import ShutdownAction
from tests.cases.agents import REPO, RunningAgent, eventually, greeted
from tests.cases.target import OUTPUT, Target, creation, expect

SECONDS = 30.0


@pytest.fixture
def own() -> Iterator[RunningAgent]:
    running = RunningAgent()
    yield running
    running.destroy()


def target_of(agent: RunningAgent, rootfs: str) -> Target:
    return Target(agent.address, rootfs, box="box", pace=1.0, execs=1)


async def two_containers(target: Target) -> None:
    """One that ends when told to, and one that is deaf (pid 1 without a handler)."""
    polite = ("bash", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.02; done")
    async with asyncio.timeout(SECONDS), await Client.connect(target.address) as client:
        await client.create_container(creation(target, "polite", polite, stdio=OUTPUT))
        await client.create_container(creation(target, "deaf", ("sleep", "100000")))
        async with await client.attach("polite") as out:
            await client.start_container("polite")
            await client.start_container("deaf")
            await expect(out, b"ready\n")


def test_a_killed_agent_is_replaced_and_connections_made_meanwhile_wait(own: RunningAgent) -> None:
    for generation in (2, 3):
        agent = own.agent_pid
        os.kill(agent, signal.SIGSTOP)  # what connects now has not been accepted when it dies
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as early:
            early.connect(own.socket_path)
            os.kill(agent, signal.SIGKILL)
            with greeted(own.socket_path, SECONDS, early) as now:
                assert now == generation
        assert own.agent_pid not in (0, agent)
    assert own.stop() == 0
    own.assert_nothing_left()


def test_an_agent_that_dies_again_and_again_is_started_again(own: RunningAgent) -> None:
    for generation in range(2, 8):
        pid = eventually(lambda: own.agent_pid)
        os.kill(pid, signal.SIGKILL)
        own.wait_for_generation(generation)


def test_sigterm_ends_containers_first(own: RunningAgent, rootfs: str) -> None:
    asyncio.run(two_containers(target_of(own, rootfs)))
    assert own.cgroups()
    assert own.stop() == 0
    own.assert_nothing_left()
    log = own.log_tail()
    assert '"container": "polite", "process_id": "init", "exit_code": 3' in log


def test_shutdown_by_request_ends_both(own: RunningAgent, rootfs: str) -> None:
    asyncio.run(two_containers(target_of(own, rootfs)))

    async def shut_down() -> None:
        async with await Client.connect(own.address) as client:
            await client.shutdown(ShutdownAction.EXIT, grace=0.2)

    asyncio.run(shut_down())
    assert own.wait() == 0
    own.assert_nothing_left()


def test_sigterm_while_the_agent_is_stopped_still_ends(own: RunningAgent, rootfs: str) -> None:
    """A stuck agent is given its time, then everything is killed from above."""
    asyncio.run(two_containers(target_of(own, rootfs)))
    agent = own.agent_pid
    os.kill(agent, signal.SIGSTOP)
    assert own.stop(60.0) == 0
    assert not Path(f"/proc/{agent}").exists()


def test_an_agent_that_cannot_listen_says_so_and_exits(own: RunningAgent, tmp_path: Path) -> None:
    """The address is taken by another agent."""
    done = subprocess.run(
        [sys.executable, "-m", "gcsagent", "--listen", own.address, "--state", str(tmp_path / "state")],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert f"cannot listen on {own.address}" in done.stderr
    with greeted(own.socket_path, SECONDS) as generation:
        assert generation == 1


def test_a_stale_socket_is_no_obstacle(own: RunningAgent) -> None:
    """As a SIGKILLed supervisor leaves it."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as stale:
        path = own.directory / "stale.sock"
        stale.bind(str(path))
    again = RunningAgent(socket_path=str(path))
    try:
        assert again.stop() == 0
        assert not path.exists()
    finally:
        again.destroy()
