"""The debug shell: a root shell in the guest or in a container's namespaces, past the agent.

    async with await Shell.open(shell_address(vm.address), OpenShell("web", ("ps",))) as shell:
        async for ...: await shell.stream.read()
        print((await shell.wait()).exit_code)

It is there only where the guest was told so (``gcs.shell=on``), and has an address of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator
from typing import Self

from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from gcsagent.host.client import Client
from gcsagent.host.closing import Closing
from gcsagent.host.dialogue import Dialogue, encode_params
from gcsagent.host.errors import AgentSilent, ConnectFailed, ConnectionBroken, NotReady
from gcsagent.host.streams import Stream
from gcsagent.host.transport import Address, dial
from protocol import DEFAULT_SHELL_PORT
from protocol.address import HybridAddress, UnixAddress, VsockAddress, parse_dial
from protocol.errors import Code, RpcError
from protocol.families.shell import (
    SHELL,
    CloseInput,
    OpenShell,
    ResizeShell,
    ShellExit,
    ShellList,
    ShellOpened,
    ShellRef,
)
from protocol.method import Empty
from protocol.types import Winsize

OPEN_SECONDS = 60.0
"""How long opening may take in all: the server is started for the first connection, by a busy guest."""

END_OF_FILE = b"\x04"
"""VEOF, as terminals have it at first (termios(3))."""

_OPEN = "shell.open"


class NoShell(ConnectFailed):
    """Nothing listens for debug shells there."""


def shell_address(agent: str | Address, port: int = DEFAULT_SHELL_PORT) -> Address:
    """Where the debug shell of a guest is whose agent is at ``agent``.

    Raises ValueError for a UNIX socket: outside a guest the shell's is another one, wherever it was put.
    """
    address = parse_dial(agent) if isinstance(agent, str) else agent
    if isinstance(address, VsockAddress | HybridAddress):
        return dataclasses.replace(address, port=port)
    raise ValueError(f"{address}: the debug shell has another address, the one `gcsagent --shell` was given")


async def connect(address: Address, client_name: str) -> Client:
    """A client for ``shell.*`` requests. Raises NoShell, ConnectFailed, RpcError, RemoteProtocolError."""
    async with _in_time("shell.list"):
        (await _greeted(address, client_name)).close()
    return await Client.connect(address, timeout=OPEN_SECONDS, client_name=client_name)


async def listing(client: Client) -> ShellList:
    found: ShellList = await client.call("shell.list", Empty())
    return found


@contextlib.asynccontextmanager
async def _in_time(method: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            yield
    except TimeoutError:
        raise AgentSilent(method, OPEN_SECONDS) from None


async def _dialled(address: Address) -> socket.socket:
    """Only a UNIX socket's full queue is worth another attempt."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception(_queue_is_full), wait=wait_random_exponential(multiplier=0.02, max=1.0)
    ):
        with attempt:
            return await dial(address)
    raise AssertionError("ends only by returning or raising")


def _queue_is_full(error: BaseException) -> bool:
    return isinstance(error.__cause__, BlockingIOError)


async def _greeted(address: Address, client_name: str) -> Dialogue:
    """One attempt: where shells are allowed, PID 1 listens all the time."""
    try:
        dialogue = Dialogue(await _dialled(address))
    except NotReady as error:
        raise NoShell(
            "the debug shell is not allowed there (a guest: `gcsctl vm start --shell`, or gcs.shell=on on its"
            f" kernel command line; else gcsagent --shell ADDRESS), or nothing is up yet: {error}"
        ) from error
    try:
        welcome = await dialogue.hello(client_name)
    except BaseException:
        dialogue.close()
        raise
    if SHELL not in welcome.features:
        dialogue.close()
        raise NoShell(f"{address} is an agent; the debug shell has an address of its own")
    return dialogue


class Shell(Closing):
    """One shell. Closing it hangs it up; one task may read ``stream`` while another writes."""

    def __init__(self, client: Client, stream: Stream, opened: ShellOpened, terminal: bool) -> None:
        """Use :meth:`open`. ``pid`` is the guest's."""
        self._terminal = terminal
        self.stream, self.ident, self.pid = stream, opened.shell, opened.pid
        self._client = client

    @classmethod
    async def open(cls, address: Address, wanted: OpenShell, *, client_name: str = "gcsagent.host") -> Self:
        """Raises NoShell, ConnectFailed, RpcError (``details["exec_error"]`` as for process.exec),
        ConnectionLost, RemoteProtocolError, AgentSilent."""
        encode_params(_OPEN, wanted)
        async with _in_time(_OPEN), contextlib.AsyncExitStack() as undoing:
            dialogue = await _greeted(address, client_name)
            undoing.callback(dialogue.close)
            client = await Client.connect(address, client_name=client_name)
            undoing.push_async_callback(client.aclose)
            opened: ShellOpened = await dialogue.ask(_OPEN, wanted)
            first = dialogue.connection.stream_bytes()
            undoing.pop_all()
        return cls(client, Stream("shell", dialogue.sock, 0, first), opened, wanted.terminal)

    @property
    def outputs(self) -> list[Stream]:
        return [self.stream]

    @property
    def input(self) -> Stream | None:
        return self.stream

    async def resize(self, winsize: Winsize) -> None:
        await self._client.call("shell.resize", ResizeShell(self.ident, winsize))

    async def end_input(self) -> None:
        """On a terminal it is typed."""
        if self._terminal:
            await self.stream.write(END_OF_FILE)
        else:
            await self._client.call("shell.close_input", CloseInput(self.ident, self.stream.sent))

    async def kill(self, signal: int | str = "SIGHUP") -> None:
        """Ends it as its time limit does, whatever is named: hangs it up, and SIGKILL if it stays."""
        await self._client.call("shell.kill", ShellRef(self.ident))

    async def wait(self) -> ShellExit:
        """How it ended; reads of ``stream`` end where its output does. Somebody must be reading that.

        Raises ConnectionBroken when the guest does not know it any more.
        """
        try:
            ended: ShellExit = await self._client.call("shell.wait", ShellRef(self.ident))
        except RpcError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            raise ConnectionBroken(
                "the guest's process for debug shells was ended, and this one with it"
            ) from error
        self.stream.finish_at(ended.bytes)
        return ended

    async def aclose(self) -> None:
        """Hangs it up, if it still runs."""
        self.stream.close()
        await self._client.aclose()


def parse_address(text: str) -> Address:
    """As protocol.address.parse_dial, with the debug shell's port where none is named. Raises ValueError."""
    address = parse_dial(text)
    if isinstance(address, UnixAddress) or str(address) == text:
        return address
    return dataclasses.replace(address, port=DEFAULT_SHELL_PORT)
