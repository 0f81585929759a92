"""``gcsagent``: runs supervisor and agent in the foreground. As PID 1 of a guest: ``gcsagent --guest``."""

from __future__ import annotations

import json
import os
import sys

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
    read_guest_settings,
)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    try:
        settings = read_guest_settings() if arguments == ["--guest"] else _parse(arguments)
    except ConfigError as error:
        return _refuse(error, guest=arguments == ["--guest"])
    return _run(settings)


def _refuse(error: ConfigError, guest: bool) -> int:
    if not guest:
        print(f"gcsagent: {error}", file=sys.stderr)
        return 2
    from gcsagent.supervisor import log, machine

    log.boot_stage("supervisor", str(error))
    machine.end("poweroff")
    return 1


def _parse(arguments: list[str]) -> Settings:
    import argparse

    from protocol.address import parse_listen

    parser = argparse.ArgumentParser(
        prog="gcsagent",
        description="Runs OCI containers for a host that asks over vsock or a UNIX socket.",
        epilog="example: gcsagent --listen unix:/run/gcs.sock --state /run/gcs",
    )
    parser.add_argument(
        "--listen", action="append", metavar="ADDRESS", help="vsock[:PORT] or unix:PATH; may be repeated"
    )
    parser.add_argument("--state", default="/run/gcsagent", metavar="DIR", help="default: %(default)s")
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
    options = parser.parse_args(arguments)
    listen = tuple(options.listen or ("vsock",))
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


def _check_shell(address: str, listen: tuple[str, ...]) -> None:
    from protocol.address import parse_listen

    try:
        if address and parse_listen(address) in map(parse_listen, listen):
            raise ConfigError(f"--shell {address}: that is where the agent listens")
        if address == "vsock":
            raise ValueError("'vsock': give the port, too: vsock:1025")
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"--shell {error}") from error


def _option(limit: str) -> str:
    return "--" + limit.replace("_", "-")


def _run(settings: Settings) -> int:
    from gcsagent.supervisor import log, main

    log.set_level(settings.log_level)
    main.keep_descriptors_to_ourselves()
    main.raise_limits()
    main.protect_from_oom()
    if not settings.guest:
        main.become_subreaper()
    try:
        os.makedirs(settings.state, mode=0o711, exist_ok=True)
        supervisor = main.Supervisor(
            settings.state, _agent_env(settings), settings.guest, settings.on_failure, settings.watchdog
        )
    except OSError as error:
        return _refuse(ConfigError(f"state directory {settings.state}: {error}"), settings.guest)
    if settings.shell:
        try:
            supervisor.allow_shell(settings.shell)
        except OSError as error:
            if not settings.guest:
                return _refuse(
                    ConfigError(f"--shell {settings.shell}: {error.strerror or error}"), guest=False
                )
            log.log("error", "the debug shell cannot be had", address=settings.shell, error=str(error))
    if settings.guest:
        from gcsagent.supervisor.machine import PowerButton

        log.boot_stage("agent")
        PowerButton(supervisor.loop, lambda: supervisor.ask_to_stop("poweroff"))
    return supervisor.run()


def _agent_env(settings: Settings) -> dict[str, str]:
    """The agent's environment: PATH for the runtime, our own code's place, and the settings."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = [home, *(path for path in os.environ.get("PYTHONPATH", "").split(":") if path and path != home)]
    kept = {name: os.environ[name] for name in ("LANG", "PYTHONDONTWRITEBYTECODE") if name in os.environ}
    return {
        **kept,
        "PATH": os.environ.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        "PYTHONPATH": ":".join(paths),
        "GCS_SETTINGS": json.dumps(settings._asdict()),
        "GCS_SUPERVISOR_PID": str(os.getpid()),
    }


if __name__ == "__main__":
    sys.exit(main())
