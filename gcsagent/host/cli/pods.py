"""The options of run and create that are about pods, and the command ``pod``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gcsagent.host.cli import resources
from gcsagent.host.cli.argument_types import add_id, cpus, require, typed
from gcsagent.host.cli.common import UsageError, connect, print_json
from gcsagent.host.cli.declare import Add
from gcsagent.host.cli.option_text import size
from protocol import checks
from protocol.checks import UNLIMITED
from protocol.pods import Dns, HostsEntry, PodFiles, PodLimits, PodMember, PodNamespace, Sandbox

_SANDBOX_ONLY = {
    "ip": "--ip",
    "add_host": "--add-host",
    "dns": "--dns",
    "dns_search": "--dns-search",
    "dns_option": "--dns-option",
    "pod_files": "--pod-files",
    "pod_memory": "--pod-memory",
    "pod_cpus": "--pod-cpus",
    "pod_cpu_shares": "--pod-cpu-shares",
    "pod_pids_limit": "--pod-pids-limit",
}
NOTHING = "none"

_EXAMPLES = """\
examples:
  gcsctl run -d --sandbox --id web --pod-memory 256M --dns 10.0.0.1 --rootfs ./pause -- /pause
  gcsctl run -d --pod web --rootfs ./app -- /app
  gcsctl run --rm -it --pod web --share network,pid --rootfs ./tools -- sh
  gcsctl pod stats web
  gcsctl delete --force web
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """For run and create."""
    group = parser.add_argument_group(
        "pods", "a sandbox first, then what joins it; `gcsctl pod --help` shows how"
    )
    add = group.add_argument
    add("--sandbox", action="store_true", help="make it the sandbox that a pod begins and ends with")
    add("--pod", type=typed(_identifier), metavar="ID", help="put it into the pod of this sandbox")
    add(
        "--share",
        type=typed(_share),
        metavar="LIST",
        help="with --pod: network,ipc,uts,pid,user or none; default: network,ipc,uts",
    )
    add("--ip", type=typed(_address), metavar="ADDR", help="with --sandbox: its address in /etc/hosts")
    _many(add, "--add-host", _host, "NAME[,NAME]:ADDR", "a line of /etc/hosts")
    _many(add, "--dns", _address, "ADDR", "a name server for /etc/resolv.conf")
    _many(add, "--dns-search", _domain, "DOMAIN", "where short names are looked up")
    _many(add, "--dns-option", _dns_option, "OPT", "as ndots:5")
    add(
        "--pod-files",
        choices=[each.value for each in PodFiles],
        help="how the pod's hosts, hostname and resolv.conf are mounted; default: ro",
    )
    add("--pod-memory", type=typed(size), metavar="SIZE", help="what the whole pod may use")
    add("--pod-cpus", type=typed(cpus), metavar="N", help="likewise; 0.5 is half of one")
    add("--pod-cpu-shares", type=typed(int), metavar="N", help="its part of scarce CPU time, 2 to 262144")
    add("--pod-pids-limit", type=typed(int), metavar="N", help="processes and threads of the whole pod")


def _many(add: Callable[..., Any], name: str, read: Callable[[str], Any], metavar: str, what: str) -> None:
    text = f"with --sandbox: {what}; may be repeated"
    add(name, type=typed(read), action="append", default=[], metavar=metavar, help=text)


def sandbox_of(args: argparse.Namespace) -> Sandbox | None:
    """Raises UsageError for options that need --sandbox. None where a command has no such options."""
    if not hasattr(args, "sandbox"):
        return None
    if not args.sandbox:
        for dest, option in _SANDBOX_ONLY.items():
            if getattr(args, dest) not in (None, []):
                raise UsageError(f"{option} is the sandbox's to say: give it with --sandbox")
        return None
    if args.pod:
        raise UsageError("give --sandbox, which begins a pod, or --pod, not both")
    shm = {} if args.shm_size is None else {"shm_bytes": args.shm_size}
    return Sandbox(
        address=args.ip,
        hosts=tuple(args.add_host),
        dns=Dns(tuple(args.dns), tuple(args.dns_search), tuple(args.dns_option)),
        files=PodFiles(args.pod_files or PodFiles.READ_ONLY),
        limits=PodLimits(args.pod_memory, args.pod_cpus, args.pod_cpu_shares, args.pod_pids_limit),
        **shm,
    )


