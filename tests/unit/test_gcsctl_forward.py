"""``gcsctl forward``: how its argument is read, and where it may listen.

What it does is in tests/runc/test_forward.py.
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import pytest

from gcsagent.host.cli.argument_types import typed
from gcsagent.host.forwards import CannotListen, Wanted, listening
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


def at(path: Path) -> list[Wanted]:
    return [Wanted.parse(f"{path}:web:80")]


def test_a_socket_file_that_a_crash_has_left_gives_way(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
        crashed.listen()
    with listening(at(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert not path.exists()


def test_a_socket_that_is_listened_on_stays_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(at(path)) as [(_, alive)]:
        in_use = f"^cannot listen on {path}: Address already in use$"
        with pytest.raises(CannotListen, match=in_use), listening(at(path)):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            alive.accept()[0].close()  # the attempt's own connection
            alive.accept()[0].close()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_never_removed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CannotListen, match="in use"), listening(at(path)):
        pass
    assert path.is_symlink() == (kind == "link")
    assert path.is_dir() == (kind == "directory")
    assert kind != "file" or path.read_text() == "precious"
