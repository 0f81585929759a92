"""``gcsagent``: runs supervisor and agent in the foreground. As PID 1 of a guest: ``gcsagent --guest``."""

from __future__ import annotations

import os
import sys

from gcsagent.common import boot
from gcsagent.common.config import ConfigError, Settings, read_guest_settings


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    try:
        settings = read_guest_settings() if arguments == ["--guest"] else _from_options(arguments)
    except ConfigError as error:
        return _refuse(error, guest=arguments == ["--guest"])
    return _run(settings)


def _from_options(arguments: list[str]) -> Settings:
    from gcsagent.options import parse  # with argparse, which PID 1 does without

    return parse(arguments)


def _refuse(error: ConfigError, guest: bool) -> int:
    if not guest:
        print(f"gcsagent: {error}", file=sys.stderr)
        return 2
    from gcsagent.supervisor import machine

    boot.failed("supervisor", str(error))
    machine.end("poweroff")
    return 1


def _run(settings: Settings) -> int:
    from gcsagent.supervisor import log, main, standing

    log.set_level(settings.log_level)
    standing.keep_descriptors_to_ourselves()
    standing.raise_limits()
    standing.protect_from_oom()
    if not settings.guest:
        standing.become_subreaper()
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

        boot.reached("agent", settings.state)
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
        "PYTHON_COLORS": "0",  # standard error may be a guest's console, which Python takes for a terminal
        "GCS_SETTINGS": settings.to_json(),
        "GCS_SUPERVISOR_PID": str(os.getpid()),
    }


if __name__ == "__main__":
    sys.exit(main())
