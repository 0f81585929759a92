"""Containers without AF_VSOCK: the rules that keep them off the agent's own way to the host.

Inside a guest, vsock knows no namespaces: any process that may open such a socket can talk to the host, and
to the agent. A socket is made by socket(2), by io_uring (IORING_OP_SOCKET, which no filter sees), and on
32-bit x86 by socketcall(2), whose arguments lie behind a pointer; all three are closed.

What shapes the rules:

- socket's family is an int and a filter sees 64-bit registers: 0x1_0000_0028 is AF_VSOCK too. So only the
  lower half is compared, by SCMP_CMP_MASKED_EQ.
- For one syscall, libseccomp lets a rule without arguments win over any with arguments. A profile that allows
  socket gets that rule replaced by ones for every family but this; there is no "masked not equal", so they
  go bit by bit.
- On 32-bit x86 libseccomp turns a rule for socket into one for socketcall's sub-call as well, without the
  family. Only a denial of socketcall without arguments wins over that.
- A rule whose action is the default one is dropped by runc; the denial must not be such a rule.
- Architectures a profile does not list are killed by libseccomp, so none are added to a caller's own.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

from protocol.errors import Code, RpcError

AF_VSOCK = 40
WAYS_AROUND = ("socketcall", "io_uring_setup", "io_uring_enter", "io_uring_register")
DENYING = frozenset(
    f"SCMP_ACT_{action}" for action in ("KILL", "KILL_PROCESS", "KILL_THREAD", "TRAP", "ERRNO")
)
"""Actions that never run the syscall; a tracer or a listener (TRACE, NOTIFY) may."""
ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}
"""What a machine runs besides its own, by uname -m: allowed in a profile of ours, with the same rules."""

_FIELD = "spec.linux.seccomp"
_INT = 0xFFFF_FFFF

Json = dict[str, Any]


def deny_vsock(spec: Json) -> Json:
    """``spec`` with AF_VSOCK denied (EAFNOSUPPORT), and all else as its own profile has it, if it has one.

    Raises INVALID_ARGUMENT when its profile is not understood well enough to be sure.
    """
    linux = spec.get("linux") or {}
    profile = linux.get("seccomp")
    if profile is None or _is_none(profile):
        profile = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ARCHITECTURES.get(os.uname().machine, []),
        }
    return {**spec, "linux": {**linux, "seccomp": _merged(profile)}}


def _is_none(profile: Any) -> bool:
    """runc takes a profile without an action and without rules for none at all (specconv)."""
    return isinstance(profile, dict) and not profile.get("defaultAction") and not profile.get("syscalls")


def _merged(profile: Any) -> Json:
    if not isinstance(profile, dict) or not isinstance(profile.get("defaultAction"), str):
        raise _invalid("", "must be a map with a 'defaultAction'")
    rules = list(_denials(profile))
    for index, rule in enumerate(_maps(profile.get("syscalls"), ".syscalls")):
        rules += _narrowed(rule, f".syscalls[{index}]")
    return {**profile, "syscalls": rules}


def _denials(profile: Json) -> Iterator[Json]:
    default = profile["defaultAction"], profile.get("defaultErrnoRet", errno.EPERM)
    denied = errno.ENOSYS if default == ("SCMP_ACT_ERRNO", errno.EPERM) else errno.EPERM
    family = _condition(_INT, AF_VSOCK)
    yield errno_rule(["socket"], errno.EAFNOSUPPORT, args=[family])
    yield errno_rule(list(WAYS_AROUND), denied)


def errno_rule(names: list[str], number: int, **more: Any) -> Json:
    return {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": number, **more}


def _narrowed(rule: Json, where: str) -> Iterator[Json]:
    """What stays of a rule when it must not let AF_VSOCK through."""
    names = rule.get("names")
    if not isinstance(names, list):
        raise _invalid(f"{where}.names", "must be an array of strings")
    if rule.get("action") in DENYING:
        yield rule
        return
    others = [name for name in names if name != "socket" and name not in WAYS_AROUND]
    if others:
        yield {**rule, "names": others}
    if "socket" in names:
        for args in _alternatives(_maps(rule.get("args"), f"{where}.args"), f"{where}.args"):
            yield {**rule, "names": ["socket"], "args": args}


def _alternatives(args: list[Json], where: str) -> Iterator[list[Json]]:
    """Argument lists, any of which may match, that together are ``args`` without AF_VSOCK.

    runc takes conditions on one argument for alternatives, and then all of the rule's.
    """
    indices = [arg.get("index") for arg in args]
    for group in [args] if len(set(indices)) == len(indices) else [[arg] for arg in args]:
        family = next((arg for arg in group if arg.get("index") == 0), None)
        rest = [arg for arg in group if arg.get("index") != 0]
        for condition in _other_families(family, where):
            yield [condition, *rest]


def _other_families(condition: Json | None, where: str) -> list[Json]:
    """Conditions for the families but AF_VSOCK that ``condition`` is true of; None is true of all."""
    if condition is None:
        return _all_but(0, 0, AF_VSOCK)
    value, second = condition.get("value", 0), condition.get("valueTwo", 0)
    if not isinstance(value, int) or not isinstance(second, int):
        raise _invalid(where, "'value' and 'valueTwo' must be numbers")
    match condition.get("op"):
        case "SCMP_CMP_EQ":
            return [] if value & _INT == AF_VSOCK else [condition]
        case "SCMP_CMP_MASKED_EQ":
            if (second ^ AF_VSOCK) & value & _INT:
                return [condition]
            return _all_but(value, second, AF_VSOCK)
        case "SCMP_CMP_NE":
            return _neither(value)
        case "SCMP_CMP_LT" if value <= AF_VSOCK:
            return [condition]
        case "SCMP_CMP_LE" if value < AF_VSOCK:
            return [condition]
    raise _invalid(
        where,
        "this comparison of socket's family cannot be joined with the denial of AF_VSOCK: "
        "compare by SCMP_CMP_EQ, SCMP_CMP_NE or SCMP_CMP_MASKED_EQ, or set 'allow_vsock'",
    )


def _neither(family: int) -> list[Json]:
    found = _all_but(0, 0, AF_VSOCK)
    if family > _INT or family == AF_VSOCK:
        return found
    return [
        part
        for each in found
        for part in (
            [each]
            if (each["valueTwo"] ^ family) & each["value"]
            else _all_but(each["value"], each["valueTwo"], family)
        )
    ]


def _all_but(mask: int, datum: int, point: int) -> list[Json]:
    """Conditions, never two true at once: ``argument & mask == datum``, its lower half not ``point``."""
    found = []
    for bit in (1 << number for number in range(32)):
        if mask & bit:
            continue
        mask |= bit
        found.append(_condition(mask, datum & ~bit | ~point & bit))
        datum = datum & ~bit | point & bit
    return found


def _condition(mask: int, datum: int) -> Json:
    """libseccomp's SCMP_CMP_MASKED_EQ: the mask comes first (seccomp_rule_add(3))."""
    return {"index": 0, "value": mask, "valueTwo": datum, "op": "SCMP_CMP_MASKED_EQ"}


def _maps(value: Any, where: str) -> list[Json]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise _invalid(where, "must be an array of maps")
    return value


def _invalid(where: str, problem: str) -> RpcError:
    return RpcError(Code.INVALID_ARGUMENT, f"{_FIELD}{where}: {problem}", field=f"{_FIELD}{where}")
