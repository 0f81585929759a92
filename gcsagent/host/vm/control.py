"""What a named VM's keeper is asked while the VM runs, and its answers: one JSON object on a line each way.

Disks and network cards are plugged in by way of QEMU's monitor alone. What needs a process that lives as long
as the VM, such as the daemon of a share, is the keeper's to start: it listens at STATE/vms/NAME/control.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gcsagent.host.vm import errors
from gcsagent.host.vm.errors import VmError, VmNotRunning

CONTROL = "control"

Order = Callable[[dict[str, Any]], Awaitable[Any]]

_MAX_BYTES = 1 << 20
_CONNECT_SECONDS = 10.0


@asynccontextmanager
async def listening(path: Path, orders: Mapping[str, Order]) -> AsyncIterator[None]:
    """Carries out what is asked at `path`, each order by its name.

    Raises:
        VmError: nobody can listen there.
    """
    conversations: set[asyncio.Task[None]] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        conversations.add(task)
        try:
            with contextlib.suppress(ConnectionError, ValueError):
                await _answer(reader, writer, orders)
        finally:
            conversations.discard(task)
            writer.close()

    try:
        server = await asyncio.start_unix_server(converse, path, limit=_MAX_BYTES)
    except OSError as error:
        raise VmError(f"cannot listen at {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        server.close()
        for task in conversations:
            task.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)
        path.unlink(missing_ok=True)


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, orders: Mapping[str, Order]
) -> None:
    name, arguments = _read(await reader.readline())
    try:
        if name not in orders:
            raise VmError(f"this VM's keeper knows no order {name!r}: it was started by another gcsctl")
        answer = {"result": await orders[name](arguments)}
    except Exception as error:  # without an answer the VM would seem to have ended
        answer = {"error": {"type": type(error).__name__, "message": str(error) or repr(error)}}
        if not isinstance(error, VmError):
            traceback.print_exc()
    writer.write(json.dumps(answer).encode() + b"\n")
    await writer.drain()


def _read(line: bytes) -> tuple[str, dict[str, Any]]:
    """Raises ValueError for what is no order; it gets no answer."""
    asked = json.loads(line)
    if not isinstance(asked, dict) or not isinstance(asked.get("order"), str):
        raise ValueError("no order")
    arguments = asked.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError("no arguments")
    return asked["order"], arguments


async def ask(path: Path, order: str, arguments: Mapping[str, Any], timeout: float) -> Any:
    """Has the keeper that listens at `path` do something; returns what it answers.

    Args:
        timeout: seconds it may take.

    Raises:
        VmNotRunning: nobody listens there.
        VmError: what the keeper met with, or it takes too long.
    """
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_BYTES)
    except (OSError, TimeoutError) as error:
        raise VmNotRunning(f"the VM's keeper does not answer at {path}: {error}") from error
    try:
        writer.write(json.dumps({"order": order, "arguments": dict(arguments)}).encode() + b"\n")
        async with asyncio.timeout(timeout):
            line = await reader.readline()
    except ConnectionError as error:
        raise VmNotRunning(f"the VM ended before its keeper had answered: {error}") from error
    except TimeoutError:
        raise VmError(f"the VM's keeper has not answered within {timeout:g} s") from None
    finally:
        writer.close()
    if not line:
        raise VmNotRunning("the VM ended before its keeper had answered")
    answer = json.loads(line)
    if "error" in answer:
        raise _error(answer["error"])
    return answer["result"]


def _error(report: Mapping[str, str]) -> VmError:
    kind = getattr(errors, report["type"], VmError)
    # Of those that carry more than their message none is an order's.
    known = isinstance(kind, type) and issubclass(kind, VmError) and kind.__init__ is VmError.__init__
    return kind(report["message"]) if known else VmError(report["message"])
