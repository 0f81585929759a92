"""OCI objects for ``gcsctl``: a whole runtime spec with sane defaults, and the process of an exec.

Pure functions. Field names and meaning: OCI Runtime Specification 1.0, config.md and config-linux.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TERM = "TERM=xterm"

CAPABILITIES = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
]
"""What container engines grant by default: enough to install and run services."""

_OTHERS = (
    "AUDIT_CONTROL AUDIT_READ BLOCK_SUSPEND BPF CHECKPOINT_RESTORE DAC_READ_SEARCH IPC_LOCK IPC_OWNER LEASE"
    " LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE NET_ADMIN NET_BROADCAST PERFMON SYSLOG SYS_ADMIN SYS_BOOT"
    " SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM"
)
ALL_CAPABILITIES = sorted([*CAPABILITIES, *(f"CAP_{name}" for name in _OTHERS.split())])
"""capabilities(7)."""
ALL = "ALL"
"""The agent puts in what its guest has."""

NAMESPACES = ("pid", "ipc", "uts", "mount", "network", "cgroup")

# Kernel-wide files that even root inside must not read or write.
_MASKED = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


def container_spec(
    *,
    container: str,
    rootfs: str,
    args: Sequence[str],
    env: Sequence[str] = (),
    cwd: str = "/",
    user: str = "",
    groups: Sequence[str] = (),
    terminal: bool = False,
) -> dict[str, Any]:
    """A spec that runs ``args`` on ``rootfs`` (a directory in the guest) in namespaces of its own.

    The network namespace is new and has only ``lo``. ``user`` is USER[:GROUP] and ``groups`` are further
    ones, names or numbers: the agent looks names up in the container.
    """
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": terminal,
            "user": {"uid": 0, "gid": 0, **user_of(user, groups)},
            "args": list(args),
            "env": merge_env([PATH, *([TERM] if terminal else [])], env),
            "cwd": cwd,
            "capabilities": {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": rootfs, "readonly": False},
        "hostname": container[:64],  # HOST_NAME_MAX, gethostname(2)
        "mounts": _mounts(),
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in NAMESPACES],
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READ_ONLY),
        },
    }


def exec_spec(
    *,
    args: Sequence[str],
    env: Sequence[str] = (),
    cwd: str | None = None,
    user: str = "",
    groups: Sequence[str] = (),
    privileged: bool = False,
    terminal: bool = False,
) -> dict[str, Any]:
    """The process of an exec: only what is given, the agent inherits the rest from the container."""
    spec: dict[str, Any] = {"args": list(args), "terminal": terminal}
    merged = merge_env([TERM] if terminal else [], env)
    if merged:
        spec["env"] = merged
    if cwd is not None:
        spec["cwd"] = cwd
    if user or groups:
        spec["user"] = user_of(user, groups)
    if privileged:
        spec["capabilities"] = {kind: [ALL] for kind in ("bounding", "effective", "permitted")}
        spec["noNewPrivileges"] = False
    return spec


def merge_env(*layers: Sequence[str]) -> list[str]:
    """``NAME=VALUE`` entries, a later one of a name replacing an earlier one."""
    merged: dict[str, str] = {}
    for layer in layers:
        for entry in layer:
            merged[entry.partition("=")[0]] = entry
    return list(merged.values())


def user_of(user: str, groups: Sequence[str]) -> dict[str, Any]:
    """The process's ``user``; numbers where no file of the container's has to be asked."""
    made: dict[str, Any] = {}
    name, _, group = user.partition(":")
    if _is_number(name) and _is_number(group):
        made = {"uid": int(name), "gid": int(group)}
    elif user:
        made = {"username": user}
    if groups:
        made["additionalGids"] = [int(each) if _is_number(each) else each for each in groups]
    return made


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10


def _mounts() -> list[dict[str, Any]]:
    return [
        _mount("/proc", "proc"),
        _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k", source="shm"),
        _mount("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        _mount("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
    ]


def _mount(target: str, kind: str, *options: str, source: str | None = None) -> dict[str, Any]:
    mount: dict[str, Any] = {"destination": target, "type": kind, "source": source or kind}
    if options:
        mount["options"] = list(options)
    return mount
