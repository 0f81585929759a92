"""What single values must look like: used as field checks by :mod:`protocol.schema`."""

from __future__ import annotations

import re
from typing import Annotated

from protocol.dataclass import dataclass
from protocol.limits import MAX_CHUNK, MAX_DEADLINE_MS, MAX_ID, MAX_LABELS, MAX_STREAM_OFFSET

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_SIGNAL = re.compile(r"(SIG)?[A-Z][A-Z0-9+-]{1,11}\Z")
INIT = "init"
"""Process id of a container's init process; no exec may take it."""


def identifier(value: str) -> str | None:
    """Ids become directory and cgroup names: no slash, no leading dot or dash, 1 to 128 characters."""
    if not value:
        return "must not be empty"
    if len(value) > MAX_ID:
        return f"must be at most {MAX_ID} characters, not {len(value)}"
    if not _ID.match(value):
        return "must be letters, digits, '_', '.' or '-' and start with a letter or digit"
    return None


@dataclass(frozen=True, slots=True)
class Between:
    """Both ends included."""

    low: int
    high: int

    def __call__(self, value: int) -> str | None:
        if self.low <= value <= self.high:
            return None
        return f"must be between {self.low} and {self.high}, not {value}"


def absolute_path(value: str) -> str | None:
    """A path in the guest; NUL ends a C string, so it cannot be part of one."""
    if not value.startswith("/"):
        return "must be an absolute path in the guest"
    if "\0" in value:
        return "must not contain a NUL byte"
    if len(value) > 4096:
        return "must be at most 4096 characters (PATH_MAX)"
    return None


def file_name(value: str) -> str | None:
    """One name, as a directory has it."""
    if (
        value in ("", ".", "..")
        or "/" in value
        or "\0" in value
        or len(value.encode("utf-8", "surrogatepass")) > 255
    ):
        return "must be a file's name: no slash, 1 to 255 bytes"
    return None


def signal(value: int | str) -> str | None:
    """A number 1-64, or a name with or without SIG; whether Linux knows the name is the guest's to say."""
    if isinstance(value, int):
        return Between(1, 64)(value)
    return None if _SIGNAL.match(value.upper()) else "must be a signal's name or number"


UNLIMITED = -1
"""As a limit: there shall be none."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Both ends included, or UNLIMITED."""

    low: int
    high: int

    def __call__(self, value: int) -> str | None:
        if value == UNLIMITED or self.low <= value <= self.high:
            return None
        return f"must be between {self.low} and {self.high}, or {UNLIMITED} for no limit, not {value}"


_LIST = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?){0,63}\Z")


def cpu_list(value: str) -> set[int]:
    """The numbers of ``0-2,7``, the kernel's format for lists of CPUs and memory nodes (cpuset(7))."""
    found: set[int] = set()
    for part in value.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def cpuset(value: str) -> str | None:
    if _LIST.match(value) and cpu_list(value):
        return None
    return "must be a list of numbers and ranges, like 0-2,7"


_DEVICE = re.compile(r"[0-9]{1,4}:[0-9]{1,7}\Z")


def device(value: str) -> str | None:
    if value.startswith("/"):
        return absolute_path(value)
    return None if _DEVICE.match(value) else "must be MAJOR:MINOR or a path like /dev/vdb"


def cpus(value: float) -> str | None:
    """A hundredth of a CPU is the least the kernel takes: 1 ms in a period of 100 ms."""
    if value == UNLIMITED or 0.01 <= value <= 8192:
        return None
    return f"must be a number of CPUs from 0.01 to 8192, or {UNLIMITED} for no limit, not {value}"


def request_id(value: str) -> str | None:
    """Ids of requests are compared, never used as names."""
    return None if 0 < len(value) <= MAX_ID else f"must be 1 to {MAX_ID} characters"


def sha256(value: str) -> str | None:
    """In lower case, so that it can be a directory's name and be compared as it is."""
    return None if _SHA256.match(value) else "must be a SHA-256 as 64 lower-case hex digits"


def chunk(value: bytes) -> str | None:
    return None if len(value) <= MAX_CHUNK else f"must be at most {MAX_CHUNK} bytes, not {len(value)}"


def labels(value: dict[str, str]) -> str | None:
    size = sum(len(key.encode()) + len(text.encode()) for key, text in value.items())
    return None if size <= MAX_LABELS else f"must be at most {MAX_LABELS} bytes together, not {size}"


_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\Z")
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9_.-]{1,15})?\Z")
_DNS_OPTION = re.compile(r"[a-z][a-z0-9-]{0,31}(:[A-Za-z0-9.-]{1,32})?\Z")
MAX_HOST_NAME = 253
"""Characters of a domain name (RFC 1035, as it is written)."""


def host_name(value: str) -> str | None:
    """As in hosts(5), one name; underscores are used, too."""
    if len(value) <= MAX_HOST_NAME and _HOST_NAME.match(value):
        return None
    return "must be a host name: letters, digits, '-' and '_', in parts of at most 63 with dots between"


def search_domain(value: str) -> str | None:
    """``.`` is the root, and a dot at the end says that it is written whole."""
    if value == "." or host_name(value.removesuffix(".")) is None:
        return None
    return "must be a domain name, or '.'"


def ip_address(value: str) -> str | None:
    """IPv4 or IPv6, with the zone of a link-local one."""
    import ipaddress  # hardly a client needs it, and it takes time to import

    if _ADDRESS.match(value):
        try:
            ipaddress.ip_address(value)
            return None
        except ValueError:
            pass
    return "must be an IPv4 or IPv6 address"


def dns_option(value: str) -> str | None:
    return None if _DNS_OPTION.match(value) else "must be an option of resolv.conf(5), like ndots:5"


@dataclass(frozen=True, slots=True)
class AtMost:
    """How many entries an array may have."""

    most: int
    least: int = 0

    def __call__(self, value: tuple[object, ...]) -> str | None:
        if self.least <= len(value) <= self.most:
            return None
        wanted = f"{self.least} to" if self.least else "at most"
        return f"must have {wanted} {self.most} entries, not {len(value)}"


Id = Annotated[str, identifier]
Path = Annotated[str, absolute_path]
FileName = Annotated[str, file_name]
Signal = Annotated[int | str, signal]
Offset = Annotated[int, Between(0, MAX_STREAM_OFFSET)]
DeadlineMs = Annotated[int, Between(1, MAX_DEADLINE_MS)]
Sha256 = Annotated[str, sha256]
Chunk = Annotated[bytes, chunk]
Cpuset = Annotated[str, cpuset]
Rate = Annotated[int, Between(0, 1 << 40)]
Device = Annotated[str, device]
Cpus = Annotated[float, cpus]
Labels = Annotated[dict[str, str], labels]
RequestId = Annotated[str, request_id]
HostName = Annotated[str, host_name]
SearchDomain = Annotated[str, search_domain]
IpAddress = Annotated[str, ip_address]
DnsOption = Annotated[str, dns_option]
