"""What is read out of CRIU's log and images, and how runc is asked to use it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from gcsagent.agent import criu, runc_argv
from gcsagent.agent.runtime import CriuOptions, RuntimeFailure
from protocol.errors import Code, RpcError

LOG = """\
(00.284237) Error (criu/tun.c:85): tun: Unable to create tun: No such file or directory
(00.326054) Error (criu/libnetlink.c:54): -95 reported by netlink: Operation not supported
(00.326279) Error (criu/net.c:3997): net: Unable to create a veth pair: -95
(00.338422) Warn  (criu/net.c:4023): net: NSID isn't reported for network links
Error (criu/util.c:641): execvp("tar", ...) failed: No such file or directory
(01.324863) Error (criu/util.c:656): exited, status=1
(01.383448) Error (criu/cr-dump.c:2111): Dumping FAILED.
"""
"""Of CRIU 4.1.1, without tar."""


def test_the_first_error_is_the_cause_and_probes_are_none(tmp_path: Path) -> None:
    log = tmp_path / "dump.log"
    log.write_text(LOG)
    assert criu.errors(str(log)) == [
        'execvp("tar", ...) failed: No such file or directory',
        "exited, status=1",
        "Dumping FAILED.",
    ]
    failure = RuntimeFailure("checkpoint", 1, "criu failed: type NOTIFY errno 0")
    error = criu.explain(failure, "save container c", str(log))
    assert (error.code, error.details["exit_status"]) == (Code.FAILED_PRECONDITION, 1)
    assert (
        error.message == 'CRIU cannot save container c: execvp("tar", ...) failed: No such file or directory'
    )


def test_an_endless_log_gives_a_bounded_error(tmp_path: Path) -> None:
    log = tmp_path / "dump.log"
    log.write_text(f"(0.1) Error (criu/x.c:1): {'x' * 10_000}\n" * 1000)
    found = criu.errors(str(log))
    assert (len(found), len(found[0])) == (criu.MAX_ERRORS, criu.MAX_LINE)


def test_without_a_log_the_runtimes_own_words_are_the_error(tmp_path: Path) -> None:
    failure = RuntimeFailure("checkpoint", 1, "container does not exist")
    error = criu.explain(failure, "save container c", str(tmp_path / "none"))
    assert (error.code, error.details["runtime_error"]) == (Code.INTERNAL, "container does not exist")


def _image(*pipes: tuple[int, bytes]) -> bytes:
    """pipes-data.img as CRIU writes it; inodes are varints, low seven bits first."""
    data = struct.pack("<II", 0x54564319, 0x56453709)
    for inode, held in pipes:
        fields = b"\x08" + _varint(inode) + b"\x10" + _varint(len(held)) + b"\x18" + _varint(65536)
        data += struct.pack("<I", len(fields)) + fields + held
    return data


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def test_the_bytes_of_a_pipe_are_found_by_its_inode(tmp_path: Path) -> None:
    (tmp_path / "pipes-data.img").write_bytes(
        _image((5, b""), (1310, b"\x08\x05 not a field"), (70_000, b"z"))
    )
    assert criu.pipe_data(str(tmp_path), 1310) == b"\x08\x05 not a field"
    assert criu.pipe_data(str(tmp_path), 70_000) == b"z"
    assert criu.pipe_data(str(tmp_path), 5) == criu.pipe_data(str(tmp_path), 6) == b""


def test_no_pipe_had_been_saved(tmp_path: Path) -> None:
    assert criu.pipe_data(str(tmp_path), 5) == b""
    (tmp_path / "pipes-data.img").write_bytes(b"rubbish, not an image")
    with pytest.raises(ValueError, match="none of CRIU's"):
        criu.pipe_data(str(tmp_path), 5)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(criu, "_found", {})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not criu.present()
    with pytest.raises(RpcError) as caught:
        criu.require("criu", "tar")
    assert (caught.value.code, caught.value.details) == (Code.FAILED_PRECONDITION, {"missing": "criu"})
    (tmp_path / "criu").touch(mode=0o755)
    with pytest.raises(RpcError, match="no tar"):
        criu.require("criu", "tar")


GLOBALS = runc_argv.RuncGlobals("runc", "/state/runtime")
START = ["runc", "--root", "/state/runtime", "--log", "/log", "--log-format", "json"]


def test_arguments() -> None:
    plain = CriuOptions("/k/images", "/k/work")
    paths = ["--image-path", "/k/images", "--work-path", "/k/work"]
    argv = runc_argv.checkpoint(GLOBALS, "/log", "c", plain, leave_running=False)
    assert argv == [*START, "checkpoint", *paths, "c"]
    every = CriuOptions("/k/images", "/k/work", True, True, True, True)
    flags = ["--tcp-established", "--ext-unix-sk", "--shell-job", "--file-locks"]
    argv = runc_argv.checkpoint(GLOBALS, "/log", "c", every, leave_running=True)
    assert argv == [*START, "checkpoint", *paths, *flags, "--leave-running", "c"]
    argv = runc_argv.restore(GLOBALS, "/log", "c", every, bundle="/b", pid_file="/p", console_socket="/s")
    begin = ["restore", "--detach", "--bundle", "/b", "--pid-file", "/p", "--console-socket", "/s"]
    assert argv == [*START, *begin, *paths, *flags, "c"]
