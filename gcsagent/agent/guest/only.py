"""Who may change the machine: only an agent whose own it is."""

from __future__ import annotations

from protocol.errors import Code, RpcError


def refuse_outside(guest: bool, what: str) -> None:
    """Raises FAILED_PRECONDITION unless this is a guest; ``what`` must not be done to anybody's machine."""
    if not guest:
        raise RpcError(
            Code.FAILED_PRECONDITION,
            f"this agent does not run as a guest's (gcsagent --guest): it does not {what} of this machine",
        )
