"""Containers whose own splices do not keep their pipes from us.

splice(2) from a socket into a pipe waits for the socket with the pipe's lock in its hands, and who reads that
pipe waits for the lock, out of any signal's reach: the whole agent (supervisor/heldup.py ends that, and
whoever it is with it). Programs do so in good faith: Rust's ``io::copy`` splices to a standard output that is
a pipe. So a splice that may wait, into descriptor 1 or 2, is answered with EINVAL, which is what a program
gets where output goes to a terminal or a file opened for appending: it copies by read and write.

What a program means to do to us it still can, through another descriptor of that pipe.

A rule without arguments wins over any with arguments (seccomp.py); one that allows splice is replaced by
ones for every other call. All their conditions begin with the same argument: libseccomp does not come back
from a chain that has failed behind its first.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

from gcsagent.agent.seccomp import DENYING, errno_rule

Json = dict[str, Any]

_FD_OUT, _FLAGS = 2, 5
_STANDARD = (1, 2)


def spare_pipes(spec: Json) -> Json:
    """``spec``, which :func:`seccomp.deny_vsock` has made, with such splices denied.

    As it is where its profile denies splice, or looks at its arguments by itself.
    """
    profile = spec["linux"]["seccomp"]
    rules = profile["syscalls"]
    splices = [rule for rule in rules if "splice" in rule["names"]]
    if any(rule.get("args") or rule["action"] in DENYING for rule in splices):
        return spec
    if profile["defaultAction"] in DENYING and not splices:
        return spec
    narrowed = [*_denials(), *(part for rule in rules for part in _narrowed(rule))]
    return {**spec, "linux": {**spec["linux"], "seccomp": {**profile, "syscalls": narrowed}}}


def _denials() -> Iterator[Json]:
    for args in _into_standard(waiting=True):
        yield errno_rule(["splice"], errno.EINVAL, args=args)


def _narrowed(rule: Json) -> Iterator[Json]:
    others = [name for name in rule["names"] if name != "splice"]
    if others:
        yield {**rule, "names": others}
    if len(others) == len(rule["names"]):
        return
    elsewhere = [[_compare(_FD_OUT, "EQ", 0)], [_compare(_FD_OUT, "GT", max(_STANDARD))]]
    for args in [*_into_standard(waiting=False), *elsewhere]:
        yield {**rule, "names": ["splice"], "args": args}


def _into_standard(*, waiting: bool) -> list[list[Json]]:
    flags = 0 if waiting else os.SPLICE_F_NONBLOCK
    how = _compare(_FLAGS, "MASKED_EQ", os.SPLICE_F_NONBLOCK, flags)
    return [[_compare(_FD_OUT, "EQ", number), how] for number in _STANDARD]


def _compare(index: int, operator: str, value: int, second: int = 0) -> Json:
    return {"index": index, "value": value, "valueTwo": second, "op": f"SCMP_CMP_{operator}"}
