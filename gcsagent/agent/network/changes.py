"""One request's changes: carried out step by step, and taken back in reverse when one fails.

What fails is told with the field it came from and the step in the tool's words; where taking back does not
succeed either, with what is left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from gcsagent.agent.network.plan import Step
from gcsagent.agent.network.tools import Namespace, ToolFailed, Tools
from protocol.errors import Code, RpcError

UNDO_SECONDS = 10.0
"""What taking everything back may take: within CLEANUP_SECONDS."""

_log = logging.getLogger("agent.network")


class Changes:
    def __init__(self, tools: Tools, guest: Namespace) -> None:
        self.tools, self._guest = tools, guest
        self.done: list[str] = []
        self._undo: list[tuple[str, Callable[[], Awaitable[None]]]] = []

    async def ip(
        self, namespace: Namespace, steps: list[Step], timeout: float, other: Namespace | None = None
    ) -> None:
        """Carries the steps out. Raises RpcError that names the field of the one that failed."""
        if not steps:
            return
        begun = len(steps)
        try:
            await self.tools.batch(namespace, [step.do for step in steps], timeout, other or self._guest)
        except ToolFailed as failure:
            begun = failure.line - 1 if failure.line else len(steps)
            raise refusal(failure, steps[min(begun, len(steps) - 1)]) from failure
        finally:  # cancelled, it may have come anywhere
            for step in steps[:begun]:
                self.done.append(step.do)
                if step.undo:
                    self._undo.append((step.undo, self._back(namespace, step.undo, other)))

    async def tool(
        self,
        namespace: Namespace,
        argv: list[str],
        field: str,
        timeout: float,
        *,
        data: bytes = b"",
        undo: list[str],
        undo_data: bytes = b"",
    ) -> None:
        """Likewise, one run of another tool."""
        line = " ".join(argv)

        async def back() -> None:
            await self.tools.change(namespace, undo, UNDO_SECONDS, undo_data)

        self._undo.append((" ".join(undo), back))
        try:
            await self.tools.change(namespace, argv, timeout, data)
        except ToolFailed as failure:
            raise refusal(failure, Step(line, "", field)) from failure
        self.done.append(line)

    def later(self, namespace: Namespace, line: str) -> None:
        """What takes back something that has been done in another namespace; OTHER is the guest's."""
        self._undo.append((line, self._back(namespace, line, None)))

    def note(self, what: str, undo: Callable[[], None]) -> None:
        """Something the agent has done itself, and how it is taken back."""

        async def back() -> None:
            undo()

        self.done.append(what)
        self._undo.append((what, back))

    async def undo(self) -> list[str]:
        """Takes everything back, as far as it goes; returns what could not be."""
        left = []
        while self._undo:
            what, back = self._undo.pop()
            try:
                async with asyncio.timeout(UNDO_SECONDS):
                    await back()
            except (ToolFailed, RpcError, OSError, TimeoutError) as error:
                _log.warning("a change cannot be taken back", extra={"step": what, "error": str(error)})
                left.append(what)
        return left

    def _back(
        self, namespace: Namespace, line: str, other: Namespace | None
    ) -> Callable[[], Awaitable[None]]:
        async def back() -> None:
            await self.tools.batch(namespace, [line], UNDO_SECONDS, other or self._guest)

        return back


def refusal(failure: ToolFailed, step: Step) -> RpcError:
    code = Code.FAILED_PRECONDITION
    if failure.timed_out:
        code = Code.DEADLINE_EXCEEDED
    elif "not permitted" in failure.reason.lower():
        code = Code.PERMISSION_DENIED
    return RpcError(
        code,
        f"{step.field}: `{failure.program}` could not carry out `{step.do}`: {failure.reason}",
        field=step.field,
        step=step.do,
        stderr=failure.stderr,
        exit_status=failure.status,
    )
