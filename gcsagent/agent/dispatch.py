"""Runs a request's handler: in line, or as a task with a deadline; the same request only once.

A ``request_id`` makes a mutating request repeatable: while the first one runs, a second with the same
arguments joins it; afterwards it gets the stored answer. With other arguments it is ALREADY_EXISTS.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import msgpack

from gcsagent.agent.call import Call
from gcsagent.agent.failures import given_up, to_rpc_error
from gcsagent.agent.journal import UNDONE, Entry, Journal, RequestMark
from gcsagent.agent.later import Handler, Unloaded
from gcsagent.agent.quiet import Quiet
from gcsagent.agent.runtime import RuntimeFailure
from gcsagent.agent.supervisor_client import SupervisorError
from gcsagent.agent.takeover import Opener
from gcsagent.agent.turns import ASKED_BY
from protocol.errors import Code, RpcError
from protocol.method import Envelope
from protocol.methods import METHODS

Answer = Callable[[Any], None]

CO_COROUTINE = 0x80
"""inspect's, without importing that."""


class Dispatcher:
    def __init__(
        self,
        table: Mapping[str, Handler | Unloaded],
        journal: Journal,
        stopping: Callable[[], bool],
        openers: dict[str, Opener] | None = None,
        quiet: Quiet | None = None,
    ) -> None:
        """While ``stopping`` says so, nothing is begun that would outlive its end. ``openers`` are of the
        methods that turn their connection into a stream."""
        self._quiet = quiet or Quiet()
        self._openers = openers or {}
        self._table, self._journal, self._stopping = table, journal, stopping
        self._handlers: dict[str, tuple[Handler, bool]] = {}

    def run(self, call: Call, raw: dict[str, Any], params: Any, envelope: Envelope, answer: Answer) -> None:
        """Calls ``answer`` once with the result or the RpcError, now or later."""
        mutating = METHODS[call.method].mutating
        if mutating and call.method != "agent.shutdown" and self._stopping():
            answer(_going_down())
        elif envelope.request_id is not None and mutating:
            self._run_once(call, raw, params, envelope.request_id, answer)
        else:
            self._run(call, params, answer)

    def open(self, call: Call, params: Any, answer: Answer) -> None:
        """Calls ``answer`` once with the Takeover or the RpcError, now or later."""
        if self._stopping():
            answer(_going_down())
            return
        opener = self._openers[call.method]

        async def handler(params: Any, _call: Call) -> Any:
            return await opener(params)

        self._begin(call, handler, params, answer)

    def _run(self, call: Call, params: Any, answer: Answer) -> None:
        try:
            handler, inline = self._handlers.get(call.method) or self._load(call.method)
        except RpcError as error:
            answer(error)
            return
        if METHODS[call.method].mutating:
            refusal = self._quiet.refusal(call.method)
            if refusal is not None:
                answer(refusal)
                return
            answer = self._quiet.counted(call.method, answer)
        if inline:
            try:
                result = handler(params, call)
            except Exception as error:
                result = self._failed(call, error)
            answer(result)
            return
        self._begin(call, handler, params, answer)

    def _load(self, method: str) -> tuple[Handler, bool]:
        """The handler, and whether it answers at once. Raises RpcError when it cannot be loaded now."""
        handler = self._table[method]
        if isinstance(handler, Unloaded):
            handler = handler.load()
        code = getattr(handler, "__code__", None)  # a method has its function's
        found = self._handlers[method] = handler, not (code is not None and code.co_flags & CO_COROUTINE)
        return found

    def _begin(self, call: Call, handler: Handler, params: Any, answer: Answer) -> None:
        call.task = asyncio.get_running_loop().create_task(self._run_task(call, handler, params, answer))
        call.task.add_done_callback(functools.partial(_answer_unbegun, call, answer))
        call.arm()

    async def _run_task(self, call: Call, handler: Handler, params: Any, answer: Answer) -> None:
        ASKED_BY.set(call.asked_by)
        try:
            if call.before is not None:
                await call.before()
            result = await handler(params, call)
        except asyncio.CancelledError as cancelled:
            if call.aborted is None:
                raise
            result = given_up(call.aborted, cancelled)
        except Exception as error:
            # Undoing a call that was aborted may end in an error of its own; the caller asked to abort.
            result = call.aborted or self._failed(call, error)
        finally:
            call.disarm()
        answer(result)

    def _failed(self, call: Call, error: Exception) -> RpcError:
        rpc_error = to_rpc_error(error)
        if not isinstance(error, (RpcError, RuntimeFailure, SupervisorError, OSError)):
            call.log.error("a fault in the agent", exc_info=error)  # the traceback is for us
        elif rpc_error.code is Code.INTERNAL:
            call.log.error("request failed", extra={"error": rpc_error.message, **rpc_error.details})
        else:
            call.log.debug("request refused", extra={"error": str(rpc_error)})
        return rpc_error

    def _run_once(self, call: Call, raw: dict[str, Any], params: Any, ident: str, answer: Answer) -> None:
        mark = RequestMark(ident, _digest(call.method, raw))
        entry = self._journal.find(ident)
        if entry is not None and entry.digest != mark.digest:
            answer(RpcError(Code.ALREADY_EXISTS, f"request_id {ident!r} was used for another request"))
            return
        if entry is None or (entry.begun and not self._journal.pending(ident)):
            call.mark, call.begun_before = mark, entry is not None
            entry = self._journal.begin(mark)
            entry.future.add_done_callback(lambda future: answer(future.result()))
            self._run(call, params, lambda result: self._journal.finish(mark, result))
        else:
            self._join(call, entry, answer, lambda: self._run_once(call, raw, params, ident, answer))

    def _join(self, call: Call, entry: Entry, answer: Answer, run: Callable[[], None]) -> None:
        """Waits for the answer to the request that came first, within this one's own deadline."""

        async def wait(_params: Any, _call: Call) -> Any:
            return await asyncio.shield(entry.future)

        def joined(result: Any) -> None:
            if result is UNDONE:  # an agent was killed over it: now it is done for real
                run()
            else:
                answer(result)

        self._begin(call, wait, None, joined)


def _answer_unbegun(call: Call, answer: Answer, task: asyncio.Task[Any]) -> None:
    """asyncio does not even begin a task that is cancelled before its first turn: a request with its cancel
    right behind it."""
    if task.cancelled() and call.aborted is not None:
        call.disarm()
        answer(call.aborted)


def _going_down() -> RpcError:
    return RpcError(Code.UNAVAILABLE, "the agent is going down: its containers are being stopped")


def _digest(method: str, raw: dict[str, Any]) -> str:
    """Of what is asked, not of how long the caller will wait for it."""
    asked = {key: raw[key] for key in raw if key not in ("deadline_ms", "request_id")}
    return hashlib.sha256(method.encode() + b"\0" + msgpack.packb(_in_order(asked))).hexdigest()


def _in_order(value: Any) -> Any:
    """With the keys of each map sorted: in some languages a map has another order each time it is sent."""
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(item) for item in value] if isinstance(value, list) else value
