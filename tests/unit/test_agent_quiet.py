"""What is let in while a snapshot is made, and what is waited for before."""

from __future__ import annotations

import asyncio
from typing import Any

from gcsagent.agent.quiet import Quiet
from protocol.errors import Code
from protocol.families.snapshot import PASSING
from protocol.methods import METHODS
from tests.specgen import SPEC


def test_only_what_changes_something_new_is_refused() -> None:
    quiet = Quiet()
    assert quiet.refusal("container.create") is None
    quiet.begin("nightly")
    refusal = quiet.refusal("container.create")
    assert refusal is not None
    assert (refusal.code, refusal.details) == (Code.FAILED_PRECONDITION, {"snapshot": "nightly"})
    assert [quiet.refusal(method) for method in PASSING] == [None] * len(PASSING)
    quiet.end()
    assert quiet.refusal("container.create") is None


def test_those_that_pass_are_as_the_specification_says() -> None:
    [said] = [line for line in SPEC.read_text().splitlines() if line.startswith("While the guest is held, ")]
    named = {word for word in said.partition(" and every method")[0].split("`") if "." in word}
    assert named == PASSING
    assert all(METHODS[name].mutating for name in PASSING)


def test_what_is_under_way_is_waited_for_and_named() -> None:
    async def scenario() -> None:
        quiet, answers = Quiet(), list[Any]()
        first, second = (quiet.counted("process.exec", answers.append) for _ in range(2))
        quiet.counted("stream.ack", answers.append)  # what passes is not waited for
        own = asyncio.create_task(asyncio.sleep(60))
        assert await quiet.settled(0.05, [own]) == ["process.exec (2)", "work of the agent's own"]
        own.cancel()
        waiting = asyncio.create_task(quiet.settled(20, [own]))
        for number, answer in enumerate((first, second)):
            await asyncio.sleep(0)
            assert not waiting.done()
            answer(number)
        assert (await waiting, answers) == ([], [0, 1])

    asyncio.run(scenario())
