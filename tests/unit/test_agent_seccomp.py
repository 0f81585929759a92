"""The denial of AF_VSOCK against profiles of every shape, by what the joined profile would do."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from gcsagent.agent.seccomp import DENYING, WAYS_AROUND, deny_vsock
from protocol.errors import Code, RpcError

Json = dict[str, Any]
ALLOW, ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
FAMILIES = [*range(64), 255, 1 << 16 | 40, 0x8000_0028, 0xFFFF_FFFF]
RUBBISH = 0x1_0000_0000


def joined(profile: Any) -> Json:
    made = deny_vsock({"linux": {"seccomp": profile, "cgroupsPath": "/x"}})
    assert made["linux"]["cgroupsPath"] == "/x"
    return dict(made["linux"]["seccomp"])


def holds(condition: Json, argument: int) -> bool:
    value, second = condition["value"], condition.get("valueTwo", 0)
    return bool(
        {
            "SCMP_CMP_EQ": argument == value,
            "SCMP_CMP_NE": argument != value,
            "SCMP_CMP_LT": argument < value,
            "SCMP_CMP_LE": argument <= value,
            "SCMP_CMP_MASKED_EQ": argument & value == second,
        }[condition["op"]]
    )


def matches(rule: Json, arguments: tuple[int, ...]) -> bool:
    args = rule.get("args") or []
    indices = [each["index"] for each in args]
    combine = all if len(set(indices)) == len(indices) else any  # as runc does
    return combine([holds(each, arguments[each["index"]]) for each in args])


def actions(profile: Json, name: str, *arguments: int) -> set[str]:
    """What any rule says of the call: unconditional ones first, as libseccomp has it; else the default."""
    rules = [rule for rule in profile.get("syscalls") or [] if name in rule["names"]]
    unconditional = {rule["action"] for rule in rules if not rule.get("args")}
    conditional = {rule["action"] for rule in rules if rule.get("args") and matches(rule, arguments)}
    return unconditional or conditional or {profile["defaultAction"]}


def socket_rule(*args: Json, action: str = ALLOW, names: tuple[str, ...] = ("socket",)) -> Json:
    return {"names": list(names), "action": action, "args": list(args)}


def compare(op: str, value: int, second: int = 0, index: int = 0) -> Json:
    return {"index": index, "value": value, "valueTwo": second, "op": f"SCMP_CMP_{op}"}


PROFILES: dict[str, Json] = {
    "empty": {"defaultAction": ALLOW},
    "null": {"defaultAction": ALLOW, "syscalls": None},
    "deny all": {"defaultAction": ERRNO},
    "kill all": {"defaultAction": "SCMP_ACT_KILL"},
    "allow": {"defaultAction": ERRNO, "syscalls": [{"names": ["read", "socket"], "action": ALLOW}]},
    "log": {"defaultAction": ALLOW, "syscalls": [{"names": ["socket"], "action": "SCMP_ACT_LOG"}]},
    "notify": {"defaultAction": "SCMP_ACT_NOTIFY", "syscalls": [socket_rule(action="SCMP_ACT_TRACE")]},
    "eq 40": {"defaultAction": ERRNO, "syscalls": [socket_rule(compare("EQ", 40))]},
    "eq 1": {"defaultAction": ERRNO, "syscalls": [socket_rule(compare("EQ", 1))]},
    "not 40": {"defaultAction": ERRNO, "syscalls": [socket_rule(compare("NE", 40))]},
    "not 16": {"defaultAction": ERRNO, "syscalls": [socket_rule(compare("NE", 16))]},
    "masked": {"defaultAction": ERRNO, "syscalls": [socket_rule(compare("MASKED_EQ", 0xF8, 40))]},
    "masked off": {"defaultAction": ERRNO, "syscalls": [socket_rule(compare("MASKED_EQ", 1, 1))]},
    "below": {"defaultAction": ERRNO, "syscalls": [socket_rule(compare("LT", 40))]},
    "up to": {"defaultAction": ERRNO, "syscalls": [socket_rule(compare("LE", 39))]},
    "stream": {"defaultAction": ERRNO, "syscalls": [socket_rule(compare("EQ", 1, index=1))]},
    "either": {"defaultAction": ERRNO, "syscalls": [socket_rule(compare("EQ", 1), compare("NE", 2))]},
    "denied": {"defaultAction": ALLOW, "syscalls": [socket_rule(compare("EQ", 3), action=ERRNO)]},
    "around": {
        "defaultAction": ERRNO,
        "syscalls": [socket_rule(names=("read", *WAYS_AROUND)), socket_rule(names=WAYS_AROUND)],
    },
}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_vsock_is_denied_and_every_other_family_stays_as_it_was(profile: Json) -> None:
    before = copy.deepcopy(profile)
    made = joined(profile)
    assert profile == before
    for kind in (1, 2):
        for family in (40, RUBBISH | 40, 0xFFFF_FFFF_0000_0028):
            assert actions(made, "socket", family, kind) <= DENYING, (family, kind)
        for family in set(FAMILIES) - {40}:
            assert actions(made, "socket", family, kind) == actions(profile, "socket", family, kind), family
    for name in WAYS_AROUND:
        assert actions(made, name, 1, 0) <= DENYING
    assert actions(made, "read", 0, 0) == actions(profile, "read", 0, 0)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_no_rules_contradict_each_other_and_none_is_the_default(profile: Json) -> None:
    """Of two such rules libseccomp keeps whichever came first; one that is the default, runc drops."""
    made = joined(profile)
    for family in {40, RUBBISH | 40, *FAMILIES} - {3}:
        assert len(actions(made, "socket", family, 1)) == 1
    around = next(rule for rule in made["syscalls"] if "socketcall" in rule["names"])
    default = made["defaultAction"], made.get("defaultErrnoRet", 1)
    assert (around["action"], around["errnoRet"]) != default


def test_without_a_profile_all_else_is_allowed() -> None:
    made = deny_vsock({"process": {}})["linux"]["seccomp"]
    assert made["defaultAction"] == ALLOW
    assert len(made["syscalls"]) == 2
    if made["architectures"]:
        assert len(made["architectures"]) > 1


def test_a_profiles_architectures_stay_its_own() -> None:
    """Those it does not list are killed: adding any would allow more."""
    profile = {"defaultAction": ALLOW, "architectures": ["SCMP_ARCH_X86_64"], "flags": ["SPEC_ALLOW"]}
    made = joined(profile)
    assert (made["architectures"], made["flags"]) == (["SCMP_ARCH_X86_64"], ["SPEC_ALLOW"])


@pytest.mark.parametrize(
    "profile, field",
    [
        ([], ""),
        ({"syscalls": [1]}, ""),
        ({"defaultAction": 1}, ""),
        ({"defaultAction": ALLOW, "syscalls": {}}, ".syscalls"),
        ({"defaultAction": ALLOW, "syscalls": [1]}, ".syscalls"),
        ({"defaultAction": ALLOW, "syscalls": [{"names": "socket"}]}, ".syscalls[0].names"),
        ({"defaultAction": ALLOW, "syscalls": [{"names": ["socket"], "args": 1}]}, ".syscalls[0].args"),
        ({"defaultAction": ERRNO, "syscalls": [socket_rule(compare("GT", 1))]}, ".syscalls[0].args"),
        ({"defaultAction": ERRNO, "syscalls": [socket_rule(compare("LE", 40))]}, ".syscalls[0].args"),
        ({"defaultAction": ERRNO, "syscalls": [socket_rule(compare("EQ", "4"))]}, ".syscalls[0].args"),  # type: ignore[arg-type]
    ],
)
def test_a_profile_that_is_not_understood_names_the_field(profile: Any, field: str) -> None:
    with pytest.raises(RpcError) as caught:
        joined(profile)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert caught.value.details["field"] == f"spec.linux.seccomp{field}"
