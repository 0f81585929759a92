"""What the agent writes and reads: runc's command lines and log, process directories, its own log."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent import logs, process_dir, runc_argv
from gcsagent.agent.process_dir import ContainerDir, read_json, write_json
from gcsagent.agent.runc import LOG_TAIL, last_error
from gcsagent.agent.runc_argv import RuncGlobals

# -- command lines ----------------------------------------------------------------------------------

OPTIONS = RuncGlobals("/usr/bin/runc", "/run/r", ("--debug",))
BASE = ["/usr/bin/runc", "--root", "/run/r", "--log", "/l", "--log-format", "json", "--debug"]


@pytest.mark.parametrize(
    "argv, expected",
    [
        (
            runc_argv.create(OPTIONS, "/l", "c", bundle="/b", pid_file="/p"),
            ["create", "--bundle", "/b", "--pid-file", "/p", "c"],
        ),
        (
            runc_argv.create(
                OPTIONS, "/l", "c", bundle="/b", pid_file="/p", console_socket="/s", no_pivot=True
            ),
            ["create", "--bundle", "/b", "--pid-file", "/p", "--console-socket", "/s", "--no-pivot", "c"],
        ),
        (runc_argv.start(OPTIONS, "/l", "c"), ["start", "c"]),
        (
            runc_argv.exec_(OPTIONS, "/l", "c", process_file="/f", pid_file="/p"),
            ["exec", "--detach", "--process", "/f", "--pid-file", "/p", "c"],
        ),
        (
            runc_argv.exec_(OPTIONS, "/l", "c", process_file="/f", pid_file="/p", console_socket="/s"),
            ["exec", "--detach", "--process", "/f", "--pid-file", "/p", "--console-socket", "/s", "c"],
        ),
        (runc_argv.delete(OPTIONS, "/l", "c", force=True), ["delete", "--force", "c"]),
        (runc_argv.delete(OPTIONS, "/l", "c", force=False), ["delete", "c"]),
    ],
)
def test_a_command_line_is_the_globals_and_then_the_command(argv: list[str], expected: list[str]) -> None:
    assert argv == BASE + expected


def test_the_version_needs_no_globals() -> None:
    assert runc_argv.version(OPTIONS) == ["/usr/bin/runc", "--version"]


# -- runc's log -------------------------------------------------------------------------------------


def entry(level: str, message: object) -> str:
    return json.dumps({"level": level, "msg": message, "time": "2026-01-01T00:00:00Z"}) + "\n"


@pytest.mark.parametrize(
    "log, error",
    [
        ("", ""),
        (entry("error", "first") + entry("error", "last"), "last"),
        (entry("error", "real") + entry("warning", "later") + entry("info", "x"), "real"),
        (entry("fatal", "worse"), "worse"),
        (entry("error", "real") + "rubbish\n{\n[]\n7\nnull\n" + entry("error", ""), "real"),
        (entry("error", "real") + "[" * 50_000, "real"),
        (entry("error", "real") + "\udcff\udcfe\n", "real"),
        (entry("error", "real") + '{"level": "error", "msg": "cut sh', "real"),
        (entry("error", {"odd": 1}), "{'odd': 1}"),
        (entry("error", "far back") + "x\n" * LOG_TAIL, ""),
        ("x" * (LOG_TAIL * 2) + "\n" + entry("error", "near the end"), "near the end"),
    ],
    ids=[
        "empty",
        "last of two",
        "later warnings",
        "fatal",
        "rubbish",
        "deep",
        "no UTF-8",
        "cut",
        "odd",
        "far",
        "near",
    ],
)
def test_the_last_error_is_found_through_rubbish(tmp_path: Path, log: str, error: str) -> None:
    path = tmp_path / "log"
    path.write_text(log, errors="surrogateescape")
    assert last_error(str(path)) == error


def test_a_log_that_was_never_written_holds_no_error(tmp_path: Path) -> None:
    assert last_error(str(tmp_path / "missing")) == ""
    assert last_error(str(tmp_path)) == ""


# -- process directories ----------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> ContainerDir:
    made = ContainerDir(str(tmp_path), "c")
    made.create()
    return made


def listing(directory: ContainerDir) -> list[str]:
    root = Path(directory.path)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_second_container_by_the_same_name_is_refused(directory: ContainerDir) -> None:
    with pytest.raises(FileExistsError):
        directory.create()


def test_a_process_goes_from_its_temporary_name_to_its_pid_to_exited(directory: ContainerDir) -> None:
    path = directory.begin("init", {"state": "new"})
    (Path(path) / "pid").write_text("42")
    assert listing(directory) == [".new-init/pid", ".new-init/process.json"]
    directory.settle("init", 42)
    assert listing(directory) == ["42/pid", "42/process.json", "init.pid"]
    assert (Path(directory.path) / "init.pid").read_text() == "42"
    directory.update(42, {"state": "running"})
    assert directory.read("42/process.json") == {"state": "running"}
    directory.retire("init", 42, {"state": "ended"})
    assert directory.read("exited/init/process.json") == {"state": "ended"}
    assert "42/pid" not in listing(directory)
    directory.discard("init", 0)
    directory.discard("init", 0)
    assert listing(directory) == ["init.pid"]


def test_a_pid_that_is_used_again_gets_a_directory_of_its_own(directory: ContainerDir) -> None:
    directory.begin("first", {"who": "first"})
    directory.settle("first", 42)
    directory.begin("second", {"who": "second"})
    directory.settle("second", 42)
    assert directory.read("42/process.json") == {"who": "second"}


def test_the_same_process_cannot_be_begun_twice(directory: ContainerDir) -> None:
    directory.begin("p", {"who": "first"})
    with pytest.raises(FileExistsError):
        directory.begin("p", {"who": "second"})
    assert directory.read(".new-p/process.json") == {"who": "first"}


@pytest.mark.parametrize("pid", [0, 42])
def test_a_failed_start_leaves_no_temporary_name(directory: ContainerDir, pid: int) -> None:
    directory.begin("p", {"process": "p"})
    if pid:
        directory.settle("p", pid)
    directory.discard("p", pid)
    assert listing(directory) == []
    assert os.listdir(directory.path) == ["exited"]


def test_the_directory_of_one_that_got_the_pid_afterwards_is_left_alone(directory: ContainerDir) -> None:
    directory.begin("first", {"process": "first"})
    directory.settle("first", 42)
    directory.retire("first", 42, {"process": "first"})
    directory.begin("second", {"process": "second"})
    directory.settle("second", 42)
    directory.discard("first", 42)
    assert listing(directory) == ["42/process.json"]


def test_a_document_that_cannot_be_written_leaves_no_temporary_name(directory: ContainerDir) -> None:
    with pytest.raises(TypeError):
        directory.begin("p", {"odd": object()})
    assert os.listdir(directory.path) == ["exited"]
    directory.write("container.json", {"good": 1})
    with pytest.raises(TypeError):
        directory.write("container.json", {"odd": object()})
    assert directory.read("container.json") == {"good": 1}
    assert sorted(os.listdir(directory.path)) == ["container.json", "exited"]


def test_a_reader_finds_all_of_the_old_or_all_of_the_new(
    directory: ContainerDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at the instant before the one step that makes the new one visible."""
    seen: list[dict[str, Any]] = []
    path = os.path.join(directory.path, "x.json")
    write_json(path, {"number": 1})
    rename: Callable[[str, str], None] = os.rename

    def look_then_rename(source: str, target: str) -> None:
        seen.append(read_json(target))
        assert read_json(source) == {"number": 2}
        rename(source, target)

    monkeypatch.setattr(os, "rename", look_then_rename)
    write_json(path, {"number": 2})
    assert seen == [{"number": 1}]
    assert read_json(path) == {"number": 2}


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\udcff"])
def test_a_file_that_is_no_document_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"."):
        process_dir.read_json(str(path))


