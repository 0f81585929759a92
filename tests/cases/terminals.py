"""Cases about terminals."""

from __future__ import annotations

import asyncio

from protocol.errors import Code
from protocol.families.stream import StreamName
from protocol.types import Reason, Stdio, Winsize
from tests.cases import pattern
from tests.cases.target import OUTPUT, Target, case, connect, executing, expect, refused, running, terminal

RAW = """
import os, tty
tty.setraw(0)
os.write(1, b"ready")
left = {size}
while left:
    data = os.read(0, 4096)
    left -= len(data)
    while data:
        data = data[os.write(1, data):]
"""


@case
async def stty_size_follows_resize(target: Target) -> None:
    script = "stty size; read x; stty size; read x"
    async with (
        await connect(target) as client,
        executing(client, target.box, "sh", "-c", script, stdio=terminal(30, 100)) as shell,
    ):
        tty = shell.streams["tty"]
        await expect(tty, rb"30 100\r\n")
        await shell.resize(Winsize(51, 122))
        await tty.write(b"\n")
        await expect(tty, rb"51 122\r\n")
        await tty.write(b"\n")
        assert (await shell.wait()).exit_code == 0
        with refused(Code.FAILED_PRECONDITION):
            await shell.resize(Winsize(1, 1))


@case
async def a_resize_reaches_the_foreground_as_sigwinch(target: Target) -> None:
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGWINCH, lambda *_: sys.exit(f'{os.get_terminal_size(0)}'))\n"
        "print('ready', flush=True)\nsignal.pause()"
    )
    async with (
        await connect(target) as client,
        executing(client, target.box, "python3", "-c", script, stdio=terminal()) as shell,
    ):
        await expect(shell.streams["tty"], b"ready")
        await shell.resize(Winsize(7, 77))
        await expect(shell.streams["tty"], rb"columns=77, lines=7\D")
        assert (await shell.wait()).exit_code == 1


@case
async def ctrl_c_arrives(target: Target) -> None:
    async with (
        await connect(target) as client,
        executing(
            client, target.box, "sh", "-c", "echo ready; exec sleep 100000", stdio=terminal()
        ) as sleeper,
    ):
        await expect(sleeper.streams["tty"], b"ready")
        await sleeper.streams["tty"].write(b"\x03")
        record = await sleeper.wait()
        assert (record.signal, record.exit_code) == (2, 130)


@case
async def ctrl_c_arrives_at_init(target: Target) -> None:
    """Pid 1 of a namespace gets only signals it handles."""
    script = "trap 'echo caught; exit 6' INT; echo ready; while :; do read x; done"
    async with (
        await connect(target) as client,
        running(target, client, "bash", "-c", script, stdio=terminal()) as init,
    ):
        await expect(init.streams["tty"], b"ready")
        await init.streams["tty"].write(b"\x03")
        await expect(init.streams["tty"], b"caught")
        assert (await init.wait()).exit_code == 6


@case
async def raw_programs_get_and_give_every_byte(target: Target) -> None:
    """Beyond any buffer of the terminal, with all 256 values, and none of them means anything."""
    data = bytes(range(256)) + pattern.take(7, 0, 256 * 1024)
    command = ("python3", "-I", "-S", "-c", RAW.format(size=len(data)))
    async with (
        await connect(target) as client,
        executing(client, target.box, *command, stdio=terminal()) as program,
    ):
        tty, back = program.streams["tty"], bytearray()
        await expect(tty, b"ready", back)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(tty.write(data))
            while len(back) < len(data):
                piece = await tty.read()
                assert piece, f"the terminal ended after {len(back)} bytes"
                back += piece
        assert back == data
        assert (await program.wait()).exit_code == 0


@case
async def close_stdin_types_the_end_of_file(target: Target) -> None:
    async with (
        await connect(target) as client,
        executing(client, target.box, "cat", stdio=terminal()) as cat,
    ):
        done = await cat.communicate(b"line\n")
        assert (done.stdout, done.exit.exit_code) == (b"line\r\nline\r\n", 0)


@case
async def a_burst_on_a_terminal_is_complete(target: Target) -> None:
    """The kernel hangs a terminal up when its session leader ends: what is in it must come out first."""
    script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; exit 8"
    wanted = b"".join(b"line %d\r\n" % number for number in range(2000))
    async with (
        await connect(target) as client,
        executing(client, target.box, "sh", "-c", script, stdio=terminal()) as shell,
    ):
        done = await shell.communicate()
        assert (done.stdout == wanted, done.exit.exit_code) == (True, 8)


@case
async def stderr_is_a_terminal_too_and_the_only_stream_is_tty(target: Target) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && tty >&2"
    async with (
        await connect(target) as client,
        executing(client, target.box, "sh", "-c", script, stdio=terminal()) as shell,
    ):
        with refused(Code.NOT_FOUND):
            await client.attach(target.box, shell.process, StreamName.STDERR)
        done = await shell.communicate()
        assert (done.stdout, done.stderr, done.exit.exit_code) == (b"/dev/pts/0\r\n", b"", 0)


@case
async def a_terminal_nobody_wants_holds_nobody_up(target: Target) -> None:
    """Mode null: what is written is dropped, however much it is."""
    async with (
        await connect(target) as client,
        executing(
            client,
            target.box,
            *("sh", "-c", "head -c 300000 /dev/zero; test -t 1 && exit 9"),
            stdio=Stdio(terminal=True),
        ) as shell,
    ):
        assert (await shell.wait()).exit_code == 9
        with refused(Code.FAILED_PRECONDITION):
            await client.attach(target.box, shell.process, StreamName.TTY)


@case
async def a_process_without_a_terminal_cannot_be_resized(target: Target) -> None:
    async with (
        await connect(target) as client,
        executing(client, target.box, "sleep", "100000", stdio=OUTPUT) as process,
    ):
        with refused(Code.FAILED_PRECONDITION):
            await process.resize(Winsize(1, 1))


@case
async def a_program_that_closes_its_terminal_before_it_ends_is_not_hung_up(target: Target) -> None:
    """cat closes its descriptors to see whether that fails; its exit status is its own all the same."""
    script = "import os; os.closerange(0, 3); sum(range(300000)); os._exit(7)"
    runs = [(("cat",), 0)] * 5 + [(("python3", "-I", "-S", "-c", script), 7)]
    async with await connect(target) as client:
        for command, code in runs:
            async with executing(client, target.box, *command, stdio=terminal()) as process:
                await process.streams["tty"].write(b"\x04")
                record = await process.wait()
                assert (record.exit_code, record.reason) == (code, Reason.EXITED)
