"""Pages of containers: all of them, each once, and every page fits a message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from gcsagent.agent.call import Call
from gcsagent.agent.cgroups import Cgroup, CgroupMounts
from gcsagent.agent.container import Container
from gcsagent.agent.container_list import ContainerListService
from gcsagent.agent.process import Process
from gcsagent.agent.process_dir import ContainerDir
from gcsagent.agent.registry import Registry
from gcsagent.agent.runtime import Runtime
from protocol.families.container import ContainerList, ListContainers
from protocol.framing import Response, encode
from protocol.limits import MAX_ID, Limits
from protocol.scan import FrameScanner
from protocol.schema import to_wire
from protocol.types import ExitRecord, Oom, OomScope, OomVictim, Reason, Rusage, Stdio

NO_CALL = cast(Call, None)
VICTIM = OomVictim(1 << 22, "p" * MAX_ID, "fifteen_letters")


class Shelf:
    """Containers without an agent around them."""

    def __init__(self, tmp_path: Path) -> None:
        self._mounts, self._state = tmp_path / "mounts", str(tmp_path)
        self._mounts.touch()
        self.containers: dict[str, Container] = {}
        self.service = ContainerListService(cast(Registry, SimpleNamespace(containers=self.containers)))

    def add(self, ident: str, processes: int, args: tuple[str, ...] = ("sleep", "100000")) -> None:
        container = Container(
            ident,
            ContainerDir(self._state, ident),
            Cgroup(CgroupMounts(str(self._mounts)), f"/gcs/{ident}"),
            cast(Runtime, SimpleNamespace(name="runc")),
            auto_delete=False,
            labels={"who": "ü" * 100},
        )
        for number in range(processes):
            name = f"{number:0{MAX_ID}}" if number else "init"
            process = container.processes[name] = Process(ident, name, args, Stdio(), False)
            process.exit = ExitRecord(
                255,
                127,
                Reason.OOM,
                1 << 22,
                (1 << 63) - 1,
                (1 << 63) - 1,
                True,
                Rusage(*[(1 << 63) - 1] * 9),
                Oom(OomScope.CONTAINER, "/" + "c" * 160, "/" + "l" * 160, 16, 16, (VICTIM,) * (number % 17)),
                dict.fromkeys(("stdin", "stdout", "stderr"), (1 << 63) - 1),
            )
        self.containers[ident] = container

    def pages(self, **more: object) -> list[ContainerList]:
        found: list[ContainerList] = []
        after = ""
        while True:
            page = self.service.page(ListContainers(after=after, **more), NO_CALL)  # type: ignore[arg-type]
            check_fits(page)
            found.append(page)
            if not page.left_out:
                return found
            after = page.containers[-1].container


def check_fits(page: ContainerList) -> None:
    """Raises RemoteProtocolError for an answer that a peer would refuse."""
    frame = encode(Response(1, None, to_wire(page)))
    scanner = FrameScanner(Limits())
    scanner.feed(frame)
    assert scanner.next_frame() == frame


def on(tmp_path: Path, body: Callable[[Shelf], None]) -> None:
    async def run() -> None:
        body(Shelf(tmp_path))

    asyncio.run(run())


def test_pages_are_by_id_and_every_container_is_on_one(tmp_path: Path) -> None:
    def body(shelf: Shelf) -> None:
        for ident in ("b", "a", "C", "a-2", "b.1"):
            shelf.add(ident, 1)
        pages = shelf.pages(limit=2)
        assert [[each.container for each in page.containers] for page in pages] == [
            ["C", "a"],
            ["a-2", "b"],
            ["b.1"],
        ]
        assert [page.left_out for page in pages] == [3, 1, 0]
        del shelf.containers["a"]  # the one a page ended with may be gone when the next is asked for
        assert (
            shelf.service.page(ListContainers(after="a", limit=2), NO_CALL).containers[0].container == "a-2"
        )

    on(tmp_path, body)


def test_two_hundred_containers_and_a_thousand_ended_execs_fit_a_few_messages(tmp_path: Path) -> None:
    def body(shelf: Shelf) -> None:
        for number in range(200):
            shelf.add(f"c{number:03}", 6)
        pages = shelf.pages()
        assert len(pages) <= 4
        listed = [each for page in pages for each in page.containers]
        assert [each.container for each in listed] == sorted(shelf.containers)
        assert {(len(each.processes), each.process_count) for each in listed} == {(6, 6)}
        [summary] = shelf.pages(processes=False)
        assert {(each.processes, each.process_count) for each in summary.containers} == {((), 6)}

    on(tmp_path, body)


def test_one_too_large_for_a_message_is_listed_without_its_processes(tmp_path: Path) -> None:
    def body(shelf: Shelf) -> None:
        shelf.add("a", 1)
        shelf.add("b", 3, ("x" * 400_000,))
        shelf.add("c", 2000)
        shelf.add("d", 1)
        listed = [each for page in shelf.pages() for each in page.containers]
        assert [(each.container, len(each.processes), each.process_count) for each in listed] == [
            ("a", 1, 1),
            ("b", 0, 3),
            ("c", 0, 2000),
            ("d", 1, 1),
        ]

    on(tmp_path, body)
