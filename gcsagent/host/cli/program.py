"""Runs one command: from arguments to exit code, every failure on one line."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import traceback

from gcsagent.host.cli import parser
from gcsagent.host.cli.common import complain
from gcsagent.host.cli.several import SomeFailed
from gcsagent.host.errors import HostError
from gcsagent.host.text import printable
from gcsagent.host.vm.errors import BootError, Interrupted, VmError
from protocol.errors import ProtocolError, RpcError

EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127

TELLING = 200
"""Characters of the runtime's words that tell whether a sentence has them already."""

_EXEC_ERRORS = {"not_executable": EXIT_NOT_EXECUTABLE, "not_found": EXIT_NOT_FOUND}


def run(argv: list[str]) -> int:
    """Runs the command of ``argv`` and returns gcsctl's exit code. Raises KeyboardInterrupt."""
    if argv[:1] == [parser.COMPLETE] and len(argv) > 2:
        from gcsagent.host.cli import shells  # with all commands

        print("\n".join(shells.answer(argv[1], argv[2:])))
        return 0
    args = parser.parse(argv)
    try:
        return asyncio.run(_handle(args))
    except Interrupted as interrupted:
        return 128 + interrupted.signum
    except BrokenPipeError:
        # Nobody reads our output any more; Python must not fail on flushing it once again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (HostError, VmError, RpcError, ProtocolError, OSError) as error:
        if os.environ.get("GCS_DEBUG") == "1":
            traceback.print_exc()
        return explain(error, args)


async def _handle(args: argparse.Namespace) -> int:
    code: int = await args.handler(args)
    return code


def explain(error: Exception, args: argparse.Namespace) -> int:
    """Prints the error with what to do about it, and returns the exit code for it."""
    from gcsagent.host.cli.advice import with_advice  # it knows every kind of error there is

    if isinstance(error, SomeFailed):
        return max(explain(each, args) for each in error.errors)
    first, *rest = _lines(error)
    complain(with_advice(first, error, args))
    for line in rest:
        complain(line)
    if isinstance(error, RpcError):
        return _EXEC_ERRORS.get(str(error.details.get("exec_error")), parser.EXIT_GCSCTL)
    return parser.EXIT_GCSCTL


def _lines(error: Exception) -> list[str]:
    if isinstance(error, BootError):
        return error.report().splitlines()
    if isinstance(error, RpcError):
        return [_rpc_line(error)]
    if isinstance(error, OSError) and error.strerror:
        return [f"{error.filename}: {error.strerror}" if error.filename else error.strerror]
    return [str(error)]


def _rpc_line(error: RpcError) -> str:
    """With the runtime's own words, unless the sentence has them already: on one line, perhaps cut off."""
    runtime = error.details.get("runtime_error")
    words = " ".join(runtime.split()) if isinstance(runtime, str) else ""
    if words and words[:TELLING] not in " ".join(error.message.split()):
        return f"{error.message}: {printable(words)}"
    return error.message
