"""``gcsctl forward``: how its argument is read. What it does is in tests/runc/test_forward.py."""

from __future__ import annotations

import argparse

import pytest

from gcsagent.host.cli.argument_types import typed
from gcsagent.host.forwards import Wanted
from protocol.families.forward import OpenForward


@pytest.mark.parametrize(
    "text, where, target, shown",
    [
        ("8080:web:80", ("127.0.0.1", 8080), OpenForward("web", 80), "web:80"),
        ("0::9000", ("127.0.0.1", 0), OpenForward(None, 9000), "the guest:9000"),
        ("0.0.0.0:8080:web:80", ("0.0.0.0", 8080), OpenForward("web", 80), "web:80"),
        ("[::1]:8080:web:80", ("::1", 8080), OpenForward("web", 80), "web:80"),
        ("localhost:1::2", ("localhost", 1), OpenForward(None, 2), "the guest:2"),
        ("8080:8081:80", ("127.0.0.1", 8080), OpenForward("8081", 80), "8081:80"),
        (
            "/tmp/db.sock:db:/run/db.sock",
            "/tmp/db.sock",
            OpenForward("db", path="/run/db.sock"),
            "db:/run/db.sock",
        ),
        ("./s::/run/a:b", "./s", OpenForward(path="/run/a:b"), "the guest:/run/a:b"),
        ("5432:db:/run/db.sock", ("127.0.0.1", 5432), OpenForward("db", path="/run/db.sock"), None),
        ("/tmp/s:web:80", "/tmp/s", OpenForward("web", 80), None),
    ],
)
def test_what_is_meant(
    text: str, where: str | tuple[str, int], target: OpenForward, shown: str | None
) -> None:
    wanted = Wanted.parse(text)
    assert wanted == Wanted(where, target)
    assert shown in (None, wanted.to)


@pytest.mark.parametrize(
    "text, word",
    [
        ("8080", "write"),
        ("8080:80", "write"),
        ("8080:web:", "write"),
        ("web:80:8080:x", "write"),
        ("8080:web:run/s", "write"),
        ("8080:../x:80", "write"),
        ("8080:a b:80", "container"),
        ("8080:web:0", "port"),
        ("8080:web:65536", "port"),
        ("65536:web:80", "port"),
    ],
)
def test_what_is_wrong(text: str, word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        typed(Wanted.parse)(text)
    assert word in str(caught.value)
    assert text in str(caught.value)
