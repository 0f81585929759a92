"""Settings of supervisor and agent, and the one grammar they are written in inside a guest.

Words separated by white space; ``gcs.NAME=VALUE`` words are ours, all others somebody else's and passed
over. ``/etc/gcsagent/gcsagent.conf`` holds such words (``#`` starts a comment line), the kernel command
line more of them, and the later one wins:

    gcs.port=1024              AF_VSOCK port to listen on
    gcs.peer_cid=2             CID that may connect; ``any`` for loopback tests
    gcs.log_level=info         debug, info, warning, error
    gcs.runtime=runc           OCI runtime, a name on PATH or a path
    gcs.runtimes=runc,crun     runtimes that a container may ask for, by name; the one above always
    gcs.runtime_args=--debug   arguments of gcs.runtime before its command, separated by commas
    gcs.no_pivot=no            yes: containers get their root by MS_MOVE and chroot, not pivot_root
    gcs.on_failure=poweroff    what a guest that cannot start does: poweroff, or hold for a look
    gcs.watchdog=15            seconds of silence after which a stuck agent is restarted, or off
    gcs.shell=off              on: root shells for the host, on a port that the agent has no part in
    gcs.shell_port=1025        AF_VSOCK port of these
    gcs.max_NAME=NUMBER        one of the LIMITS below; protocol/SPEC.md says what each of them bounds

``gcs.hostname``, ``gcs.disk.NAME`` and ``gcs.share.TAG`` are read by initramfs/init. Outside a guest the same
settings come from ``gcsagent``'s options.
"""

from __future__ import annotations

import json
import os

from protocol.dataclass import dataclass, names_of

LOG_LEVELS = ("debug", "info", "warning", "error")
GUEST_STATE = "/run/gcs/state"
DEFAULT_WATCHDOG = 15
"""Seconds: a guest without hardware virtualisation, on a busy host, still says three words in that time."""

_INIT_KEYS = ("gcs.hostname",)
_INIT_PREFIXES = ("gcs.disk.", "gcs.share.")

LIMITS = {
    "max_frame": (1 << 20, 1 << 24),
    "max_in_flight": (256, 1 << 14),
    "max_in_flight_total": (256, 1 << 14),
    "max_connections": (1, 1 << 14),
    "max_unfinished": (1 << 24, 1 << 30),
    "max_stall_ms": (100, 3_600_000),
    "max_containers": (1, 1 << 12),
    "max_execs": (1, 1 << 14),
    "max_execs_total": (1, 1 << 14),
    "max_runtime_calls": (1, 1 << 12),
    "max_runtime_calls_total": (1, 1 << 12),
    "max_spool_bytes": (1 << 16, 1 << 50),
    "max_log_bytes": (1 << 16, 1 << 50),
    "max_event_bytes": (1 << 16, 1 << 26),
    "max_forwards": (1, 1 << 12),
    "max_upload_bytes": (1 << 20, 1 << 30),
}
"""What can be set of protocol.limits.Limits, whose are the defaults, from and to. Version 1 of the contract
promises clients the least of max_frame and max_in_flight; max_unfinished has room for the largest message;
the most of the others is what the supervisor's own bounds and the counters have room for."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the supervisor was started with; the agent gets it as JSON in ``GCS_SETTINGS``."""

    listen: tuple[str, ...]
    state: str
    runtime: str = "runc"
    log_level: str = "info"
    guest: bool = False
    peer_cid: int | None = 2
    on_failure: str = "poweroff"
    watchdog: int = DEFAULT_WATCHDOG
    """Seconds; 0 is off."""
    runtimes: tuple[str, ...] = ()
    """Names or paths, as ``runtime``."""
    runtime_args: tuple[str, ...] = ()
    """Of ``runtime``, before its command."""
    no_pivot: bool = False
    own_network: bool = False
    shell: str = ""
    """Where the debug shell listens, ``vsock:PORT`` or ``unix:PATH``; empty: nowhere."""
    limits: tuple[tuple[str, int], ...] = ()
    """Those of LIMITS that are not the default."""

    @property
    def offered_runtimes(self) -> tuple[str, ...]:
        """Every runtime a container may have, the default first, no name twice."""
        default = os.path.basename(self.runtime)
        return self.runtime, *(each for each in self.runtimes if os.path.basename(each) != default)

    def to_json(self) -> str:
        return json.dumps({name: getattr(self, name) for name in names_of(Settings)})

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """What a supervisor of another version says beyond these settings is passed over."""
        return cls(**{name: value for name, value in json.loads(text).items() if name in names_of(cls)})


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it and says what is allowed."""


def read_guest_settings(root: str = "/") -> Settings:
    """Settings of a guest, from the file in the image and the kernel command line.

    Raises ConfigError for a ``gcs.`` word that is unknown or out of range: a misspelt setting that is
    passed over in silence is found only when it is needed.
    """
    words = _read_words(os.path.join(root, "etc/gcsagent/gcsagent.conf"))
    words += _read_words(os.path.join(root, "proc/cmdline"))
    return parse_guest_settings(words)


def _read_words(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return [word for line in file if not line.lstrip().startswith("#") for word in line.split()]
    except FileNotFoundError:
        return []


def parse_guest_settings(words: list[str]) -> Settings:
    values = _guest_values(words)
    port = values.pop("gcs.port", "1024")
    check_port(port, "gcs.port=")
    peer = values.pop("gcs.peer_cid", "2")
    if peer != "any" and not is_number(peer):
        raise ConfigError(f"gcs.peer_cid={peer}: a CID or 'any'")
    runtime = values.pop("gcs.runtime", "runc")
    if not os.path.basename(runtime):
        raise ConfigError(f"gcs.runtime={runtime}: a program's name or path")
    arguments = tuple(filter(None, values.pop("gcs.runtime_args", "").split(",")))
    check_runtime_args(arguments, "gcs.runtime_args=")
    settings = Settings(
        listen=(f"vsock:{port}",),
        state=GUEST_STATE,
        runtime=runtime,
        log_level=_choice(values, "gcs.log_level", LOG_LEVELS, "info"),
        guest=True,
        peer_cid=None if peer == "any" else int(peer),
        on_failure=_choice(values, "gcs.on_failure", ("poweroff", "hold"), "poweroff"),
        watchdog=parse_watchdog(values.pop("gcs.watchdog", str(DEFAULT_WATCHDOG)), "gcs.watchdog="),
        runtimes=parse_runtimes(values.pop("gcs.runtimes", ""), "gcs.runtimes="),
        runtime_args=arguments,
        no_pivot=_choice(values, "gcs.no_pivot", ("yes", "no"), "no") == "yes",
        shell=_parse_shell(values, port),
        limits=tuple(
            (name, parse_limit(name, values.pop(f"gcs.{name}"), f"gcs.{name}="))
            for name in LIMITS
            if f"gcs.{name}" in values
        ),
    )
    unknown = [key for key in values if key not in _INIT_KEYS and not key.startswith(_INIT_PREFIXES)]
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such setting")
    return settings


def _guest_values(words: list[str]) -> dict[str, str]:
    """The last of a kind wins, as with the kernel's own."""
    values: dict[str, str] = {}
    for word in words:
        if word.startswith("gcs."):
            key, equals, value = word.partition("=")
            if not equals:
                raise ConfigError(f"{word}: a setting is written gcs.NAME=VALUE")
            values[key] = value
    return values


