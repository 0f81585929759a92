"""The words of a seccomp profile; what becomes of its rules is seccomp.py's."""

from __future__ import annotations

from gcsagent.agent.oci.look import U32, U64, Json, choice, invalid, mapping, maps, number, texts
from gcsagent.agent.oci.names import SECCOMP_ACTIONS, SECCOMP_ARCHITECTURES, SECCOMP_OPERATORS

_FIELD = "spec.linux.seccomp"


def check_seccomp(linux: Json) -> None:
    profile = mapping(linux.get("seccomp"), _FIELD)
    if not profile.get("defaultAction") and not profile.get("syscalls"):
        return  # no profile at all, for runc as well
    choice(profile.get("defaultAction"), f"{_FIELD}.defaultAction", SECCOMP_ACTIONS, "action")
    number(profile.get("defaultErrnoRet"), f"{_FIELD}.defaultErrnoRet", 0, 4095)
    for index, name in enumerate(texts(profile.get("architectures"), f"{_FIELD}.architectures")):
        choice(name, f"{_FIELD}.architectures[{index}]", SECCOMP_ARCHITECTURES, "architecture")
    texts(profile.get("flags"), f"{_FIELD}.flags")
    for rule, where in maps(profile.get("syscalls"), f"{_FIELD}.syscalls"):
        _check_rule(rule, where)


def _check_rule(rule: Json, where: str) -> None:
    if rule.get("names") is None:
        raise invalid(f"{where}.names", "must be an array of strings")
    texts(rule["names"], f"{where}.names")
    choice(rule.get("action"), f"{where}.action", SECCOMP_ACTIONS, "action")
    number(rule.get("errnoRet"), f"{where}.errnoRet", 0, U32)
    for arg, field in maps(rule.get("args"), f"{where}.args"):
        number(arg.get("index"), f"{field}.index", 0, 5)
        for key in ("value", "valueTwo"):
            number(arg.get(key), f"{field}.{key}", 0, U64)
        choice(arg.get("op"), f"{field}.op", SECCOMP_OPERATORS, "comparison")
