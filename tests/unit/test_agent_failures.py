"""What the supervisor or the guest runs out of is RESOURCE_EXHAUSTED, whoever says so."""

from __future__ import annotations

import errno

import pytest

from gcsagent.agent.failures import to_rpc_error
from gcsagent.agent.runtime import RuntimeMissing
from gcsagent.agent.supervisor_client import SupervisorError
from protocol.errors import Code

RUN_OUT = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC)


def raised(number: int) -> list[Exception]:
    """Every way an errno gets here."""
    return [
        OSError(number, "of the agent's own"),
        SupervisorError("hold: of the supervisor's", number),
        RuntimeMissing("create", number, "runc cannot be started"),
    ]


@pytest.mark.parametrize("error", [error for number in RUN_OUT for error in raised(number)], ids=repr)
def test_what_has_run_out_is_told_from_what_is_broken(error: Exception) -> None:
    found = to_rpc_error(error)
    assert found.code is Code.RESOURCE_EXHAUSTED
    assert found.details["errno"] in RUN_OUT


@pytest.mark.parametrize("error", raised(errno.EACCES), ids=repr)
def test_what_is_broken_is_told_from_what_has_run_out(error: Exception) -> None:
    assert to_rpc_error(error).code in (Code.INTERNAL, Code.UNAVAILABLE)
