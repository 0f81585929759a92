"""How one boot of a guest goes, by what its console shows, until it is ready or has failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from gcsagent.host.vm.console import ConsoleMonitor, sanitize
from gcsagent.host.vm.diagnosis import Circumstances, evidence, explain
from gcsagent.host.vm.errors import BootError

# What explains a failure comes behind it: a panic's trace, the power-off.
_AFTERMATH_SECONDS = 2.0

# The kernel says nothing by itself before it starts init, unless something is wrong.
_SILENCE_HINT = "; --append earlyprintk=ttyS0 shows how far the kernel comes"

OnStage = Callable[[str, Mapping[str, float]], None]


class Boot:
    """Feed `console`; then `finished`, or `fail` for what it cannot show."""

    def __init__(self, circumstances: Circumstances, on_stage: OnStage) -> None:
        """`on_stage` is told what the guest reports of its boot, and the stages until then."""
        self.console = ConsoleMonitor(self._on_line)
        self._circumstances = circumstances
        self._on_stage = on_stage
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._failing = False

    def happened_elsewhere(self) -> None:
        """It was booted by another QEMU."""
        self._done.set_result(None)

    async def finished(self, timeout: float, silence: float | None) -> None:
        """Returns when the guest is ready.

        Args:
            timeout: seconds until it must be ready.
            silence: seconds until it must have written something to its console, if that matters.

        Raises:
            BootError: it failed, died, or took too long.
        """
        if silence is not None:
            self._loop.call_later(silence, self._fail_if_silent, silence)
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self._done)
        except TimeoutError:
            hint = "" if self.console.bytes_seen else _SILENCE_HINT
            raise self.error(f"not ready within {timeout:g} s{hint}") from None

    def error(self, reason: str, *, explained: bool = False) -> BootError:
        """The error for a guest that did not come up, noticed by ``reason``.

        Args:
            explained: `reason` says it all; what the console shows is not looked for another.
        """
        console = self.console
        if not explained:
            reason = explain(console, reason, self._circumstances)
        silent = console.bytes_seen == 0
        return BootError(console.last_stage, sanitize(reason), evidence(console), silent=silent)

    def fail(self, reason: str) -> None:
        """It has failed, unless that is known already, or it was ready before."""
        if not self._done.done():
            self._done.set_exception(self.error(reason))
            # Nobody may be waiting for the boot; the exit record says it all.
            self._done.exception()

    def _on_line(self, line: str) -> None:
        if self._done.done():
            return
        if self.console.ready:
            self._done.set_result(None)
        elif self.console.failure is not None:
            failure = self.console.failure
            self._fail_soon(f"stage '{failure.stage}' failed: {failure.reason}")
        elif self.console.panic is not None:
            self._fail_soon(self.console.panic.message)
        if "gcs-boot: " in line:
            self._on_stage(line.partition("gcs-boot: ")[2], self.console.stages)

    def _fail_soon(self, reason: str) -> None:
        # QEMU's exit cuts this short.
        if not self._failing:
            self._failing = True
            self._loop.call_later(_AFTERMATH_SECONDS, self.fail, reason)

    def _fail_if_silent(self, seconds: float) -> None:
        if self.console.bytes_seen == 0:
            self.fail(f"no output at all within {seconds:g} s")
