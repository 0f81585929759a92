"""Which runtime a container gets, and which it keeps."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from gcsagent.agent.calls import Caller
from gcsagent.agent.runc import Runc
from gcsagent.agent.runtime import RuntimeFailure
from gcsagent.agent.runtime_facts import RuntimeFacts
from gcsagent.agent.runtimes import Runtimes
from gcsagent.agent.supervisor_client import SupervisorClient
from protocol.errors import Code, RpcError
from protocol.types import RuntimeInfo


@pytest.fixture
def runtimes(tmp_path: Path) -> Runtimes:
    caller = Caller(cast(SupervisorClient, None), {}, "g1")  # none is called here
    return Runtimes(lambda binary: Runc(caller, binary, str(tmp_path), ""), ["runc", "/opt/bin/crun"])


def test_the_first_is_the_default(runtimes: Runtimes) -> None:
    assert runtimes.choose("") is runtimes.choose("runc") is runtimes.default


def test_one_is_chosen_by_name_wherever_it_is(runtimes: Runtimes) -> None:
    assert (runtimes.choose("crun").binary, runtimes.choose("crun").name) == ("/opt/bin/crun", "crun")


@pytest.mark.parametrize("name", ["youki", "/opt/bin/crun", "CRUN", "../runc"])
def test_another_is_refused_naming_what_there_is(runtimes: Runtimes, name: str) -> None:
    with pytest.raises(RpcError, match="runc, crun") as refused:
        runtimes.choose(name)
    assert (refused.value.code, refused.value.details["field"]) == (Code.INVALID_ARGUMENT, "runtime")


def test_a_container_keeps_one_that_is_no_longer_offered(runtimes: Runtimes) -> None:
    kept = runtimes.remembered("/old/youki")
    assert runtimes.remembered("/old/youki") is kept
    assert list(runtimes) == [*runtimes.offered, kept]
    with pytest.raises(RpcError):
        runtimes.choose("youki")
    assert runtimes.remembered("/usr/bin/crun") is runtimes.choose("crun")


def test_what_is_no_container_in_a_runtimes_directory_is_left_alone(
    runtimes: Runtimes, tmp_path: Path
) -> None:
    for name in (".cache", "box"):
        (tmp_path / "runtime" / "crun" / name).mkdir()
    assert runtimes.choose("crun").leftovers() == {"box"}
    assert runtimes.default.leftovers() == set()


class CountingRuntime:
    """Says its version when the loop has gone round a few times, and how often it was asked at once."""

    name = "sh"
    binary = "/bin/sh"

    def __init__(self) -> None:
        self.asked = self.now = self.most = 0

    async def version(self) -> str:
        self.asked, self.now = self.asked + 1, self.now + 1
        self.most = max(self.most, self.now)
        for _ in range(5):
            await asyncio.sleep(0)
        self.now -= 1
        if self.asked == 1:
            raise RuntimeFailure("version", 1, "not yet")
        return "sh 1.0"


def test_a_crowd_that_asks_about_a_runtime_starts_one_program() -> None:
    counting = CountingRuntime()
    offered = cast(Runtimes, SimpleNamespace(offered=(counting,)))

    async def crowd() -> list[tuple[RuntimeInfo, ...]]:
        facts = RuntimeFacts(offered)
        return await asyncio.gather(*(facts.all(False) for _ in range(100)))

    versions = [info.version for (info,) in asyncio.run(crowd())]
    assert versions == ["version: not yet", *["sh 1.0"] * 99]
    assert (counting.asked, counting.most) == (2, 1)
