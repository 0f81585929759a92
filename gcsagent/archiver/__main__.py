"""``python3 -m gcsagent.archiver JOB``, or ``--sweep`` after one that was killed."""

from __future__ import annotations

import os
import resource
import socket
import sys

from gcsagent.archiver.job import CONNECTION_FD, Job
from gcsagent.archiver.peer import Gone, Peer
from gcsagent.archiver.work import carry_out, sweep
from protocol.errors import Code, RemoteProtocolError, RpcError
from protocol.schema import to_wire

DESCRIPTORS = 4096
"""More than the deepest tree takes."""


def main(arguments: list[str]) -> int:
    os.umask(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if arguments == ["--sweep"]:
        sweep()
        return 0
    job = Job.from_text(arguments[0])
    peer = Peer(socket.socket(fileno=CONNECTION_FD), job.msgid, job.seconds)
    try:
        serve(job, peer)
    except Gone as gone:
        print(gone, file=sys.stderr)
    return 0


def serve(job: Job, peer: Peer) -> None:
    """Raises Gone."""
    try:
        result, failure = to_wire(carry_out(job, peer)), None
    except RpcError as error:
        result, failure = None, error
    except RemoteProtocolError as error:
        peer.farewell(error)
        return
    except MemoryError:
        result, failure = None, RpcError(Code.RESOURCE_EXHAUSTED, "the guest has no memory for this archive")
    except OSError as error:
        result = None
        failure = RpcError(Code.INTERNAL, f"in the guest: {error}", errno=error.errno or 0)
    peer.answer(result, failure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
