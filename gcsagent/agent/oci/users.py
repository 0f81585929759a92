"""Numbers for the names of users and groups, out of the container's own /etc/passwd and /etc/group.

``process.user.username`` is ``USER[:GROUP]``, each a name or a number, and ``additionalGids`` may hold names.
What follows from a user is what engines make of ``--user``: its group and its supplementary groups unless
a group is given, and its home directory. Formats: passwd(5), group(5).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from gcsagent.agent.inroot import read_inside
from gcsagent.agent.oci.check_process import MAX_GROUPS, MAX_ID
from gcsagent.agent.oci.look import Json, invalid, not_found

PASSWD, GROUP = "/etc/passwd", "/etc/group"
MAX_FILE = 4 << 20
"""Bytes of either: 50,000 users."""

_NUMBER = re.compile(r"[0-9]{1,10}\Z", re.ASCII)


class Account(NamedTuple):
    name: str
    uid: int
    gid: int
    home: str


class Group(NamedTuple):
    name: str
    gid: int
    members: frozenset[str]


def settle_user(process: Json, where: str, root: int) -> None:
    """Replaces names by numbers in ``process``, which is the field ``where``; ``root`` is a directory's fd.

    HOME is set where the runtime, which goes by the number, would find another one. Raises NOT_FOUND for a
    user or group that is not there, naming the file; INVALID_ARGUMENT.
    """
    user = process["user"]
    wanted = user.pop("username", None)
    if wanted:
        _settle(process, wanted, f"{where}.user.username", root)
    groups = user.get("additionalGids")
    if groups and any(isinstance(group, str) for group in groups):
        field = f"{where}.user.additionalGids"
        known = _groups(root, field)
        numbers = [
            _gid(group, known, f"{field}[{index}]") if isinstance(group, str) else group
            for index, group in enumerate(groups)
        ]
        user["additionalGids"] = list(dict.fromkeys(numbers))


def has_names(process: Json) -> bool:
    """Whether there is anything to look up."""
    user = process["user"]
    return bool(user.get("username")) or any(
        isinstance(group, str) for group in user.get("additionalGids") or ()
    )


def _settle(process: Json, wanted: str, field: str, root: int) -> None:
    name, colon, group = wanted.partition(":")
    if not name or (colon and not group):
        raise invalid(field, f"{wanted!r} must be USER or USER:GROUP, names or numbers")
    user, accounts = process["user"], _accounts(root, field)
    account = _account(name, accounts, field)
    user["uid"], user["gid"] = account.uid, account.gid
    if group:
        user["gid"] = _gid(group, _groups(root, field), field)
    elif account.name:
        own = [each.gid for each in _groups(root, field) if account.name in each.members]
        named = user.get("additionalGids") or []
        user["additionalGids"] = list(dict.fromkeys([*own, *named]))[:MAX_GROUPS]
    first = next((each.home for each in accounts if each.uid == account.uid), "")
    env = process.setdefault("env", [])
    if account.home != first and not any(entry.startswith("HOME=") for entry in env):
        env.append(f"HOME={account.home}")


def _account(name: str, accounts: list[Account], field: str) -> Account:
    number = _number(name, field)
    for account in accounts:
        if account.uid == number if number is not None else account.name == name:
            return account
    if number is None:
        raise not_found(field, f"there is no user {name!r} in the container's {PASSWD}")
    return Account("", number, 0, "")


def _gid(name: str, groups: list[Group], field: str) -> int:
    number = _number(name, field)
    if number is not None:
        return number
    for group in groups:
        if group.name == name:
            return group.gid
    raise not_found(field, f"there is no group {name!r} in the container's {GROUP}")


def _number(text: str, field: str) -> int | None:
    if not _NUMBER.match(text):
        return None
    if int(text) > MAX_ID:
        raise invalid(field, f"{text} is above the largest id, {MAX_ID}")
    return int(text)


def _accounts(root: int, field: str) -> list[Account]:
    return [
        Account(parts[0], int(parts[2]), int(parts[3]), parts[5])
        for parts in _lines(root, PASSWD, field)
        if len(parts) >= 7 and parts[0] and _is_id(parts[2]) and _is_id(parts[3])
    ]


def _groups(root: int, field: str) -> list[Group]:
    return [
        Group(parts[0], int(parts[2]), frozenset(filter(None, parts[3].split(","))))
        for parts in _lines(root, GROUP, field)
        if len(parts) >= 4 and parts[0] and _is_id(parts[2])
    ]


def _is_id(text: str) -> bool:
    return _NUMBER.match(text) is not None and int(text) <= MAX_ID


def _lines(root: int, path: str, field: str) -> Iterator[list[str]]:
    """Fields of each line; a file that is not there has none, and lines that are none are passed over."""
    try:
        data = read_inside(root, path, MAX_FILE)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return
        reason = f"larger than {MAX_FILE} bytes" if error.errno == errno.EFBIG else error.strerror
        raise invalid(field, f"the container's {path} cannot be read: {reason}") from error
    for line in data.decode(errors="surrogateescape").splitlines():
        if line and not line.startswith("#") and "\0" not in line:
            yield line.strip().split(":")


def open_root(path: str) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