# -- the agent's log --------------------------------------------------------------------------------


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    asyncio_level = logging.getLogger("asyncio").level
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    logs.set_up("info")
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("asyncio").setLevel(asyncio_level)


def test_a_line_carries_its_context_and_its_own_fields(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log = logs.context(logging.getLogger("agent.x"), container="c", process="p", request="")
    log.info("hello", extra={"pid": 7})
    (line,) = lines()
    assert {key: line[key] for key in ("level", "name", "message", "container", "process_id", "pid")} == {
        "level": "INFO",
        "name": "agent.x",
        "message": "hello",
        "container": "c",
        "process_id": "p",
        "pid": 7,
    }
    assert "request" not in line
    assert line["time"].endswith("Z")


def test_no_field_clashes_with_loggings_own(lines: Callable[[], list[dict[str, Any]]]) -> None:
    """A clash is a KeyError in the middle of whatever was being logged."""
    log = logs.context(logging.getLogger("agent.x"), process="p")
    record = logging.makeLogRecord({})
    for name in [*vars(record), "message", "asctime"]:
        log.info("hello", extra={name: "mine"})
    assert len(lines()) == len(vars(record)) + 2


def test_below_the_level_nothing_is_written_and_a_traceback_is_one_line(
    lines: Callable[[], list[dict[str, Any]]],
) -> None:
    log = logs.context(logging.getLogger("agent.x"))
    log.debug("hidden")
    try:
        raise ValueError("inside")
    except ValueError as error:
        log.error("a fault", exc_info=error)
    (line,) = lines()
    assert "ValueError: inside" in line["exc_info"]