def _choice(values: dict[str, str], key: str, choices: tuple[str, ...], default: str) -> str:
    value = values.pop(key, default)
    if value not in choices:
        known = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
        raise ConfigError(f"{key}={value}: {known}")
    return value


def check_port(text: str, option: str) -> None:
    """Raises ConfigError, in which ``option`` stands before the value."""
    if not is_number(text) or not 0 < int(text) < 0xFFFF_FFFF:
        raise ConfigError(f"{option}{text}: a vsock port is a number from 1 to 4294967294")


def _parse_shell(values: dict[str, str], agents_port: str) -> str:
    allowed, port = values.pop("gcs.shell", "off"), values.pop("gcs.shell_port", "1025")
    if allowed not in ("on", "off"):
        raise ConfigError(f"gcs.shell={allowed}: on or off")
    check_port(port, "gcs.shell_port=")
    if allowed == "on" and int(port) == int(agents_port):
        raise ConfigError(f"gcs.shell_port={port}: that is the agent's")
    return f"vsock:{int(port)}" if allowed == "on" else ""


def parse_runtimes(text: str, option: str) -> tuple[str, ...]:
    """Programs' names or paths, separated by commas. Raises ConfigError."""
    found = tuple(text.split(",")) if text else ()
    names = [os.path.basename(each) for each in found]
    if not all(names):
        raise ConfigError(f"{option}{text}: programs' names or paths, separated by commas")
    if len(set(names)) < len(names):
        raise ConfigError(f"{option}{text}: names a runtime twice")
    return found


_REFUSED_ARGS = {
    "--systemd-cgroup": "the agent places and removes cgroups itself, without systemd",
    "--root": "that is in the agent's state directory",
    "--log": "the agent reads the log of every call",
    "--log-format": "the agent reads the log of every call",
    "--version": "it ends the runtime before its command",
    "--help": "it ends the runtime before its command",
}


def check_runtime_args(arguments: tuple[str, ...], option: str) -> None:
    """Raises ConfigError for what would take from the agent what it needs of its runtime."""
    for argument in arguments:
        name = argument.partition("=")[0]
        reason = _REFUSED_ARGS.get(name)
        if reason is not None:
            raise ConfigError(f"{option}{argument}: {reason}")
        if len(name) < 3 or not name.startswith("--"):
            raise ConfigError(f"{option}{argument}: an argument is written --NAME or --NAME=VALUE")


def parse_watchdog(text: str, option: str) -> int:
    """Seconds, 0 for ``off``. Raises ConfigError, in which ``option`` stands before the value."""
    if text == "off":
        return 0
    if not is_number(text) or not 0 < int(text) <= 3600:
        raise ConfigError(f"{option}{text}: seconds from 1 to 3600, or off")
    return int(text)


def parse_limit(name: str, text: str, option: str) -> int:
    """Raises ConfigError, in which ``option`` stands before the value."""
    low, high = LIMITS[name]
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and low <= int(text) <= high):
        raise ConfigError(f"{option}{text}: a number from {low} to {high}")
    return int(text)


def is_number(text: str) -> bool:
    """Whether it is an unsigned 32-bit number in decimal, as ports and CIDs are."""
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= 0xFFFF_FFFF
