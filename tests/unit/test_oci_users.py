"""Names of users and groups, looked up in a root directory of our making."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent import bundle
from gcsagent.agent.inroot import open_inside, read_inside
from gcsagent.agent.oci import users
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from protocol.families.process import Exec
from tests.cases.descriptors import descriptors, settled_descriptors

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
# a comment

broken
also:x:NaN:0::/:/bin/sh
big:x:99999999999:0::/:/bin/sh
toor:x:0:0::/home/toor:/bin/sh
www-data:x:33:33:www:/var/www:/usr/sbin/nologin
+nis
www-data:x:34:34::/second:/bin/sh
"""
GROUP = """\
root:x:0:
www-data:x:33:
staff:x:50:www-data,other
audio:x:29:other,www-data
none:x:no:www-data
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    return tmp_path


def settled(root: Path, user: dict[str, Any], **more: Any) -> dict[str, Any]:
    spec = {
        "ociVersion": "1.0.2",
        "root": {"path": str(root)},
        "process": {"args": ["x"], "user": user, **more},
    }
    process = bundle.load(CreateContainer("c", spec=spec))["process"]
    assert isinstance(process, dict)
    return process


def error_of(root: Path, user: dict[str, Any]) -> RpcError:
    with pytest.raises(RpcError) as caught:
        settled(root, user)
    return caught.value


@pytest.mark.parametrize(
    "name, uid, gid, groups",
    [
        ("root", 0, 0, []),
        ("www-data", 33, 33, [50, 29]),
        ("33", 33, 33, [50, 29]),
        ("www-data:staff", 33, 50, None),
        ("www-data:7", 33, 7, None),
        ("1000", 1000, 0, None),
        ("1000:staff", 1000, 50, None),
        ("1000:1000", 1000, 1000, None),
        ("4294967294", 4294967294, 0, None),
    ],
)
def test_a_user_is_resolved_as_engines_do(
    root: Path, name: str, uid: int, gid: int, groups: list[int] | None
) -> None:
    wanted = (
        {"uid": uid, "gid": gid} if groups is None else {"uid": uid, "gid": gid, "additionalGids": groups}
    )
    assert settled(root, {"username": name})["user"] == wanted
    assert settled(root, {"uid": 5, "gid": 6, "username": name, "umask": 7})["user"] == {**wanted, "umask": 7}


def test_additional_groups_may_be_names_and_come_once(root: Path) -> None:
    user = {"uid": 1, "gid": 1, "additionalGids": ["staff", 29, "50", "audio", 7]}
    assert settled(root, user)["user"]["additionalGids"] == [50, 29, 7]
    user = {"username": "www-data", "additionalGids": ["staff", 9]}
    assert settled(root, user)["user"]["additionalGids"] == [50, 29, 9]


def test_home_is_set_where_the_number_alone_would_give_another(root: Path) -> None:
    assert settled(root, {"username": "toor"})["env"] == ["HOME=/home/toor"]
    assert settled(root, {"username": "toor"}, env=["HOME=/mine"])["env"] == ["HOME=/mine"]
    assert settled(root, {"username": "www-data"})["env"] == []


@pytest.mark.parametrize(
    "user, code, field, says",
    [
        ({"username": "nobody"}, Code.NOT_FOUND, "username", "/etc/passwd"),
        ({"username": "also"}, Code.NOT_FOUND, "username", "/etc/passwd"),
        ({"username": "big"}, Code.NOT_FOUND, "username", "/etc/passwd"),
        ({"username": "root:none"}, Code.NOT_FOUND, "username", "/etc/group"),
        ({"username": "4294967295"}, Code.INVALID_ARGUMENT, "username", "largest"),
        ({"username": ":"}, Code.INVALID_ARGUMENT, "username", "USER"),
        ({"username": ":staff"}, Code.INVALID_ARGUMENT, "username", "USER"),
        ({"username": "root:"}, Code.INVALID_ARGUMENT, "username", "USER"),
        ({"additionalGids": [1, "nobody"]}, Code.NOT_FOUND, "additionalGids[1]", "/etc/group"),
    ],
)
def test_who_is_not_there_is_named_with_the_file(
    root: Path, user: dict[str, Any], code: Code, field: str, says: str
) -> None:
    error = error_of(root, user)
    assert (error.code, error.details["field"]) == (code, f"spec.process.user.{field}")
    assert says in error.message


def test_without_the_files_numbers_do_and_names_do_not(tmp_path: Path) -> None:
    assert settled(tmp_path, {"username": "7:8"})["user"] == {"uid": 7, "gid": 8}
    assert error_of(tmp_path, {"username": "root"}).code is Code.NOT_FOUND


def test_the_files_are_the_containers_own_wherever_a_symlink_points(root: Path) -> None:
    """Absolute and climbing links end inside the root: the guest's own files are never read."""
    for target in ("/etc/passwd.real", "../../../../etc/passwd.real", "/../etc/./link"):
        (root / "etc/passwd").unlink()
        (root / "etc/passwd").symlink_to(target)
        assert error_of(root, {"username": "inner"}).code is Code.NOT_FOUND
        (root / "etc/passwd.real").write_text("inner:x:77:78::/:/bin/sh\n")
        (root / "etc/link").unlink(missing_ok=True)
        (root / "etc/link").symlink_to("passwd.real")
        assert settled(root, {"username": "inner"})["user"]["uid"] == 77
        (root / "etc/passwd.real").unlink()


