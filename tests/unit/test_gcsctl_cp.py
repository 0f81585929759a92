"""gcsctl cp: what its arguments name, and how it shows how far it is."""

from __future__ import annotations

import pytest

from gcsagent.host.cli import parser
from gcsagent.host.cli.common import UsageError
from gcsagent.host.cli.copy import Meter, Remote, place


@pytest.mark.parametrize(
    "text, named",
    [
        ("web:/etc", Remote("web", "/etc")),
        ("web:etc/.", Remote("web", "/etc/.")),
        ("web:", Remote("web", "/")),
        (":/var/log/", Remote(None, "/var/log/")),
        (":", Remote(None, "/")),
        ("web:/a:b", Remote("web", "/a:b")),
        ("./web:/etc", "./web:/etc"),
        ("/tmp/a:b", "/tmp/a:b"),
        ("../a:b", "../a:b"),
        ("file", "file"),
        ("-", "-"),
        (".", "."),
    ],
)
def test_what_an_argument_names(text: str, named: Remote | str) -> None:
    assert place(text) == named


@pytest.mark.parametrize("text", ["a b:/x", "dir/file:x", "web:/" + "x" * 5000, "web:/a\0b"])
def test_what_names_nothing(text: str) -> None:
    with pytest.raises(UsageError):
        place(text)


def test_the_options() -> None:
    args = parser.parse(["cp", "-aLq", "--max-size", "1M", "a", "web:/b"])
    assert (args.archive, args.follow_link, args.quiet, args.max_size) == (True, True, True, 1 << 20)
    assert (args.source, args.target) == ("a", "web:/b")


def test_progress_is_one_line_that_goes_again(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Meter("web:/x", shown=True, clock=lambda: now[0]) as meter:
        meter.add(1 << 20)
        assert capsys.readouterr().err == ""
        now[0] = 1.0
        meter.add(3 << 20)
        assert capsys.readouterr().err == "\rweb:/x: 4.0 MiB, 4.0 MiB/s"
        now[0] = 1.1
        meter.add(1)
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err == "\r" + " " * 26 + "\r"


def test_nothing_is_shown_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Meter("web:/x", shown=False, clock=lambda: now[0]) as meter:
        now[0] = 10.0
        meter.add(1)
    assert capsys.readouterr().err == ""
