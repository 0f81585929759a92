"""Forwards as they are written: ``[ADDR:]PORT:ID:PORT``, with the path of a UNIX socket for either port."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from gcsagent.host import forward
from gcsagent.host.client import Client
from gcsagent.host.dialogue import encode_params
from gcsagent.host.errors import HostError
from gcsagent.host.forward import Controls, Forwarder
from protocol.errors import RpcError
from protocol.families.forward import MAX_PORT, OpenForward

_SPEC = re.compile(
    r"(?:(?P<local>[./][^:]*)|(?:(?P<address>\[[^\]]*\]|[^:/\[\]]*):)?(?P<listen>[0-9]{1,5}))"
    r":(?P<container>[^:/]*):(?:(?P<port>[0-9]{1,5})|(?P<path>/.*))"
)
LOCALHOST = "127.0.0.1"


class CannotListen(HostError):
    """Somebody else does, or nobody may."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """``where`` is a local path, or an address and a port."""

    where: str | tuple[str, int]
    target: OpenForward

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """Raises ValueError."""
        match = _SPEC.fullmatch(text)
        if match is None:
            raise ValueError(
                "write [ADDR:]PORT:ID:PORT, with an empty ID for the guest itself, and with the"
                " path of a UNIX socket instead of either port"
            )
        port = None if match["port"] is None else int(match["port"])
        target = OpenForward(match["container"] or None, port, None, match["path"])
        try:
            encode_params("forward.open", target)
        except RpcError as error:
            raise ValueError(error.message) from error
        if match["local"] is not None:
            return cls(match["local"], target)
        listen = int(match["listen"])
        if listen > MAX_PORT:
            raise ValueError(f"a port is a number up to {MAX_PORT}")
        return cls(((match["address"] or LOCALHOST).strip("[]"), listen), target)

    @property
    def to(self) -> str:
        what = self.target.path or str(self.target.port)
        return f"{self.target.container or 'the guest'}:{what}"


Listening = tuple[Wanted, socket.socket]


def shown(listener: socket.socket) -> str:
    """Where it listens, as one writes it."""
    name = listener.getsockname()
    if isinstance(name, str):
        return name
    address, port = name[:2]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@contextlib.contextmanager
def listening(forwards: Sequence[Wanted]) -> Iterator[list[Listening]]:
    """A socket for each, whose path goes at the end of the block. Who connects waits until it is served.

    Raises CannotListen.
    """
    with contextlib.ExitStack() as stack:
        yield [(wanted, _listen(wanted, stack)) for wanted in forwards]


def _listen(wanted: Wanted, stack: contextlib.ExitStack) -> socket.socket:
    where = wanted.where
    try:
        listener = forward.listen(where)
    except OSError as error:
        place = where if isinstance(where, str) else f"{where[0]}:{where[1]}"
        # Without the address, which create_server adds to an errno's words; getaddrinfo's are below 0.
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
        raise CannotListen(f"cannot listen on {place}: {why}") from error
    stack.callback(listener.close)
    if isinstance(where, str):
        stack.callback(_unlink, where, os.stat(where).st_ino)
    return listener


@contextlib.asynccontextmanager
async def serving(
    client: Client, sockets: Sequence[Listening], reporter: Callable[[Wanted], Callable[[Exception], None]]
) -> AsyncIterator[list[Forwarder]]:
    """Serves them in the block; what a connection meets with is reported."""
    async with contextlib.AsyncExitStack() as stack:
        controls, made = Controls(client), []
        for wanted, listener in sockets:
            forwarder = Forwarder(controls, listener, wanted.target, reporter(wanted))
            stack.push_async_callback(forwarder.aclose)
            made.append(forwarder)
        yield made


@contextlib.asynccontextmanager
async def kept(address: str, sockets: Sequence[Listening]) -> AsyncIterator[tuple[str, ...]]:
    """Serves them through the agent at ``address``, as ``ADDR:PORT -> ID:PORT``. Nobody is told of errors:
    who connects sees a reset.

    Raises HostError.
    """
    if not sockets:
        yield ()
        return
    async with await Client.connect(address) as client, serving(client, sockets, lambda _: _keep_quiet):
        yield tuple(f"{shown(listener)} -> {wanted.to}" for wanted, listener in sockets)


def _keep_quiet(error: Exception) -> None:
    pass


def _unlink(path: str, inode: int) -> None:
    """Unless it is another's by now."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        if stat.S_ISSOCK(found.st_mode) and found.st_ino == inode:
            os.unlink(path)
