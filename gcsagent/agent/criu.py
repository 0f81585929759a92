"""What the agent knows of CRIU: whether it is there, what its log says, what it keeps of a pipe."""

from __future__ import annotations

import os
import re
import shutil
import struct

from gcsagent.agent.calls import Caller, CannotStart
from gcsagent.agent.failures import not_started, to_rpc_error, tool_failed
from gcsagent.agent.runtime import RuntimeFailure, RuntimeMissing
from protocol.errors import Code, RpcError

MAX_LOG = 1 << 20
MAX_ERRORS = 12
MAX_LINE = 300
ASK_SECONDS = 10.0

_ERROR = re.compile(r"(?:^|\) )Error \((\S+)\): (.*)|^Error: (.*)", re.MULTILINE)
_PROBES = ("tun: Unable to create tun", "reported by netlink: Operation not supported", "create a veth pair")
"""What CRIU says on its way while it finds out what the kernel has, to no consequence."""

_MAGIC = struct.pack("<II", 0x54564319, 0x56453709)
"""IMG_COMMON_MAGIC and PIPES_DATA_MAGIC (criu/include/magic.h)."""


_found: dict[str, str] = {}


def present(name: str = "criu") -> bool:
    """Asked at every hello: PATH is gone through only while it is not where it was."""
    where = _found.get(name, "")
    if not (where and os.access(where, os.X_OK)):
        where = _found[name] = shutil.which(name) or ""
    return bool(where)


def require(*programs: str) -> None:
    """Raises FAILED_PRECONDITION naming what is missing."""
    for name in programs:
        if not present(name):
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"the guest has no {name}, which checkpoints need: install it, or build the image with"
                " build-rootfs.sh --with criu",
                missing=name,
            )


async def version(caller: Caller) -> str:
    """CRIU's version, '' if it does not say. Raises CannotStart."""
    fd = os.memfd_create("stdout", os.MFD_CLOEXEC)
    try:
        await caller.run(["criu", "--version"], ASK_SECONDS, fds={1: fd})
        text = os.pread(fd, 4096, 0).decode(errors="replace")
    finally:
        os.close(fd)
    return text.partition("\n")[0].removeprefix("Version:").strip()


async def run(caller: Caller, argv: list[str], timeout: float) -> None:
    """A program that helps. Raises RpcError."""
    try:
        outcome = await caller.run(argv, timeout)
    except CannotStart as error:
        raise not_started(error, str(error)) from error
    if outcome.status != 0:
        reason = (
            "it passed its deadline" if outcome.timed_out else outcome.stderr or f"status {outcome.status}"
        )
        code = Code.DEADLINE_EXCEEDED if outcome.timed_out else Code.INTERNAL
        raise tool_failed(outcome, f"{argv[0]} failed: {reason}", code)


def errors(log: str) -> list[str]:
    """The error lines of a log of CRIU's, without time and place; the first of them is the cause."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            text = file.read(MAX_LOG)
    except OSError:
        return []
    found = (match[2] or match[3] for match in _ERROR.finditer(text))
    return [line[:MAX_LINE] for line in found if not any(probe in line for probe in _PROBES)][:MAX_ERRORS]


def explain(failure: RuntimeFailure, what: str, log: str) -> RpcError:
    """``failure`` with CRIU's own words; what CRIU refuses is the container's state, not our fault."""
    error, said = to_rpc_error(failure), errors(log)
    if not said or failure.timed_out or isinstance(failure, RuntimeMissing):
        return error
    return RpcError(
        Code.FAILED_PRECONDITION, f"CRIU cannot {what}: {said[0]}", **{**error.details, "criu_errors": said}
    )


def pipe_data(images: str, inode: int) -> bytes:
    """What the pipe with this inode held when its reader was saved. Raises OSError or ValueError.

    An entry of pipes-data.img is a length, a message pipe_data_entry (images/pipe-data.proto) of that
    length, and as many bytes as the message says.
    """
    try:
        with open(os.path.join(images, "pipes-data.img"), "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return b""
    if data[:8] != _MAGIC:
        raise ValueError("pipes-data.img is none of CRIU's images")
    at = 8
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        fields = _varints(data[at + 4 : at + 4 + size])
        at += 4 + size
        if fields.get(1) == inode:
            return data[at : at + fields.get(2, 0)]
        at += fields.get(2, 0)
    return b""


def _varints(message: bytes) -> dict[int, int]:
    """The fields of a protobuf message that has only integers."""
    values: list[int] = []
    value = shift = 0
    for byte in message:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            values.append(value)
            value = shift = 0
    return {key >> 3: number for key, number in zip(values[::2], values[1::2], strict=False)}
