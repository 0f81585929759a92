"""How a failure inside the agent becomes the one error its caller sees."""

from __future__ import annotations

import asyncio
import errno

from gcsagent.agent.calls import CannotStart, Outcome
from gcsagent.agent.inroot import DEFAULT_PATH, find_program, resolve
from gcsagent.agent.runtime import RuntimeFailure, RuntimeInterrupted, RuntimeMissing
from gcsagent.agent.supervisor_client import SupervisorError
from protocol.errors import Code, RpcError

_FULL = (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EDQUOT, errno.EAGAIN)


_HINTS = {
    errno.ENOENT: "install it in the guest, or name another with gcs.runtime (outside a guest --runtime)",
    errno.EACCES: "make it an executable file",
    errno.ENOEXEC: "it is no program for this machine",
}


def to_rpc_error(error: BaseException) -> RpcError:
    """Typed for what is known, INTERNAL for the rest; the chain is kept by ``raise ... from``."""
    if isinstance(error, RpcError):
        return error
    if isinstance(error, RuntimeMissing):
        return _no_runtime(error)
    if isinstance(error, RuntimeFailure):
        code = Code.DEADLINE_EXCEEDED if error.timed_out else Code.INTERNAL
        details = {"runtime_error": error.runtime_error, "stderr": error.stderr}
        kept = {name: value for name, value in details.items() if value}
        return RpcError(code, f"the runtime failed: {error}", exit_status=error.status, **kept)
    if isinstance(error, SupervisorError):
        code = Code.RESOURCE_EXHAUSTED if error.errno in _FULL else Code.INTERNAL
        return RpcError(code, f"the supervisor refused: {error}", errno=error.errno)
    if isinstance(error, OSError):
        code = Code.RESOURCE_EXHAUSTED if error.errno in _FULL else Code.INTERNAL
        return RpcError(code, f"in the guest: {error}", errno=error.errno or 0)
    return RpcError(Code.INTERNAL, f"a fault in the agent ({type(error).__name__}); its log has the details")


def _no_runtime(error: RuntimeMissing) -> RpcError:
    if error.errno in _FULL:
        return RpcError(Code.RESOURCE_EXHAUSTED, f"{error}; free something in the guest", errno=error.errno)
    hint = f"; {_HINTS[error.errno]}" if error.errno in _HINTS else ""
    return RpcError(Code.UNAVAILABLE, f"{error}{hint}", errno=error.errno)


def not_started(error: CannotStart, said: str) -> RpcError:
    """A tool could not be started, which ``said`` tells the caller."""
    return RpcError(Code.UNAVAILABLE, said, errno=error.errno)


def tool_failed(outcome: Outcome, said: str, code: Code = Code.INTERNAL, **details: str) -> RpcError:
    """A tool ended badly, which ``said`` tells the caller; status and words are in the details."""
    return RpcError(code, said, **details, exit_status=outcome.status, stderr=outcome.stderr)


def given_up(aborted: RpcError, cancelled: asyncio.CancelledError) -> RpcError:
    """The error of a request that was aborted, with what it was then waiting for, if that was the runtime."""
    if not isinstance(cancelled, RuntimeInterrupted):
        return aborted
    words = {"runtime_error": cancelled.runtime_error} if cancelled.runtime_error else {}
    return RpcError(aborted.code, f"{aborted.message}: {cancelled}", **{**aborted.details, **words})


def explain_launch(
    failure: RuntimeFailure, root: str, args: tuple[str, ...], env: list[str], cwd: str
) -> RpcError:
    """A failed create or exec, with the question answered that is asked first: was it the program?

    Looked up rather than read out of the runtime's message, whose words are nobody's contract.
    """
    error = to_rpc_error(failure)
    if isinstance(failure, RuntimeMissing) or failure.timed_out:
        return error
    try:
        if resolve(root, cwd) is None:
            return _because(
                error, Code.NOT_FOUND, f"{cwd}: no such working directory in the container", field="spec.cwd"
            )
        path = next((entry[5:] for entry in reversed(env) if entry.startswith("PATH=")), DEFAULT_PATH)
        verdict = find_program(root, args[0], path, cwd)
    except OSError:
        return error
    if verdict == "not_found":
        return _because(
            error, Code.NOT_FOUND, f"{args[0]}: no such program in the container", exec_error=verdict
        )
    if verdict == "not_executable":
        message = f"{args[0]}: not an executable file in the container"
        return _because(error, Code.PERMISSION_DENIED, message, exec_error=verdict)
    return error


def _because(error: RpcError, code: Code, message: str, **details: str) -> RpcError:
    """``error`` with its cause known; the runtime's own words stay in the details."""
    return RpcError(code, message, **{**error.details, **details})
