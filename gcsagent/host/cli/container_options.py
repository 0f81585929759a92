"""The options of run, create and exec that end up in the spec; what they mean is option_text's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gcsagent.host.cli import option_text
from gcsagent.host.cli.argument_types import cpus, typed
from gcsagent.host.cli.common import UsageError
from gcsagent.host.image.settings import volume_mounts
from gcsagent.host.seccomp_profile import to_oci
from gcsagent.host.spec import ALL, ALL_CAPABILITIES
from gcsagent.host.spec_options import SpecOptions, capabilities

MAX_FILE = 1 << 20
"""Bytes of an env file or a seccomp profile; a message to the agent has no more."""
GUEST_MACHINE = "x86_64"

NETWORKS = ("none", "host", "bridge")
RESOLV_CONF = "/etc/resolv.conf"

_NAMES: dict[str, str] = {}
"""Destinations of the options below, and how they are written."""


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """For every process, of a container or an exec."""
    add = parser.add_argument
    add("--env-file", type=_env_file, action="extend", default=[], metavar="FILE", help="lines of K=V or K")
    add(
        "-u",
        "--user",
        type=typed(option_text.user),
        metavar="USER[:GROUP]",
        help="names as the container has them, or numbers; default: root",
    )
    add("--group-add", action="append", default=[], metavar="GROUP", help="a further group; may be repeated")


def add_exec_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--privileged", action="store_true", help="with every capability")
    parser.add_argument(
        "--cap-add",
        type=typed(option_text.capability),
        action="append",
        default=[],
        metavar="CAP",
        help="beside the container's own, or ALL",
    )


def add_container_options(parser: argparse.ArgumentParser) -> None:
    """For the container itself: run and create."""
    _add_privilege(parser)
    _add_files(parser)
    _add_namespaces(parser)
    _add_limits(parser)


def _option(parser: argparse.ArgumentParser, name: str, **more: Any) -> None:
    action = (
        parser.add_argument(name, **more) if name[1] == "-" else parser.add_argument(*name.split(), **more)
    )
    _NAMES[action.dest] = action.option_strings[-1]


def _many(parser: argparse.ArgumentParser, name: str, read: Callable[[str], Any], **more: Any) -> None:
    _option(parser, name, type=typed(read), action="append", default=[], **more)


def _one(parser: argparse.ArgumentParser, name: str, read: Callable[[str], Any], **more: Any) -> None:
    _option(parser, name, type=typed(read), default=None, **more)


def _add_privilege(parser: argparse.ArgumentParser) -> None:
    _many(parser, "--cap-add", option_text.capability, metavar="CAP", help="as NET_ADMIN, or ALL")
    _many(parser, "--cap-drop", option_text.capability, metavar="CAP", help="as CHOWN, or ALL")
    _option(
        parser,
        "--privileged",
        action="store_true",
        help="every capability and device, nothing masked; it stays in its VM",
    )
    _many(
        parser,
        "--security-opt",
        _security_opt,
        metavar="OPT",
        help="no-new-privileges, seccomp=FILE|unconfined, apparmor=PROFILE, label=LABEL",
    )
    _one(
        parser,
        "--no-new-privileges",
        option_text.truth,
        metavar="true|false",
        help="whether setuid programs gain nothing, default: true",
    )
    _one(parser, "--oom-score-adj", _oom_score, metavar="N", help="-1000 to 1000, default: 0")


def _add_files(parser: argparse.ArgumentParser) -> None:
    _option(parser, "--read-only", action="store_true", help="mount the root file system read-only")
    _many(parser, "--tmpfs", option_text.tmpfs, metavar="DST[:OPTS]", help="as /run:size=64m,mode=1777")
    _many(
        parser,
        "-v --volume",
        option_text.volume,
        metavar="SRC:DST[:ro]",
        help="bind a guest's file or directory",
    )
    _many(
        parser,
        "--mount",
        option_text.mount,
        metavar="K=V,...",
        help="as type=bind,source=/a,target=/b,readonly",
    )
    _many(
        parser,
        "--device",
        option_text.device,
        metavar="DEV[:INSIDE][:rwm]",
        help="give it a device of the guest",
    )
    _one(parser, "--shm-size", option_text.size, metavar="SIZE", help="of /dev/shm, default: 64M")


def _add_namespaces(parser: argparse.ArgumentParser) -> None:
    _one(parser, "--hostname", _name, metavar="NAME", help="default: the id")
    _one(parser, "--domainname", _name, metavar="NAME", help="its NIS domain name")
    _option(
        parser,
        "--network",
        choices=NETWORKS,
        default="none",
        help="none: only lo; host: the guest's; bridge: an address of its own behind the guest's",
    )
    for kind, what in (("pid", "processes"), ("ipc", "shared memory"), ("uts", "host name")):
        _option(parser, f"--{kind}", choices=("host",), help=f"share the guest's {what}")
    _one(
        parser,
        "--userns",
        option_text.mapping,
        metavar="IN:OUT:COUNT",
        help="a user namespace, uids and gids mapped alike: 0:100000:65536",
    )
    _many(
        parser, "--uidmap", option_text.mapping, metavar="IN:OUT:COUNT", help="a user namespace with this map"
    )
    _many(parser, "--gidmap", option_text.mapping, metavar="IN:OUT:COUNT", help="default: as --uidmap")
    _many(parser, "--sysctl", option_text.pair, metavar="KEY=VALUE", help="as net.ipv4.ip_forward=1")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    _many(parser, "--ulimit", option_text.ulimit, metavar="NAME=SOFT[:HARD]", help="as nofile=1024:2048")
    _one(parser, "--memory", option_text.size, metavar="SIZE", help="bytes, or with K, M, G: 64M")
    _one(parser, "--cpus", cpus, metavar="N", help="0.5 is half of one")
    _one(parser, "--pids-limit", _pids, metavar="N", help="processes and threads, -1: any number")
    _option(parser, "--cgroup-parent", default="", metavar="PATH", help="below the agent's own, as pods/p1")
    _many(parser, "--label", option_text.pair, metavar="K=V", help="shown by `state`; may be repeated")


# -- from the arguments to what they mean ---------------------------------------------------------


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Options that a bundle's config.json takes the place of, with their values; labels are the agent's."""
    values: dict[str, Any] = {"-u": args.user, "--group-add": args.group_add}
    for dest, name in _NAMES.items():
        value = getattr(args, dest, None)
        values[name] = None if dest == "label" or (dest == "network" and value == "none") else value
    return {
        name: True
        for name, value in values.items()
        if value is not None and value is not False and value not in ([], "")
    }