def member_of(args: argparse.Namespace) -> PodMember | None:
    """Raises UsageError for what contradicts it. None where a command has no such options."""
    if not hasattr(args, "pod"):
        return None
    if not args.pod:
        if args.share is not None:
            raise UsageError("--share says what of a pod: give --pod with it")
        return None
    member = PodMember(args.pod) if args.share is None else PodMember(args.pod, args.share)
    if PodNamespace.UTS in member.share and (args.hostname or args.domainname):
        raise UsageError("the pod's host name is its too: leave out --hostname and --domainname")
    if PodNamespace.USER in member.share and (args.userns or args.uidmap):
        raise UsageError("the pod's user namespace is its, too: leave out --userns and --uidmap")
    for kind in set(member.share) - {PodNamespace.USER}:
        if getattr(args, kind.value) == "host":
            raise UsageError(f"--{kind} host and the pod's {kind} exclude each other: see --share")
    return member


# -- the command ----------------------------------------------------------------------------------


def add_pod_commands(commands: Any, add: Add) -> None:
    about = "limit and measure a pod, which `run --sandbox` begins and `run --pod` adds to"
    group = commands.add_parser("pod", help=about, description=about, epilog=_EXAMPLES)
    verbs = group.add_subparsers(metavar="COMMAND", required=True)
    parser = add(
        verbs, "update", update, "change what a whole pod may use", "gcsctl pod update --memory 256M web"
    )
    _add_limits(parser)
    add_id(parser)
    add_id(add(verbs, "stats", stats, "show what a whole pod uses", "gcsctl pod stats web"))


async def update(args: argparse.Namespace) -> int:
    fields = ("memory_bytes", "cpus", "cpu_shares", "pids")
    wanted = {name: value for name in fields if (value := getattr(args, name)) is not None}
    if not wanted:
        raise UsageError("nothing to update: give --memory, --cpus, --cpu-shares or --pids")
    async with await connect(args) as client:
        await client.update_pod(args.id, **wanted)
    if args.json:
        print_json({"pod": args.id, **wanted})
    return 0


async def stats(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        resources.show_stats(await client.pod_stats(args.id), args.json)
    return 0


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """The options of ``pod update``; -1 takes a limit away."""
    add = parser.add_argument
    add("--memory", dest="memory_bytes", type=typed(_limit), metavar="SIZE", help="-1: no limit")
    add("--cpus", type=typed(cpus), metavar="N", help="0.5 is half of one; -1: no limit")
    add("--cpu-shares", type=typed(int), metavar="N", help="its part of scarce CPU time")
    add("--pids", type=typed(int), metavar="N", help="processes and threads; -1: no limit")


# -- types of arguments ---------------------------------------------------------------------------


def _identifier(text: str) -> str:
    require(checks.identifier(text))
    return text


def _share(text: str) -> tuple[PodNamespace, ...]:
    names = [] if text == NOTHING else text.split(",")
    there = {kind.value: kind for kind in PodNamespace} | {"net": PodNamespace.NETWORK}
    if not set(names) <= set(there):
        raise ValueError(f"give a list of {', '.join(PodNamespace)}, or {NOTHING}")
    return tuple(dict.fromkeys(there[name] for name in names))


def _address(text: str) -> str:
    require(checks.ip_address(text))
    return text


def _host(text: str) -> HostsEntry:
    """docker's NAME:ADDR or NAME=ADDR; an IPv6 address may be in brackets."""
    cut = min((at for at in (text.find(":"), text.find("=")) if at > 0), default=0)
    names, address = tuple(text[:cut].split(",")), text[cut + 1 :].removeprefix("[").removesuffix("]")
    if not cut:
        raise ValueError("give NAME:ADDR")
    for name in names:
        require(checks.host_name(name))
    return HostsEntry(_address(address), names)


def _domain(text: str) -> str:
    require(checks.search_domain(text))
    return text


def _dns_option(text: str) -> str:
    require(checks.dns_option(text))
    return text


def _limit(text: str) -> int:
    return UNLIMITED if text == "-1" else size(text)
