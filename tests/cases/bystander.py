"""A host that works while another misbehaves: everything it asks for must go on as if it were alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tests.cases.target import PIPES, Target, connect, executing, expect

ROUND_SECONDS = 20.0
"""For one round of the bystander's: alone it takes milliseconds, behind a flood it would take for ever."""


class Bystander:
    """``rounds`` are those it has been through."""

    def __init__(self) -> None:
        self.rounds = 0
        self.went_on = asyncio.Condition()

    async def several(self, more: int = 3) -> None:
        """Until it has been through ``more`` further rounds."""
        wanted = self.rounds + more
        async with self.went_on:
            await self.went_on.wait_for(lambda: self.rounds >= wanted)


@contextlib.asynccontextmanager
async def undisturbed(target: Target) -> AsyncIterator[Bystander]:
    """Meanwhile somebody else talks to a process of his and asks for things, over and over."""
    bystander = Bystander()
    async with (
        await connect(target) as client,
        executing(client, target.box, "cat", stdio=PIPES) as echo,
        asyncio.TaskGroup() as tasks,
    ):

        async def work() -> None:
            stdin, stdout = echo.input, echo.outputs[0]
            assert stdin is not None
            while True:
                line = b"round %d\n" % bystander.rounds
                async with asyncio.timeout(ROUND_SECONDS * target.pace):
                    await stdin.write(line)
                    await expect(stdout, line)
                    await client.ping()
                    assert (await client.container_state(target.box)).container == target.box
                async with bystander.went_on:
                    bystander.rounds += 1
                    bystander.went_on.notify_all()
                await asyncio.sleep(0.01)

        task = tasks.create_task(work())
        await bystander.several(1)
        try:
            yield bystander
            await bystander.several()
        finally:
            task.cancel()
