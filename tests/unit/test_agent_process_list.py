"""Which processes are a container's, and what becomes of an answer that is too large or does not come."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gcsagent.agent import process_list
from gcsagent.agent.process_list import MAX_STUCK, ProcessListService, Scope, read_page
from protocol.errors import Code, RpcError
from protocol.families.container import ListProcesses, ProcessList
from protocol.limits import MAX_COMMAND, MAX_FRAME

NOW = 1 << 60


def scope(*listed: int, known: dict[int, str] | None = None, taken: int = NOW, namespace: int = 0) -> Scope:
    return Scope("/none", frozenset(listed), known or {}, namespace, 0, taken)


@pytest.fixture
def child() -> Iterator[int]:
    """Its name is made to look like fields of stat, and its command line is longer than what is told."""
    code = "open('/proc/self/comm', 'w').write('a) R 1 (b'); print(flush=True); input()"
    argv = [sys.executable, "-c", code, "x" * MAX_COMMAND]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_a_process_is_told_whatever_its_name_is(child: int) -> None:
    [found] = read_page(scope(child, known={child: "p"}), 0, 10).processes
    assert (found.pid, found.ppid, found.process, found.threads) == (child, os.getpid(), "p", 1)
    assert (found.running, found.created_by_runtime, found.zombie) == (True, True, False)
    assert len(found.command) == MAX_COMMAND + 1
    assert found.command.endswith("x…")


def test_a_pid_that_was_used_again_since_is_nobodys(child: int) -> None:
    assert read_page(scope(child, known={child: "p"}, taken=0), 0, 10) == ProcessList()
    namespace = os.stat(f"/proc/{child}/ns/pid").st_ino
    found = read_page(scope(known={child: "p"}, taken=0, namespace=namespace), child - 1, 1).processes
    assert [(each.pid, each.created_by_runtime) for each in found] == [(child, False)]


def test_a_zombie_has_its_name_for_a_command() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        [found] = read_page(scope(process.pid), 0, 10).processes
        assert (found.running, found.zombie, found.command, found.rss_bytes) == (False, True, "[true]", 0)
    assert read_page(scope(process.pid), 0, 10) == ProcessList()


def test_a_page_is_no_larger_than_a_message(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_list, "PAGE_BYTES", MAX_COMMAND + 2 * process_list.ENTRY_BYTES)
    page = read_page(scope(os.getpid(), child, os.getppid()), 0, 10)
    assert len(page.processes) + page.left_out == 3
    assert page.left_out >= 1
    assert process_list.PAGE_BYTES * 2 < MAX_FRAME


def test_readers_that_hang_are_bounded_and_keep_nobody_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def hang(*_: object) -> ProcessList:
        assert gate.wait(30)
        return ProcessList(left_out=1)

    monkeypatch.setattr(process_list, "TURN_SECONDS", 0.05)
    monkeypatch.setattr(process_list, "read_page", hang)
    monkeypatch.setattr(process_list, "scope_of", lambda container: scope())
    container = SimpleNamespace(check=lambda action: None)
    registry = SimpleNamespace(get=lambda ident: container)

    async def body() -> None:
        service = ProcessListService(cast(Any, registry))

        async def ask() -> ProcessList:
            return await service.processes(ListProcesses("c"), cast(Any, None))

        hanging = [asyncio.ensure_future(ask()) for _ in range(MAX_STUCK)]
        await asyncio.sleep(0)
        hanging[0].cancel()  # its deadline, say: the thread stays
        with pytest.raises(RpcError) as caught:
            await ask()
        assert caught.value.code is Code.RESOURCE_EXHAUSTED
        gate.set()
        assert [found.left_out for found in await asyncio.gather(*hanging[1:])] == [1] * (MAX_STUCK - 1)
        await asyncio.to_thread(_join_readers)  # the cancelled one's, too
        assert (await ask()).left_out == 1

    asyncio.run(body())


def test_a_crowd_of_readers_is_served_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_list, "read_page", lambda *_: ProcessList(left_out=1))
    monkeypatch.setattr(process_list, "scope_of", lambda container: scope())
    container = SimpleNamespace(check=lambda action: None)
    service_registry = SimpleNamespace(get=lambda ident: container)

    async def body() -> None:
        service = ProcessListService(cast(Any, service_registry))
        asked = (service.processes(ListProcesses("c"), cast(Any, None)) for _ in range(5 * MAX_STUCK))
        assert [found.left_out for found in await asyncio.gather(*asked)] == [1] * 5 * MAX_STUCK

    asyncio.run(body())


def _join_readers() -> None:
    for thread in threading.enumerate():
        if thread.name == "processes":
            thread.join(30)
