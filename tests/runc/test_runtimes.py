"""Two runtimes side by side under one agent: each container has its own, whichever agent looks after it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from gcsagent.host.client import Client
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from tests.cases.agents import RunningAgent, eventually, stopped_clean
from tests.cases.target import Target, connect, creation, name, refused, run, running

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def both() -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--runtimes", "/no/such/runsc,crun", runtime="runc"))


@pytest.fixture
def target(both: RunningAgent, rootfs: str) -> Iterator[Target]:
    before = both.holdings()
    yield Target(both.address, rootfs, box="", pace=1.0, execs=1)
    both.assert_holds(before)


def _known_to(both: RunningAgent, runtime: str) -> set[str]:
    return {path.name for path in (both.state_dir / "runtime" / runtime).iterdir() if path.name[0] != "."}


def test_each_container_keeps_its_runtime_when_the_agent_is_killed(
    both: RunningAgent, target: Target
) -> None:
    async def body() -> None:
        async with (
            await connect(target) as client,
            running(target, client) as first,
            running(target, client, runtime="crun") as second,
            running(target, client, runtime="runc") as third,
        ):
            ids = {init.container: await _runtime(client, init.container) for init in (first, second, third)}
            assert list(ids.values()) == ["runc", "crun", "runc"]
            assert _known_to(both, "runc") == {first.container, third.container}
            assert _known_to(both, "crun") == {second.container}
            generation = (await client.ping()).generation
            os.kill(both.agent_pid, signal.SIGKILL)
            await asyncio.to_thread(both.wait_for_generation, generation + 1)
            for container, runtime in ids.items():
                assert await _runtime(client, container) == runtime
                await client.pause_container(container)
                await client.resume_container(container)
                assert (await run(client, container, "echo", "alive")).stdout == b"alive\n"

    asyncio.run(body())
    assert _known_to(both, "runc") | _known_to(both, "crun") == set()


async def _runtime(client: Client, container: str) -> str:
    return (await client.container_state(container)).runtime


def test_info_shows_each_with_its_version_and_features(target: Target) -> None:
    async def body() -> None:
        async with await connect(target) as client:
            plain, full = await client.info(), await client.info(features=True)
            again = await client.info(features=True)
        assert [about.name for about in plain.runtimes] == ["runc", "runsc", "crun"]
        assert [about.features for about in plain.runtimes] == [{}, {}, {}]
        assert full.runtimes == again.runtimes
        runc, runsc, crun = full.runtimes
        assert runc == full.runtime
        assert (os.path.basename(runc.path), os.path.isabs(runc.path)) == ("runc", True)
        assert runc.version.startswith("runc version 1")
        assert "linux" in runc.features
        assert crun.version.startswith("crun version 1")
        assert (runsc.path, runsc.version, runsc.features) == ("/no/such/runsc", "not installed", {})

    asyncio.run(body())


def test_gcsctl_names_and_shows_it(both: RunningAgent, target: Target) -> None:
    options = ("--rootfs", target.rootfs, "--overlay")
    ran = _gcsctl(both, "run", "--rm", "--runtime", "crun", *options, "--", "sh", "-c", "echo ran; exit 7")
    assert (ran.returncode, ran.stdout) == (7, "ran\n"), ran.stderr
    assert (
        _gcsctl(
            both, "run", "-d", "--id", "c", "--runtime", "crun", *options, "--", "sleep", "100"
        ).returncode
        == 0
    )
    shown = _gcsctl(both, "state", "c").stdout
    assert _gcsctl(both, "delete", "--force", "c").returncode == 0
    assert re.search(r"^runtime: +crun$", shown, re.MULTILINE), shown
    about = _gcsctl(both, "info").stdout
    assert "crun (/" in about
    assert "OCI runtime spec 1.0.0 to 1.0.2" in about
    refused = _gcsctl(both, "run", "--rm", "--runtime", "youki", *options, "--", "true")
    assert refused.returncode == 125
    assert "runc, runsc, crun" in refused.stderr


def _gcsctl(both: RunningAgent, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gcsagent.host", "--address", both.address, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)


def test_a_runtime_that_is_not_offered_is_refused(target: Target) -> None:
    async def body() -> None:
        async with await connect(target) as client:
            params = creation(target, name("c"), ("true",), runtime="youki")
            with refused(Code.INVALID_ARGUMENT, field="runtime"):
                await client.create_container(params)
            assert await client.list_containers() == ()

    asyncio.run(body())


def test_a_runtime_that_is_not_installed_is_unavailable_and_leaves_nothing(target: Target) -> None:
    async def body() -> None:
        async with await connect(target) as client:
            params = creation(target, name("c"), ("true",), runtime="runsc")
            with pytest.raises(RpcError, match="/no/such/runsc") as caught:
                await client.create_container(params)
            assert caught.value.code is Code.UNAVAILABLE
            assert await client.list_containers() == ()

    asyncio.run(body())


def test_an_unknown_container_of_the_other_runtime_is_removed(both: RunningAgent, target: Target) -> None:
    async def body() -> None:
        async with await connect(target) as client, running(target, client, runtime="crun") as init:
            document = both.state_dir / "containers" / init.container / "container.json"
            assert json.loads(document.read_text())["runtime"] == "crun"
            await asyncio.to_thread(_create_stray, both, creation(target, "stray", ("true",), overlay=False))
            assert _known_to(both, "crun") == {init.container, "stray"}
            os.kill(both.agent_pid, signal.SIGKILL)
            await client.ping()
            gone = await asyncio.to_thread(eventually, lambda: _known_to(both, "crun") == {init.container})
            assert gone, both.log_tail()
            assert (await run(client, init.container, "true")).exit.exit_code == 0

    asyncio.run(body())


def _create_stray(both: RunningAgent, params: CreateContainer) -> None:
    """Past the agent, where its crun runs."""
    bundle = both.directory / "stray"
    bundle.mkdir()
    (bundle / "config.json").write_text(json.dumps(params.spec))
    root = str(both.state_dir / "runtime/crun")
    create = ["crun", "--root", root, "create", "--bundle", str(bundle), "stray"]
    null = subprocess.DEVNULL
    subprocess.run(
        ["nsenter", "--mount", f"--target={both.pid}", "--", *create],
        check=True,
        timeout=20,
        stdin=null,
        stdout=null,
        stderr=null,
    )
