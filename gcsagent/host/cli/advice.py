"""What to do next, for each way a command can fail: said behind the error, in brackets, on its one line."""

from __future__ import annotations

import argparse
import errno

from gcsagent.host.archive import ArchiveBroken
from gcsagent.host.cli.common import UsageError
from gcsagent.host.copy import CannotCopy
from gcsagent.host.errors import (
    AgentSilent,
    ConnectFailed,
    ConnectionLost,
    HandshakeFailed,
    HostError,
    OutputTruncated,
)
from gcsagent.host.image.errors import Damaged, ImageError, Unsupported
from gcsagent.host.upgrade import RolledBack
from gcsagent.host.vm.errors import (
    BootError,
    DiskError,
    InvalidVmConfig,
    LaunchError,
    QmpError,
    SnapshotError,
    ToolMissing,
    UnsuitableTool,
    VmError,
    VmExists,
    VmNotFound,
    VmNotRunning,
)
from protocol.errors import Code, ProtocolError, RpcError

_LISTS = {"storage": "`gcsctl storage ls`", "checkpoint": "`gcsctl checkpoint ls`", "vm": "`gcsctl vm ls`"}
_DEFAULT_LIST = "`gcsctl ps`"

_BY_CODE = {
    Code.NOT_FOUND: "{lists} lists what there is",
    Code.ALREADY_EXISTS: "choose another name; {lists} lists those in use",
    Code.INVALID_ARGUMENT: "`{command} --help` says what it takes",
    Code.FAILED_PRECONDITION: "{lists} shows how things stand",
    Code.DEADLINE_EXCEEDED: "try again; `gcsctl stacks` shows what the agent is doing",
    Code.CANCELLED: "nothing was changed: try again",
    Code.RESOURCE_EXHAUSTED: "`gcsctl info` shows the limits; delete what has ended, or try again later",
    Code.PERMISSION_DENIED: "the guest's configuration or kernel decides that: `gcsctl agent-logs --tail 20`",
    Code.UNAVAILABLE: "try again; `gcsctl agent-logs --tail 20` has more",
    Code.UNIMPLEMENTED: "`gcsctl info` shows what runs in the guest; `gcsctl upgrade` replaces an old agent",
    Code.INTERNAL: "`gcsctl agent-logs --tail 20` has more",
}

_NOT_THERE = "that counts in the guest, not on this host; `{command} --help` says what it takes"
"""What a request's field names, a path, a user, a device; the container itself was found."""

_BY_EXEC_ERROR = {
    "not_found": "the path counts from the container's root directory, a bare name by its PATH",
    "not_executable": "see its mode, its `#!` line and for which machine it was built",
}

_BY_TYPE: tuple[tuple[type[BaseException], str], ...] = (
    (UsageError, ""),  # says what to give
    (AgentSilent, _BY_CODE[Code.DEADLINE_EXCEEDED]),
    (HandshakeFailed, "give the VMM's vsock socket as hvsock:PATH, an agent's own as unix:PATH"),
    (ConnectFailed, "see that the agent runs: `gcsctl vm ls`, `gcsctl vm console NAME`, or its own log"),
    (ConnectionLost, "try again: an agent that was restarted has what it had"),
    (OutputTruncated, "`gcsctl logs` has the whole output of what was run with --log"),
    (RolledBack, "`gcsctl agent-logs --tail 50` has what the new code said"),
    (ArchiveBroken, "copy it again"),
    (CannotCopy, "`gcsctl cp --help` has the rules"),
    (Damaged, "get the image anew; `skopeo copy` checks it on the way"),
    (Unsupported, "`skopeo copy` converts images, and chooses a platform's"),
    (ImageError, ""),  # says what to do
    (ProtocolError, "see that the address is an agent's, and that agent and gcsctl are of one version"),
    (VmNotFound, "`gcsctl vm start` makes one"),
    (VmNotRunning, "`gcsctl vm console` shows what it said, `gcsctl vm start` starts it anew"),
    (VmExists, "`gcsctl vm ls` lists them"),
    (InvalidVmConfig, "`gcsctl vm start --help` says what it takes"),
    (ToolMissing, "`make tools image` fetches and builds what is missing"),
    (UnsuitableTool, "`make tools` fetches one that is suitable"),
    (DiskError, "give a directory, or an image of ext4, XFS, EROFS or squashfs"),
    (SnapshotError, "`gcsctl vm snapshot ls` lists them, `gcsctl vm ls` shows whether the VM runs"),
    (LaunchError, "`gcsctl vm start --accel tcg --vsock vhost-user` needs nothing of this host's kernel"),
    (BootError, "`--append gcs.log_level=debug` makes the guest say more"),
    (QmpError, "`gcsctl vm ls` shows whether the VM still runs"),
    (VmError, "`gcsctl vm ls` and `gcsctl vm console` show how it stands"),
    (HostError, "`gcsctl --help` has examples"),
)

_BY_ERRNO = {
    errno.EACCES: "run it as root, or as the owner",
    errno.EPERM: "run it as root",
    errno.ENOENT: "check the path",
    errno.ENOSPC: "make room there",
    errno.EMFILE: "raise `ulimit -n`",
}


def with_advice(line: str, error: BaseException, args: argparse.Namespace) -> str:
    """``line``, and behind it what to do, unless it names a command itself."""
    advice = "" if "`" in line else _advice(error, args)
    return f"{line} ({advice})" if advice else line


def _advice(error: BaseException, args: argparse.Namespace) -> str:
    if isinstance(error, RpcError) and not isinstance(error, AgentSilent):
        told = _BY_EXEC_ERROR.get(str(error.details.get("exec_error")))
        told = told or _of_code(error).format(lists=_lists(args), command=args.command_name)
        return told.replace("`gcsctl ", f"`gcsctl --vm {args.vm} ") if args.vm else told
    cause = error.__cause__ if isinstance(error, HostError | VmError) else error
    if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM):
        return _BY_ERRNO[cause.errno]
    for kind, advice in _BY_TYPE:
        if isinstance(error, kind):
            return advice
    if isinstance(error, OSError):
        default = "`GCS_DEBUG=1 gcsctl ...` shows where it happened"
        return _BY_ERRNO.get(error.errno or 0, default)
    return ""


def _of_code(error: RpcError) -> str:
    if error.code is Code.NOT_FOUND and ("field" in error.details or "errno" in error.details):
        return _NOT_THERE
    return _BY_CODE[error.code]


def _lists(args: argparse.Namespace) -> str:
    return _LISTS.get(args.command_name.split()[1], _DEFAULT_LIST)
