"""Fifos on both tiers: a peer in the guest has the other end, comes late, goes early, comes back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from protocol.errors import Code
from protocol.types import Stdio, StreamMode, StreamSpec, Winsize
from tests.cases.target import Target, case, connect, created, name, refused, run, running

DIRECTORY = "/run"
"""Of the guest: there on both tiers, and in memory."""

TALK = "exec 3>{there}-in 4<{there}-out; echo {word} >&3; read answer <&4; echo peer read $answer"
LATE = """
import os
fd = os.open("{there}-out", os.O_RDONLY | os.O_NONBLOCK)
while data := os.read(fd, 65536):
    os.write(1, data)
"""


def fifo(path: str) -> StreamSpec:
    return StreamSpec(StreamMode.FIFO, path=path)


def peering(spec: dict[str, Any]) -> None:
    """The guest's directory of fifos, in the container."""
    bind = {"destination": "/peer", "type": "bind", "source": DIRECTORY, "options": ["bind", "rw"]}
    spec.setdefault("mounts", []).append(bind)


@contextlib.asynccontextmanager
async def peer(target: Target, client: Client) -> AsyncIterator[RemoteProcess]:
    async with running(target, client, spec=peering, attached=False) as init:
        yield init


async def there(client: Client, container: str, stem: str) -> list[str]:
    """Names of the fifos with this stem, also under a temporary name."""
    listing = await run(client, container, "sh", "-c", "ls -A /peer")
    names = listing.stdout.decode().split()
    return [each for each in names if each.startswith((stem, ".gcs-"))]


@case
async def a_fifo_outlives_its_peers(target: Target) -> None:
    stem = name("fifo")
    stdio = Stdio(fifo(f"{DIRECTORY}/{stem}-in"), fifo(f"{DIRECTORY}/{stem}-out"))
    async with await connect(target) as client, peer(target, client) as box:
        async with running(target, client, "cat", stdio=stdio, attached=False) as init:
            assert sorted(await there(client, box.container, stem)) == [f"{stem}-in", f"{stem}-out"]
            state = (await client.process_state(init.container, "init")).streams["stdout"]
            assert (state.mode, state.path) == (StreamMode.FIFO, f"{DIRECTORY}/{stem}-out")
            for word in ("first", "second"):  # the first peer's leaving has ended nothing
                script = TALK.format(there=f"/peer/{stem}", word=word)
                completed = await run(client, box.container, "sh", "-c", script)
                assert completed.stdout == f"peer read {word}\n".encode(), completed
            with refused(Code.FAILED_PRECONDITION):
                await client.attach(init.container)
            with refused(Code.INVALID_ARGUMENT, field="offset"):
                await client.close_stdin(init.container, "init", 5)
            await client.close_stdin(init.container, "init")
            record = await init.wait()
            assert (record.exit_code, record.streams) == (0, {"stderr": 0})
        assert await there(client, box.container, stem) == []


@case
async def a_late_peer_finds_what_was_written(target: Target) -> None:
    stem = name("fifo")
    stdio = Stdio(stdout=fifo(f"{DIRECTORY}/{stem}-out"))
    async with await connect(target) as client, peer(target, client) as box:
        made = await run(client, box.container, "mkfifo", f"/peer/{stem}-out")
        assert made.exit.exit_code == 0
        async with running(target, client, "echo", "early", stdio=stdio, attached=False) as init:
            assert (await init.wait()).exit_code == 0
            late = await run(client, box.container, "python3", "-c", LATE.format(there=f"/peer/{stem}"))
            assert late.stdout == b"early\n", late
        assert await there(client, box.container, stem) == [f"{stem}-out"], "it was there before"
        await run(client, box.container, "sh", "-c", f"rm /peer/{stem}-out")


@case
async def what_cannot_be_a_fifo_is_refused_and_leaves_nothing(target: Target) -> None:
    stem = name("fifo")
    at = f"{DIRECTORY}/{stem}"
    async with await connect(target) as client, peer(target, client) as box:
        script = (
            f"cd /peer; mkdir {stem}-dir; : >{stem}-file; mkfifo {stem}-real; ln -s {stem}-real {stem}-link"
        )
        assert (await run(client, box.container, "sh", "-c", script)).exit.exit_code == 0
        before = sorted(await there(client, box.container, stem))
        for path, code in (
            (f"{at}-file", Code.INVALID_ARGUMENT),
            (f"{at}-link", Code.INVALID_ARGUMENT),
            (f"{at}-dir", Code.INVALID_ARGUMENT),
            (f"{at}-file/x", Code.INVALID_ARGUMENT),
            (f"{at}-none/x", Code.NOT_FOUND),
            ("relative", Code.INVALID_ARGUMENT),
        ):
            stdio = Stdio(stdin=fifo(f"{at}-made"), stderr=fifo(path))
            with refused(code, field="stdio.stderr.path"):
                async with created(target, client, "true", stdio=stdio, attached=False):
                    pass
        for wrong, code, field in (
            (Stdio(stdin=StreamSpec(StreamMode.FIFO)), Code.INVALID_ARGUMENT, "stdio.stdin.path"),
            (Stdio(stdout=StreamSpec(path=at)), Code.INVALID_ARGUMENT, "stdio.stdout.path"),
            (Stdio(fifo(at), stdin_once=True), Code.INVALID_ARGUMENT, "stdio"),
            (Stdio(tty=fifo(at), terminal=True, winsize=Winsize()), Code.UNIMPLEMENTED, "stdio.tty.mode"),
        ):
            with refused(code, field=field):
                async with created(target, client, "true", stdio=wrong, attached=False):
                    pass
        assert sorted(await there(client, box.container, stem)) == before
        await run(client, box.container, "sh", "-c", f"rm -r /peer/{stem}-*")
