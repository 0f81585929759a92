"""Fifos on both tiers: a peer in the guest has the other end, comes late, goes early, comes back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from protocol.errors import Code
from protocol.types import Stdio, StreamMode, StreamSpec, Winsize
from tests.cases.target import (
    OUTPUT,
    STREAM,
    Target,
    case,
    connect,
    created,
    expect,
    name,
    refused,
    run,
    running,
    terminal,
)

LOCATION = "io.microsoft.bmc.logging.pipelocation"
SIDE_CAR = "io.microsoft.bmc.logging.isLoggingSideCarContainer"

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


def annotated(*, side_car: bool, location: str) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        spec["annotations"] = {LOCATION: location, SIDE_CAR: "true"} if side_car else {LOCATION: location}

    return change


READS = "cat <&4 >&2 & exec cat <&3"
"""Each pipe to the side-car's own output of the same kind."""


async def said(init: RemoteProcess, word: str) -> None:
    """The side-car has read what the workload said."""
    await expect(init.streams["stdout"], b"out %s\n" % word.encode())
    await expect(init.streams["stderr"], b"err %s\n" % word.encode())


@case
async def a_side_car_reads_what_the_workload_writes(target: Target) -> None:
    stem = name("log")
    for location in (stem, f"{DIRECTORY}/{stem}"):
        side_car, workload = (annotated(side_car=is_it, location=location) for is_it in (True, False))
        script = "while read word; do echo out $word; echo err $word >&2; done"
        async with (
            await connect(target) as client,
            peer(target, client) as box,
            running(target, client, "sh", "-c", script, spec=workload, stdio=Stdio(stdin=STREAM)) as writer,
        ):
            await writer.streams["stdin"].write(b"early\n")
            async with running(target, client, "sh", "-c", READS, spec=side_car, stdio=OUTPUT) as reader:
                await said(reader, "early")
                await writer.streams["stdin"].write(b"now\n")
                await said(reader, "now")
            await writer.streams["stdin"].write(b"between\n")  # while no side-car is there
            async with running(target, client, "sh", "-c", READS, spec=side_car, stdio=OUTPUT) as reader:
                await said(reader, "between")
                if location != stem:
                    pipes = [f"{stem}-stderr", f"{stem}-stdout"]
                    assert sorted(await there(client, box.container, stem)) == pipes
                await writer.kill("SIGKILL")
                await writer.wait()
                await client.delete_container(writer.container)
                async with running(
                    target,
                    client,
                    "sh",
                    "-c",
                    "echo out next; echo err next >&2",
                    spec=workload,
                    attached=False,
                ):
                    await said(reader, "next")
            assert await there(client, box.container, stem) == []


@case
async def annotations_that_contradict_are_refused(target: Target) -> None:
    where, what = f"spec.annotations[{LOCATION}]", f"spec.annotations[{SIDE_CAR}]"
    wrong: list[tuple[dict[str, Any], Stdio, Code, str]] = [
        ({LOCATION: "x"}, terminal(), Code.INVALID_ARGUMENT, where),
        ({LOCATION: "x", SIDE_CAR: "true"}, terminal(), Code.INVALID_ARGUMENT, where),
        ({LOCATION: "x"}, OUTPUT, Code.INVALID_ARGUMENT, where),
        ({SIDE_CAR: "true"}, Stdio(), Code.INVALID_ARGUMENT, what),
        ({LOCATION: "x", SIDE_CAR: "maybe"}, Stdio(), Code.INVALID_ARGUMENT, what),
        ({LOCATION: f"{DIRECTORY}/../etc/x"}, Stdio(), Code.INVALID_ARGUMENT, where),
        ({LOCATION: "some/x"}, Stdio(), Code.INVALID_ARGUMENT, where),
        ({LOCATION: f"{DIRECTORY}/.."}, Stdio(), Code.INVALID_ARGUMENT, where),
        ({LOCATION: f"{DIRECTORY}/-x"}, Stdio(), Code.INVALID_ARGUMENT, where),
        ({LOCATION: f"{DIRECTORY}/{name('none')}/x"}, Stdio(), Code.NOT_FOUND, where),
    ]
    async with await connect(target) as client:
        for annotations, stdio, code, field in wrong:

            def change(spec: dict[str, Any], annotations: dict[str, Any] = annotations) -> None:
                spec["annotations"] = annotations

            with refused(code, field=field):
                async with created(target, client, "true", spec=change, stdio=stdio, attached=False):
                    pass


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
