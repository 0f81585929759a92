"""The values of ``run``'s options, from docker's notations to what the spec holds. Raise ValueError."""

from __future__ import annotations

import re
from typing import Any

from gcsagent.host.cli.resources import parse_size
from gcsagent.host.spec import ALL_CAPABILITIES

Json = dict[str, Any]

RLIMITS = "as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack"
NO_LIMIT = (1 << 64) - 1
MAX_ID = (1 << 32) - 2
_PROPAGATIONS = "private rprivate shared rshared slave rslave"
_MAPPING = re.compile(r"([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})\Z", re.ASCII)


def capability(text: str) -> str:
    """``NET_ADMIN``, ``cap_net_admin`` or ``ALL``."""
    name = text.upper()
    if name == "ALL":
        return name
    full = name if name.startswith("CAP_") else f"CAP_{name}"
    if full not in ALL_CAPABILITIES:
        raise ValueError("no capability of Linux; capabilities(7) has them, without CAP_ if you like")
    return full


def user(text: str) -> str:
    name, colon, group = text.partition(":")
    if not name or (colon and not group):
        raise ValueError("give USER or USER:GROUP, names or numbers")
    return text


def ulimit(text: str) -> Json:
    """``nofile=1024`` or ``nofile=1024:2048``; -1 is no limit."""
    name, equals, value = text.partition("=")
    soft, colon, hard = value.partition(":")
    if not equals or name not in RLIMITS.split():
        raise ValueError(f"give NAME=SOFT[:HARD] with one of: {RLIMITS}")
    low, high = _limit(soft), _limit(hard if colon else soft)
    if low > high:
        raise ValueError("the soft limit is above the hard one")
    return {"type": f"RLIMIT_{name.upper()}", "soft": low, "hard": high}


def _limit(text: str) -> int:
    if text in ("-1", "unlimited"):
        return NO_LIMIT
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) <= NO_LIMIT):
        raise ValueError("a limit is a number, or -1 for none")
    return int(text)


def volume(text: str) -> Json:
    """``SRC:DST[:ro|rw|rslave,...]``: a directory or file of the guest's."""
    source, _, rest = text.partition(":")
    target, _, flags = rest.partition(":")
    if not source or not target.startswith("/"):
        raise ValueError("give SRC:DST[:ro], DST an absolute path in the container")
    mode, propagation = "rw", "rprivate"
    for flag in filter(None, flags.split(",")):
        if flag in ("ro", "rw"):
            mode = flag
        elif flag in _PROPAGATIONS.split():
            propagation = flag
        else:
            raise ValueError(f"{flag!r} is none of: ro rw {_PROPAGATIONS}")
    return bind(source, target, mode == "ro", propagation)


def bind(source: str, target: str, read_only: bool, propagation: str = "rprivate") -> Json:
    options = ["rbind", "ro" if read_only else "rw", propagation]
    return {"destination": target, "type": "bind", "source": source, "options": options}


def tmpfs(text: str) -> Json:
    """``DST`` or ``DST:size=64m,mode=1777``."""
    target, _, options = text.partition(":")
    if not target.startswith("/"):
        raise ValueError("give DST[:OPTIONS], DST an absolute path in the container")
    given = [option for option in options.split(",") if option]
    defaults = ["nosuid", "nodev", "noexec"]
    kept = [option for option in defaults if option.removeprefix("no") not in given and option not in given]
    return {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": kept + given}


def mount(text: str) -> Json:
    """``type=bind,source=/a,target=/b,readonly`` or ``type=tmpfs,target=/t,tmpfs-size=64m``."""
    values: dict[str, str] = {}
    for word in text.split(","):
        key, _, value = word.partition("=")
        key = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}.get(key, key)
        values[key] = value
    kind, target = values.pop("type", "bind"), values.pop("target", "")
    read_only = values.pop("readonly", "false") in ("", "true", "1")
    if not target.startswith("/"):
        raise ValueError("target= must be an absolute path in the container")
    if kind == "bind":
        source = values.pop("source", "")
        propagation = values.pop("bind-propagation", "rprivate")
        if not source or propagation not in _PROPAGATIONS.split():
            raise ValueError(f"a bind needs source=, and bind-propagation= is one of: {_PROPAGATIONS}")
        made = bind(source, target, read_only, propagation)
    elif kind == "tmpfs":
        sizes = {"size": values.pop("tmpfs-size", ""), "mode": values.pop("tmpfs-mode", "")}
        options = [f"{key}={value}" for key, value in sizes.items() if value]
        made = tmpfs(f"{target}:{','.join([*options, *(['ro'] if read_only else [])])}")
    else:
        raise ValueError(f"type={kind} is neither bind nor tmpfs")
    if values:
        raise ValueError(f"{next(iter(values))!r} is no key of a {kind} mount")
    return made


def device(text: str) -> Json:
    """``/dev/a[:/dev/b][:rwm]``: the guest's device, whose numbers the agent fills in."""
    source, *rest = text.split(":")
    access = rest.pop() if rest and rest[-1] and not set(rest[-1]) - set("rwm") else "rwm"
    target = rest.pop() if rest else source
    if rest or not source.startswith("/") or not target.startswith("/"):
        raise ValueError("give /dev/NAME[:/dev/NAME-INSIDE][:rwm]")
    return {"path": target, "hostPath": source, "access": access}


def pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError("give KEY=VALUE")
    return key, value


def mapping(text: str) -> Json:
    """``INSIDE:OUTSIDE:COUNT``."""
    match = _MAPPING.match(text)
    if match is None:
        raise ValueError("give INSIDE:OUTSIDE:COUNT, like 0:100000:65536")
    inside, outside, size = (int(number) for number in match.groups())
    if size < 1 or max(inside, outside) + size > MAX_ID + 1:
        raise ValueError("goes beyond the last id there is, or maps none")
    return {"containerID": inside, "hostID": outside, "size": size}


def truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("give true or false")
    return text == "true"


def size(text: str) -> int:
    """docker writes ``64m``, ``64mb`` and ``64MiB`` alike."""
    return parse_size(re.sub(r"(?i)(?<=[kmg])i?b\Z", "", text))