def options_of(args: argparse.Namespace, container: str, resolve: Callable[[str, str], str]) -> SpecOptions:
    """``resolve`` makes an option's path one in the guest. Raises UsageError for contradictions.

    Commands without these options have none of them set.
    """
    if not hasattr(args, "cap_drop"):
        return SpecOptions()
    uid_map, gid_map = _mappings(args)
    security: dict[str, Any] = dict(args.security_opt)
    no_new = args.no_new_privileges
    granted = capabilities(args.cap_add, args.cap_drop, args.privileged)
    granted = ALL_CAPABILITIES if ALL in granted else granted
    return SpecOptions(
        cap_add=tuple(args.cap_add),
        cap_drop=tuple(args.cap_drop),
        privileged=args.privileged,
        ulimits=tuple(args.ulimit),
        read_only=args.read_only,
        mounts=tuple(_mounts(args, resolve)),
        devices=tuple(args.device),
        sysctls=dict(args.sysctl),
        no_new_privileges=security.get("no-new-privileges") if no_new is None else no_new,
        seccomp=_profile(security.get("seccomp"), granted),
        apparmor=security.get("apparmor", ""),
        selinux=security.get("label", ""),
        hostname=args.hostname or "",
        domainname=args.domainname or "",
        uid_mappings=uid_map,
        gid_mappings=gid_map,
        shared=tuple(kind for kind in ("network", "pid", "ipc", "uts") if getattr(args, kind) == "host"),
        cgroups_path=f"{args.cgroup_parent}/{container}" if args.cgroup_parent else "",
        memory=args.memory,
        cpus=args.cpus,
        pids=args.pids_limit,
        shm_size=args.shm_size,
        oom_score_adj=args.oom_score_adj,
    )