def test_a_file_that_is_none_or_too_large_is_refused_not_waited_for(root: Path) -> None:
    passwd = root / "etc/passwd"
    passwd.unlink()
    os.mkfifo(passwd)
    assert error_of(root, {"username": "root"}).code is Code.INVALID_ARGUMENT
    passwd.unlink()
    passwd.symlink_to("passwd")
    assert error_of(root, {"username": "root"}).code is Code.INVALID_ARGUMENT
    passwd.unlink()
    passwd.write_bytes(b"#" * (users.MAX_FILE + 1))
    assert "larger than" in error_of(root, {"username": "root"}).message


def test_an_exec_is_looked_up_where_its_container_runs(root: Path) -> None:
    container = {"process": {"args": ["x"], "user": {"uid": 1, "gid": 1}}}
    wanted = {"args": ["x"], "user": {"username": "www-data:audio"}}
    made = bundle.for_exec(container, Exec("c", "p", wanted), str(root))
    assert made["user"] == {"uid": 33, "gid": 29}
    more = bundle.for_exec(
        {"process": {"args": ["x"], "user": {"uid": 5, "gid": 6, "additionalGids": [7]}}},
        Exec("c", "p", {"args": ["x"], "user": {"additionalGids": ["staff", 7]}}),
        str(root),
    )
    assert more["user"] == {"uid": 5, "gid": 6, "additionalGids": [50, 7]}
    with pytest.raises(RpcError) as caught:
        bundle.for_exec(container, Exec("c", "p", {"args": ["x"], "user": {"username": "x"}}), str(root))
    assert caught.value.details["field"] == "spec.user.username"
    with pytest.raises(RpcError) as caught:
        bundle.for_exec(container, Exec("c", "p", wanted), "/proc/0/root")
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_walking_inside_leaves_no_descriptor(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    (root / "up").symlink_to("../../..")
    before = settled_descriptors()
    fd = users.open_root(str(root))
    try:
        os.close(open_inside(fd, "/up/up/etc/../etc/passwd"))
        assert read_inside(fd, "/up/etc/group", 4096) == GROUP.encode()
        for path in ("/loop", "/etc/passwd/x", "/nowhere", "/etc/nowhere/x"):
            with pytest.raises(OSError):  # noqa: PT011 - which one does not matter here
                open_inside(fd, path)
    finally:
        os.close(fd)
    assert descriptors() == before
