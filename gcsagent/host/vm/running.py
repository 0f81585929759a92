"""A VM for as long as something is done in it, and the signals that end it before."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from gcsagent.host.signalling import handled
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.errors import Interrupted, VmError
from gcsagent.host.vm.launcher import Progress, VirtualMachine

T = TypeVar("T")

# After the caller's work is done a guest has nothing left to save: its disks are read-only.
_POWERDOWN_SECONDS = 15.0

_LAST_GASP_SECONDS = 1.0


async def run_in_vm(
    config: VmConfig, body: Callable[[VirtualMachine], Awaitable[T]], *, progress: Progress | None = None
) -> T:
    """Boots a VM, runs `body` with it, powers it off, and returns what `body` returned.

    Raises:
        VmError: the VM did not boot, or ended while `body` ran (which is then cancelled).
        Interrupted: SIGTERM or SIGHUP came; the VM is gone by then.
    """
    with ending_on_signals():
        async with await VirtualMachine.launch(config, progress=progress) as vm:
            result = await _unless_it_ends(vm, body)
            await vm.powerdown(_POWERDOWN_SECONDS)
            return result


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into an orderly end of the current task, so that clean-up runs.

    Raises:
        Interrupted: one of them came.
    """
    task = asyncio.current_task()
    assert task is not None
    received: list[int] = []

    def on_signal(signum: int) -> None:
        received.append(signum)
        task.cancel()

    try:
        with handled((signal.SIGTERM, signal.SIGHUP), on_signal):
            yield
    except asyncio.CancelledError:
        if not received:
            raise
        raise Interrupted(received[0]) from None


async def _unless_it_ends(vm: VirtualMachine, body: Callable[[VirtualMachine], Awaitable[T]]) -> T:
    working = asyncio.ensure_future(body(vm))
    ending = asyncio.create_task(vm.wait())
    try:
        await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
        failed = working.done() and working.exception() is not None
        if failed:
            # A dying VM breaks the connection before QEMU has exited: its end explains the failure better.
            await asyncio.wait((ending,), timeout=_LAST_GASP_SECONDS)
        if working.done() and not (failed and ending.done()):
            return working.result()
        raise VmError(f"the VM ended while in use: {ending.result().reason}")
    finally:
        for task in (working, ending):
            task.cancel()
        await asyncio.gather(working, ending, return_exceptions=True)