def on_network(options: SpecOptions, network: str) -> SpecOptions:
    """With the guest's network namespace for ``host``, and name servers where there is somebody to ask."""
    if network == "none":
        return options
    shared = options.shared
    if network == "host" and "network" not in shared:
        shared = (*shared, "network")
    mounts = options.mounts
    if all(mount["destination"] != RESOLV_CONF for mount in mounts):
        bind = {"destination": RESOLV_CONF, "type": "bind", "source": RESOLV_CONF}
        mounts = (*mounts, {**bind, "options": ["bind", "ro", "nosuid", "nodev", "noexec"]})
    return replace(options, shared=shared, mounts=mounts)


def with_volumes(options: SpecOptions, volumes: Sequence[str]) -> SpecOptions:
    """With the image's volumes writable, where its root is not."""
    if not options.read_only:
        return options
    taken = [mount["destination"] for mount in options.mounts]
    return replace(options, mounts=(*options.mounts, *volume_mounts(volumes, taken)))


def _mounts(args: argparse.Namespace, resolve: Callable[[str, str], str]) -> list[dict[str, Any]]:
    made = []
    for option, mounts in (("-v", args.volume), ("--mount", args.mount), ("--tmpfs", args.tmpfs)):
        for mount in mounts:
            source = resolve(option, mount["source"]) if mount["type"] == "bind" else mount["source"]
            made.append({**mount, "source": source})
    targets = [mount["destination"] for mount in made]
    for target in targets:
        if targets.count(target) > 1:
            raise UsageError(f"{target} is mounted on twice")
    return made


def _mappings(args: argparse.Namespace) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if args.userns and (args.uidmap or args.gidmap):
        raise UsageError("give --userns or --uidmap and --gidmap, not both")
    if args.gidmap and not args.uidmap:
        raise UsageError("--gidmap needs --uidmap beside it")
    if args.uts and (args.hostname or args.domainname):
        raise UsageError("--uts host shares the guest's host name: leave out --hostname and --domainname")
    uids = (args.userns,) if args.userns else tuple(args.uidmap)
    return uids, tuple(args.gidmap) or uids


def _profile(path: str | None, granted: list[str]) -> dict[str, Any] | None:
    if path is None or path == "unconfined":
        return None
    try:
        return to_oci(json.loads(_read(path)), GUEST_MACHINE, granted)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"--security-opt seccomp={path}: {error}") from error


# -- types of arguments ---------------------------------------------------------------------------


def _security_opt(text: str) -> tuple[str, Any]:
    name, equals, value = text.replace(":", "=", 1).partition("=") if "=" not in text else text.partition("=")
    if name == "no-new-privileges":
        return name, option_text.truth(value) if equals else True
    if name not in ("seccomp", "apparmor", "label") or not value:
        raise ValueError("give no-new-privileges, seccomp=FILE|unconfined, apparmor=PROFILE or label=LABEL")
    if (name, value) == ("label", "disable"):
        value = ""
    return name, value


def _env_file(path: str) -> list[str]:
    """docker's format: a variable a line, taken as it is; ``#`` begins a comment line."""
    try:
        lines = _read(path).splitlines()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return [line.lstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _read(path: str) -> str:
    with Path(path).open("rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"is larger than {MAX_FILE} bytes")
    return data.decode()


def _name(text: str) -> str:
    if not 0 < len(text.encode()) <= 64:
        raise ValueError("a name has 1 to 64 bytes")
    return text


def _pids(text: str) -> int:
    value = int(text)
    if value != -1 and not 0 < value <= 1 << 22:
        raise ValueError("give a number, or -1")
    return value


def _oom_score(text: str) -> int:
    value = int(text)
    if not -1000 <= value <= 1000:
        raise ValueError("give a number from -1000 to 1000")
    return value
