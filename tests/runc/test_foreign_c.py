"""A client in another language, in C on Debian's msgpack library, knows from SPEC.md alone how to do it.

It does what test_foreign_client.py does for one container, and the vectors, which that leaves to the unit
tests; what both show is that the page is enough.
"""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.cases.agents import REPO, RunningAgent
from tests.foreign.build import build, ran_a_container, run

VECTORS = REPO / "protocol" / "vectors"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("foreign"))


def cases() -> dict[str, list[dict[str, Any]]]:
    return {path.name: json.loads(path.read_text()) for path in VECTORS.glob("*.json")}


def in_the_bytes(case: dict[str, Any]) -> bool:
    return "fault" in case and "scene" not in case


def test_it_reads_and_writes_every_vector(program: Path) -> None:
    every = [case for file in cases().values() for case in file]
    counts = {
        "messages": sum("message" in case for case in every),
        "encoded": sum("message" in case and case.get("canonical", True) for case in every),
        "faults": sum(map(in_the_bytes, every)),
        "scenes": sum("scene" in case for case in every),
    }
    assert min(counts.values()) > 10
    line = " ".join(f"{name} {count}" for name, count in counts.items())
    assert run(program, "vectors", VECTORS) == (0, [line], "")


def other_meaning(case: dict[str, Any]) -> None:
    case["message"] = {"request": {"msgid": 77, "method": "agent.ping", "params": {}}}


def one_byte_short(case: dict[str, Any]) -> None:
    case["bytes"] = case["bytes"][:-2]


def no_fault(case: dict[str, Any]) -> None:
    case["bytes"] = "940001aa6167656e742e70696e679180"


@pytest.mark.parametrize(
    "file, change, complaint",
    [
        ("requests.json", other_meaning, "another meaning"),
        ("results.json", one_byte_short, "not taken"),
        ("faults.json", no_fault, "not refused"),
    ],
)
def test_it_tells_a_vector_that_is_wrong(
    program: Path, tmp_path: Path, file: str, change: Any, complaint: str
) -> None:
    changed = cases()
    change(changed[file][0])
    for name, content in changed.items():
        (tmp_path / name).write_text(json.dumps(content))
    status, _, said = run(program, "vectors", tmp_path)
    assert (status, changed[file][0]["name"] in said, complaint in said) == (1, True, True), said


def test_it_runs_a_container(program: Path, agent: RunningAgent, rootfs: str) -> None:
    ran_a_container(program, agent.address, rootfs)


@pytest.mark.parametrize(
    "answer, complaint",
    [(b"NO 1024\n", "said NO"), (b"", "no OK"), (b"OK", "no OK"), (b"OK 1\n\xc1", "broke")],
)
def test_it_gives_up_on_a_vmm_that_answers_otherwise(
    program: Path, tmp_path: Path, answer: bytes, complaint: str
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(20)

        def vmm() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as lines:
                assert lines.readline() == b"CONNECT 7000\n"
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                lines.read()

        serving = threading.Thread(target=vmm)
        serving.start()
        status, _, said = run(program, "run", f"hvsock:{tmp_path}/s:7000", "/rootfs")
        serving.join(20)
    assert (status, complaint in said) == (1, True), said
