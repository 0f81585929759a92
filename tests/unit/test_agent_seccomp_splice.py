"""Splices that may wait, into a standard output, against profiles of every shape."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from gcsagent.agent.seccomp import deny_vsock
from gcsagent.agent.seccomp_splice import spare_pipes

Json = dict[str, Any]
ALLOW, ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
NONBLOCK = os.SPLICE_F_NONBLOCK
READ = {"names": ["read"], "action": ALLOW}
SPLICE = {"names": ["read", "splice", "write"], "action": ALLOW}
FIRST_EQUAL = {"index": 0, "value": 0, "valueTwo": 0, "op": "SCMP_CMP_EQ"}


def spared(profile: Json) -> Json:
    made = spare_pipes(deny_vsock({"linux": {"seccomp": profile}, "hostname": "x"}))
    assert made["hostname"] == "x"
    return dict(made["linux"]["seccomp"])


def answers(profile: Json, fd_out: int, flags: int) -> list[tuple[str, int | None]]:
    """Of every rule about such a splice; libseccomp has one without arguments win."""
    rules = [rule for rule in profile["syscalls"] if "splice" in rule["names"]]
    assert all(rule.get("args") for rule in rules), rules
    return [
        (rule["action"], rule.get("errnoRet"))
        for rule in rules
        if all(_holds(each, {2: fd_out, 5: flags}[each["index"]]) for each in rule["args"])
    ]


def _holds(condition: Json, argument: int) -> bool:
    value = condition["value"]
    match condition["op"]:
        case "SCMP_CMP_EQ":
            return bool(argument == value)
        case "SCMP_CMP_GT":
            return bool(argument > value)
    assert condition["op"] == "SCMP_CMP_MASKED_EQ"
    return bool(argument & value == condition["valueTwo"])


@pytest.mark.parametrize(
    "profile, allowed",
    [
        ({"defaultAction": ALLOW}, []),
        ({"defaultAction": ALLOW, "syscalls": [READ]}, []),
        ({"defaultAction": ERRNO, "syscalls": [SPLICE]}, [(ALLOW, None)]),
        ({"defaultAction": ALLOW, "syscalls": [SPLICE]}, [(ALLOW, None)]),
    ],
)
def test_one_rule_decides_each_call(profile: Json, allowed: list[Any]) -> None:
    made = spared(profile)
    for fd in (0, 1, 2, 3, 700):
        for flags in (0, os.SPLICE_F_MOVE, NONBLOCK, NONBLOCK | os.SPLICE_F_MOVE):
            waits = fd in (1, 2) and not flags & NONBLOCK
            assert answers(made, fd, flags) == ([(ERRNO, errno.EINVAL)] if waits else allowed), (fd, flags)
    others = [rule for rule in made["syscalls"] if "read" in rule["names"]]
    assert all(not rule.get("args") for rule in others)
    assert len(others) == ("syscalls" in profile)


def test_conditions_begin_with_the_same_argument() -> None:
    made = spared({"defaultAction": ERRNO, "syscalls": [SPLICE]})
    rules = [rule for rule in made["syscalls"] if "splice" in rule["names"]]
    assert {rule["args"][0]["index"] for rule in rules} == {2}


@pytest.mark.parametrize(
    "profile",
    [
        {"defaultAction": ERRNO},
        {"defaultAction": ALLOW, "syscalls": [{"names": ["splice"], "action": ERRNO}]},
        {"defaultAction": ERRNO, "syscalls": [{**SPLICE, "args": [FIRST_EQUAL]}]},
    ],
)
def test_a_profile_that_denies_or_looks_by_itself_is_left_alone(profile: Json) -> None:
    made = deny_vsock({"linux": {"seccomp": profile}})
    assert spare_pipes(made) == made
