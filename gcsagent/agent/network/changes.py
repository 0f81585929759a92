"""One request's changes: carried out step by step, and taken back in reverse when one fails.

What fails is told with the field it came from and the step in the tool's words; where taking back does not
succeed either, with what is left.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable

from gcsagent.agent.failures import tool_failed
from gcsagent.agent.network.plan import Step
from gcsagent.agent.network.tools import Namespace, ToolFailed, Tools
from protocol.dataclass import dataclass
from protocol.errors import Code, RpcError

UNDO_SECONDS = 10.0
"""What one tool may take to take something back: within CLEANUP_SECONDS."""

_log = logging.getLogger("agent.network")


@dataclass(frozen=True, slots=True)
class _Line:
    """Taken back by ``ip``, together with its neighbours of the same place."""

    what: str
    namespace: Namespace
    other: Namespace


@dataclass(frozen=True, slots=True)
class _Act:
    what: str
    take_back: Callable[[], Awaitable[None]]


class Changes:
    def __init__(self, tools: Tools, guest: Namespace) -> None:
        self.tools, self._guest = tools, guest
        self.done: list[str] = []
        self._undo: list[_Line | _Act] = []

    async def ip(
        self, namespace: Namespace, steps: list[Step], timeout: float, other: Namespace | None = None
    ) -> None:
        """Carries the steps out. Raises RpcError that names the field of the one that failed."""
        if not steps:
            return
        other, begun = other or self._guest, len(steps)
        try:
            await self.tools.batch(namespace, [step.do for step in steps], timeout, other)
        except ToolFailed as failure:
            begun = failure.line - 1 if failure.line else len(steps)
            raise refusal(failure, steps[min(begun, len(steps) - 1)]) from failure
        finally:  # cancelled, it may have come anywhere
            self.done += [step.do for step in steps[:begun]]
            self._undo += [_Line(step.undo, namespace, other) for step in steps[:begun] if step.undo]

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

        async def back() -> None:
            await self.tools.change(namespace, undo, UNDO_SECONDS, undo_data)

        line = " ".join(argv)
        self._undo.append(_Act(" ".join(undo), back))
        try:
            await self.tools.change(namespace, argv, timeout, data)
        except ToolFailed as failure:
            raise refusal(failure, Step(line, "", field)) from failure
        self.done.append(line)

    def later(self, namespace: Namespace, line: str) -> None:
        """What takes back something that has been done in another namespace; OTHER is the guest's."""
        self._undo.append(_Line(line, namespace, self._guest))

    def note(self, what: str, undo: Callable[[], None]) -> None:
        """Something the agent has done itself, and how it is taken back."""

        async def back() -> None:
            undo()

        self.done.append(what)
        self._undo.append(_Act(what, back))

    async def undo(self) -> list[str]:
        """Takes everything back, as far as it goes; returns what could not be."""
        left: list[str] = []
        backwards, self._undo = self._undo[::-1], []
        for place, neighbours in itertools.groupby(backwards, _place):
            group = list(neighbours)
            try:
                left += await (self._take_back(group) if place is not None else _each(group))
            except (RpcError, OSError) as error:
                left.append(str(error))
        if left:
            _log.warning("changes of a network cannot be taken back", extra={"steps": left})
        return left

    async def _take_back(self, lines: list[_Line | _Act]) -> list[str]:
        """Lines of one place, by one program."""
        first = lines[0]
        assert isinstance(first, _Line)
        try:
            await self.tools.batch(
                first.namespace, [each.what for each in lines], UNDO_SECONDS, first.other, force=True
            )
        except ToolFailed as failure:
            numbers = failure.lines or range(1, len(lines) + 1)
            return [lines[number - 1].what for number in numbers if number <= len(lines)]
        return []


async def _each(group: Iterable[_Line | _Act]) -> list[str]:
    left = []
    for each in group:
        assert isinstance(each, _Act)
        try:
            await each.take_back()
        except (ToolFailed, RpcError, OSError):
            left.append(each.what)
    return left


def _place(each: _Line | _Act) -> tuple[int, int] | None:
    return (each.namespace.fd, each.other.fd) if isinstance(each, _Line) else None


def refusal(failure: ToolFailed, step: Step) -> RpcError:
    code = Code.FAILED_PRECONDITION
    if failure.outcome.timed_out:
        code = Code.DEADLINE_EXCEEDED
    elif "not permitted" in failure.reason.lower():
        code = Code.PERMISSION_DENIED
    said = f"{step.field}: `{failure.program}` could not carry out `{step.do}`: {failure.reason}"
    return tool_failed(failure.outcome, said, code, field=step.field, step=step.do)
