"""The options of ``gcsagent`` outside a guest; in one, the kernel's command line has them (common.config)."""

from __future__ import annotations

import argparse
import os

from gcsagent import __version__
from gcsagent.common.config import (
    DEFAULT_WATCHDOG,
    LIMITS,
    LOG_LEVELS,
    ConfigError,
    Settings,
    check_runtime_args,
    is_number,
    parse_limit,
    parse_runtimes,
    parse_watchdog,
)
from protocol.address import parse_listen


def parse(arguments: list[str]) -> Settings:
    """Raises ConfigError for values that cannot be; exits on ``--help`` and on what is no option."""
    options = _parser().parse_args(arguments)
    listen = tuple(options.listen or ("vsock",))
    _check(options, listen)
    return Settings(
        listen=listen,
        state=os.path.abspath(options.state),
        runtime=options.runtime,
        log_level=options.log_level,
        peer_cid=None if options.peer_cid == "any" else int(options.peer_cid),
        watchdog=parse_watchdog(options.watchdog, "--watchdog "),
        runtimes=parse_runtimes(options.runtimes, "--runtimes "),
        runtime_args=tuple(options.runtime_arg),
        no_pivot=options.no_pivot,
        own_network=options.own_network,
        shell=options.shell,
        limits=tuple(
            (name, parse_limit(name, text, f"{_option(name)} "))
            for name in LIMITS
            if (text := getattr(options, name)) is not None
        ),
    )


def _check(options: argparse.Namespace, listen: tuple[str, ...]) -> None:
    for address in listen:
        try:
            parse_listen(address)
        except ValueError as error:
            raise ConfigError(f"--listen {error}") from error
    _check_shell(options.shell, listen)
    if not os.path.basename(options.runtime):
        raise ConfigError(f"--runtime {options.runtime}: a program's name or path")
    check_runtime_args(tuple(options.runtime_arg), "--runtime-arg=")
    if options.peer_cid != "any" and not is_number(options.peer_cid):
        raise ConfigError(f"--peer-cid {options.peer_cid}: a number or 'any'")


def _check_shell(address: str, listen: tuple[str, ...]) -> None:
    if address == "vsock":
        raise ConfigError("--shell 'vsock': give the port, too: vsock:1025")
    try:
        taken = address and parse_listen(address) in map(parse_listen, listen)
    except ValueError as error:
        raise ConfigError(f"--shell {error}") from error
    if taken:
        raise ConfigError(f"--shell {address}: that is where the agent listens")


def _option(limit: str) -> str:
    return "--" + limit.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gcsagent",
        description="Runs OCI containers for a host that asks over vsock or a UNIX socket.",
        epilog="example: gcsagent --listen unix:/run/gcs.sock --state /run/gcs",
    )
    parser.add_argument("--version", action="version", version=f"gcsagent {__version__}")
    parser.add_argument(
        "--listen", action="append", metavar="ADDRESS", help="vsock[:PORT] or unix:PATH; may be repeated"
    )
    parser.add_argument("--state", default="/run/gcsagent", metavar="DIR", help="default: %(default)s")
    _add_runtimes(parser)
    parser.add_argument("--log-level", default="info", choices=LOG_LEVELS)
    parser.add_argument(
        "--peer-cid",
        default="2",
        metavar="CID|any",
        help="who may connect over vsock, default: 2, the host; 'any' is for loopback tests",
    )
    parser.add_argument(
        "--shell",
        default="",
        metavar="ADDRESS",
        help="allow root shells over vsock:PORT or unix:PATH, which answer also when the agent does not",
    )
    parser.add_argument(
        "--watchdog",
        default=str(DEFAULT_WATCHDOG),
        metavar="SECONDS|off",
        help="restart an agent that is stuck for that long, default: %(default)s",
    )
    bounds = parser.add_argument_group(
        "limits", "what each bounds, and its default: protocol/SPEC.md, Limits"
    )
    for name in LIMITS:
        bounds.add_argument(_option(name), dest=name, metavar="N")
    return parser


def _add_runtimes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runtime", default="runc", metavar="PATH", help="OCI runtime, default: %(default)s")
    parser.add_argument(
        "--runtimes",
        default="",
        metavar="PATH,...",
        help="OCI runtimes that a container may ask for by name, beside the default",
    )
    parser.add_argument(
        "--runtime-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="argument of the runtime before its command, as --runtime-arg=--debug; may be repeated",
    )
    parser.add_argument(
        "--no-pivot", action="store_true", help="move and chroot instead of pivot_root, for a root in RAM"
    )
    parser.add_argument(
        "--own-network",
        action="store_true",
        help="let network.* change the network namespace this is started in, as in a guest",
    )
