"""What hosts do all day, side by side, each thing checked to the byte; one round of each is a warm-up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Callable

from gcsagent.host.client import Client
from gcsagent.host.dialogue import greet
from gcsagent.host.errors import HostError
from protocol.address import parse_dial
from protocol.errors import RpcError
from protocol.families.forward import OpenForward
from protocol.types import Reason
from tests.cases import pattern
from tests.cases.data import digest_of
from tests.cases.files import get, put, tar
from tests.cases.forwards import ECHO, ask_echo, forwarding, serving
from tests.cases.target import MIB, OUTPUT, PIPES, Target, connect, executing, expect, run, running, terminal

Work = Callable[[Target, Client, random.Random], Awaitable[None]]


async def runs(target: Target, client: Client, dice: random.Random) -> None:
    """A container from its beginning to its end."""
    size, code = dice.randrange(1, MIB), dice.randrange(200)
    command = pattern.command(f"write(1, 31, {size})\nsys.exit({code})")
    async with running(target, client, *command, stdio=OUTPUT) as init:
        async with asyncio.TaskGroup() as tasks:
            out = tasks.create_task(digest_of(init.streams["stdout"]))
            record = await init.wait()
            init.streams["stdout"].finish_at(record.streams["stdout"])
        assert (record.exit_code, record.streams["stdout"]) == (code, size), record
        assert out.result() == (size, pattern.digest(31, size))


async def execs(target: Target, client: Client, dice: random.Random) -> None:
    word, code = str(dice.random()), dice.randrange(200)
    stdio = terminal() if dice.random() < 0.3 else OUTPUT
    done = await run(client, target.box, "sh", "-c", f"echo {word}; exit {code}", stdio=stdio)
    assert (done.stdout.strip().decode(), done.exit.exit_code) == (word, code), done


async def kills(target: Target, client: Client, dice: random.Random) -> None:
    """A process, or a container, that would go on for ever."""
    if dice.random() < 0.3:
        async with running(target, client) as init:
            await client.kill_container(init.container, "SIGKILL")
            record = await client.wait_container(init.container)
    else:
        async with executing(client, target.box, "sleep", "100000") as process:
            await client.kill_process(target.box, process.process, "SIGKILL")
            record = await process.wait()
    assert (record.signal, record.reason) == (9, Reason.SIGNALLED), record


async def attaches(target: Target, client: Client, dice: random.Random) -> None:
    """To one process, again and again."""
    async with executing(client, target.box, "cat", stdio=PIPES) as cat:
        stdin, stdout = cat.streams["stdin"], cat.streams["stdout"]
        for number in range(dice.randrange(1, 6)):
            await stdin.write(b"line %d\n" % number)
            await expect(stdout, b"line %d\n" % number)
            stdout.close()
            stdout = await client.attach(target.box, cat.process, take=True)
        stdout.close()


async def stalls(target: Target, client: Client, dice: random.Random) -> None:
    """A reader that takes its time: what was held up comes in the end."""
    size = dice.randrange(MIB, 4 * MIB)
    async with executing(client, target.box, *pattern.command(f"write(1, 32, {size})")) as process:
        await asyncio.sleep(dice.random() * 3)  # the stall itself: nothing is waited for
        async with asyncio.TaskGroup() as tasks:
            out = tasks.create_task(digest_of(process.streams["stdout"]))
            assert (await process.wait()).streams["stdout"] == size
        assert out.result() == (size, pattern.digest(32, size))


async def disconnects(target: Target, client: Client, dice: random.Random) -> None:
    """Hosts that vanish: in the middle of a request, of a wait, of a stream."""
    async with executing(client, target.box, "cat", stdio=PIPES) as cat:
        for _ in range(4):
            with contextlib.suppress(HostError, RpcError, OSError):
                dialogue, _ = await greet(
                    parse_dial(target.address), timeout=10 * target.pace, client_name="gone"
                )
                frame = dialogue.connection.request(
                    9, "process.wait", {"container": target.box, "process": cat.process}
                )
                end = len(frame) if dice.random() < 0.5 else dice.randrange(1, len(frame))
                await asyncio.get_running_loop().sock_sendall(dialogue.sock, frame[:end])
                dialogue.close()
        await cat.streams["stdin"].write(b"still\n")
        await expect(cat.streams["stdout"], b"still\n")


async def copies(target: Target, client: Client, dice: random.Random) -> None:
    """A file in and out."""
    name, data = f"f{dice.randrange(10)}", dice.randbytes(dice.randrange(1, MIB))
    await put(client, target.box, "/tmp", tar((name, data, {})))
    archive, _ = await get(client, target.box, f"/tmp/{name}")
    assert data in archive
    assert (await run(client, target.box, "rm", f"/tmp/{name}")).exit.exit_code == 0


async def forwards(target: Target, client: Client, dice: random.Random) -> None:
    async with (
        serving(target, client) as server,
        forwarding(client, OpenForward(server.container, ECHO)) as (port, errors),
    ):
        for _ in range(dice.randrange(1, 6)):
            try:
                await ask_echo(port, os.urandom(dice.randrange(1, 200_000)))
            finally:
                assert not errors, errors  # worth more than the reset that they show as


MIX: tuple[Work, ...] = (runs, execs, kills, attaches, stalls, disconnects, copies, forwards)


class Load:
    """``counts`` says how often each has been through."""

    def __init__(self, target: Target, seed: int, at_once: int = len(MIX)) -> None:
        self._target, self._seed, self._turns = target, seed, asyncio.Semaphore(at_once)
        self.counts = {work.__name__: 0 for work in MIX}

    async def once(self) -> None:
        """The warm-up: each of them, one after the other."""
        async with await connect(self._target) as client:
            for work in MIX:
                await work(self._target, client, random.Random(self._seed))

    async def until(self, over: asyncio.Event) -> None:
        """Raises for the first thing that is not as it should be."""
        async with asyncio.TaskGroup() as tasks:
            for number, work in enumerate(MIX):
                tasks.create_task(self._repeat(work, random.Random(self._seed + number), over))

    async def _repeat(self, work: Work, dice: random.Random, over: asyncio.Event) -> None:
        async with await connect(self._target) as client:
            while not over.is_set():
                async with self._turns, asyncio.timeout(120 * self._target.pace):
                    await work(self._target, client, dice)
                self.counts[work.__name__] += 1
