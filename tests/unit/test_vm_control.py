"""What a VM's keeper is asked over its socket, and every way in which no answer comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.vm import control
from gcsagent.host.vm.errors import BootError, QmpError, VmError, VmNotRunning

SECONDS = 10.0


async def double(asked: dict[str, Any]) -> int:
    return int(asked["number"]) * 2


async def refuse(asked: dict[str, Any]) -> None:
    raise QmpError("not today")


async def refuse_with_more(asked: dict[str, Any]) -> None:
    raise BootError("init", "no such thing")


async def fail(asked: dict[str, Any]) -> None:
    raise PermissionError(13, "Permission denied", "/secret")


async def sleep(asked: dict[str, Any]) -> None:
    await asyncio.Event().wait()


ORDERS = {
    "double": double,
    "refuse": refuse,
    "refuse-with-more": refuse_with_more,
    "fail": fail,
    "sleep": sleep,
}


def keeping(path: Path, body: Callable[[Path], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(SECONDS):
            async with control.listening(path / "control", ORDERS):
                await body(path / "control")
        assert list(path.iterdir()) == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_orders_are_answered_side_by_side(tmp_path: Path) -> None:
    async def body(path: Path) -> None:
        asked = [control.ask(path, "double", {"number": number}, SECONDS) for number in range(20)]
        assert await asyncio.gather(*asked) == [number * 2 for number in range(20)]

    keeping(tmp_path, body)


def test_a_failure_keeps_its_type_where_it_can(tmp_path: Path) -> None:
    async def body(path: Path) -> None:
        with pytest.raises(QmpError, match=r"^not today$"):
            await control.ask(path, "refuse", {}, SECONDS)
        with pytest.raises(VmError, match="no such thing"):
            await control.ask(path, "refuse-with-more", {}, SECONDS)
        with pytest.raises(VmError, match="knows no order 'dance'"):
            await control.ask(path, "dance", {}, SECONDS)

    keeping(tmp_path, body)


@pytest.mark.parametrize("words", [b"", b"hello\n", b"[]\n", b'{"order": 1}\n', b"{}\n", b"x" * (1 << 21)])
def test_what_is_no_order_ends_the_conversation_and_no_more(tmp_path: Path, words: bytes) -> None:
    async def body(path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(words)
        with contextlib.suppress(ConnectionError):
            writer.write_eof()
            assert await reader.read() == b""
        writer.close()
        assert await control.ask(path, "double", {"number": 1}, SECONDS) == 2

    keeping(tmp_path, body)


def test_a_keeper_that_is_busy_or_gone_is_told_apart(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "control"
        with pytest.raises(VmNotRunning, match="does not answer"):
            await control.ask(path, "double", {"number": 1}, SECONDS)
        async with control.listening(path, ORDERS):
            with pytest.raises(VmError, match=r"not answered within 0\.05 s"):
                await control.ask(path, "sleep", {}, 0.05)
            waiting = asyncio.create_task(control.ask(path, "sleep", {}, SECONDS))
            assert await control.ask(path, "double", {"number": 1}, SECONDS) == 2  # the other is there, too
        with pytest.raises(VmNotRunning, match="before its keeper had answered"):
            await waiting

    asyncio.run(scenario())


def test_a_socket_that_cannot_be_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(VmError, match="cannot listen at"):
            async with control.listening(tmp_path / "none" / "control", ORDERS):
                pass

    asyncio.run(scenario())


def test_a_failure_of_any_other_kind_is_told_as_well(tmp_path: Path) -> None:
    """That the VM had ended would be another story."""

    async def body(path: Path) -> None:
        with pytest.raises(VmError, match="Permission denied: '/secret'") as caught:
            await control.ask(path, "fail", {}, SECONDS)
        assert type(caught.value) is VmError

    keeping(tmp_path, body)
