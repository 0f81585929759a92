"""The process object, of a container and of an exec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gcsagent.agent.oci.look import (
    U32,
    U64,
    Json,
    choice,
    flag,
    invalid,
    items,
    mapping,
    maps,
    number,
    required,
    text,
    texts,
)
from gcsagent.agent.oci.names import ALL, CAPABILITIES, CAPABILITY_SETS, RLIMITS

MAX_ID = U32 - 1
"""The largest uid or gid: the one above it means "no change" to the kernel (setresuid(2))."""
MAX_GROUPS = 65536
"""NGROUPS_MAX, setgroups(2)."""
MAX_STRINGS = 65536
MAX_STRING = 128 * 1024 - 1
"""Bytes of one argument or variable: MAX_ARG_STRLEN, execve(2)."""


_KNOWN = frozenset({ALL, *CAPABILITIES})


def check_process(process: Json, where: str) -> None:
    """Also puts in what every runtime demands: a working directory and a user."""
    _check_args(process, where)
    if process.get("cwd") is None:
        process["cwd"] = "/"
    absolute_in_container(process["cwd"], f"{where}.cwd")
    if process.get("env") is None:
        process["env"] = []
    check_env(process["env"], f"{where}.env")
    if process.get("user") is None:
        process["user"] = {"uid": 0, "gid": 0}
    _check_user(process["user"], f"{where}.user")
    _check_capabilities(process.get("capabilities"), f"{where}.capabilities")
    _check_rlimits(process.get("rlimits"), f"{where}.rlimits")
    flag(process.get("noNewPrivileges"), f"{where}.noNewPrivileges")
    number(process.get("oomScoreAdj"), f"{where}.oomScoreAdj", -1000, 1000)
    text(process.get("apparmorProfile"), f"{where}.apparmorProfile")
    text(process.get("selinuxLabel"), f"{where}.selinuxLabel")


def absolute_in_container(value: Any, field: str) -> None:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise invalid(field, "must be an absolute path in the container")
    text(value, field)


def _check_args(process: Json, where: str) -> None:
    field = f"{where}.args"
    if not isinstance(process.get("args"), list):
        raise invalid(field, "must be an array of strings")
    args = texts(process["args"], field, MAX_STRINGS)
    if not args or not args[0]:
        raise invalid(field, "must name the program to execute")
    for index, arg in enumerate(args):
        _check_length(arg, f"{field}[{index}]")


def check_env(env: Any, field: str) -> None:
    if not isinstance(env, list):
        raise invalid(field, "must be an array of strings")
    for index, entry in enumerate(texts(env, field, MAX_STRINGS)):
        where = f"{field}[{index}]"
        if "=" not in entry[1:]:
            raise invalid(where, "must be NAME=VALUE")
        _check_length(entry, where)


def _check_length(value: str, field: str) -> None:
    if len(value.encode()) > MAX_STRING:
        raise invalid(field, f"has more than {MAX_STRING} bytes, the most the kernel takes")


def _check_user(value: Any, field: str) -> None:
    user = mapping(value, field)
    number(user.get("uid"), f"{field}.uid", 0, MAX_ID)
    number(user.get("gid"), f"{field}.gid", 0, MAX_ID)
    number(user.get("umask"), f"{field}.umask", 0, 0o777)
    text(user.get("username"), f"{field}.username")
    for group, where in items(user.get("additionalGids"), f"{field}.additionalGids", MAX_GROUPS):
        if isinstance(group, str):
            text(group, where)
        else:
            required(group, where, 0, MAX_ID)


def _check_capabilities(value: Any, field: str) -> None:
    for kind, names in mapping(value, field).items():
        if kind not in CAPABILITY_SETS:
            continue
        check_capabilities(texts(names, f"{field}.{kind}"), f"{field}.{kind}")


def check_capabilities(names: Sequence[str], field: str) -> None:
    if not _KNOWN.issuperset(names):
        for index, name in enumerate(names):
            choice(name, f"{field}[{index}]", _KNOWN, "capability")


def _check_rlimits(value: Any, field: str) -> None:
    seen = set()
    for limit, where in maps(value, field):
        kind = choice(limit.get("type"), f"{where}.type", RLIMITS, "resource limit")
        if kind in seen:
            raise invalid(f"{where}.type", f"{kind} is there twice")
        seen.add(kind)
        hard = required(limit.get("hard", 0), f"{where}.hard", 0, U64)
        soft = required(limit.get("soft", 0), f"{where}.soft", 0, U64)
        if soft > hard:
            raise invalid(f"{where}.soft", f"is {soft}, above the hard limit {hard}")
