"""The runc command line, as pure functions: one per command, no execution here."""

from __future__ import annotations

from gcsagent.agent.runtime import CriuOptions
from protocol.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class RuncGlobals:
    """What every runc call of this agent has in common."""

    binary: str
    root: str
    extra: tuple[str, ...] = ()


def _base(options: RuncGlobals, log: str) -> list[str]:
    """``log`` must be a fresh file: runc appends, and a stale last line would be taken for this call's."""
    return [options.binary, "--root", options.root, "--log", log, "--log-format", "json", *options.extra]


def _handing_over(pid_file: str, console_socket: str) -> list[str]:
    """Where the pid of what is launched is written to, and where the master of its terminal is sent."""
    return ["--pid-file", pid_file, *(["--console-socket", console_socket] if console_socket else [])]


def create(
    options: RuncGlobals,
    log: str,
    container: str,
    *,
    bundle: str,
    pid_file: str,
    console_socket: str = "",
    no_pivot: bool = False,
    preserve_fds: int = 0,
) -> list[str]:
    """``preserve_fds``: how many descriptors from 3 on the container's init is to have as well."""
    argv = [*_base(options, log), "create", "--bundle", bundle, *_handing_over(pid_file, console_socket)]
    if no_pivot:
        argv.append("--no-pivot")
    if preserve_fds:
        argv += ["--preserve-fds", str(preserve_fds)]
    return [*argv, container]


def start(options: RuncGlobals, log: str, container: str) -> list[str]:
    return [*_base(options, log), "start", container]


def exec_(
    options: RuncGlobals,
    log: str,
    container: str,
    *,
    process_file: str,
    pid_file: str,
    console_socket: str = "",
) -> list[str]:
    """Detached: runc returns once the process runs, and the process is the supervisor's to wait for."""
    argv = [*_base(options, log), "exec", "--detach", "--process", process_file]
    return [*argv, *_handing_over(pid_file, console_socket), container]


def delete(options: RuncGlobals, log: str, container: str, *, force: bool) -> list[str]:
    return [*_base(options, log), "delete", *(["--force"] if force else []), container]


def pause(options: RuncGlobals, log: str, container: str) -> list[str]:
    return [*_base(options, log), "pause", container]


def resume(options: RuncGlobals, log: str, container: str) -> list[str]:
    return [*_base(options, log), "resume", container]


def update(options: RuncGlobals, log: str, container: str) -> list[str]:
    """The resources come as JSON on standard input."""
    return [*_base(options, log), "update", "--resources", "-", container]


def features(options: RuncGlobals) -> list[str]:
    return [options.binary, "features"]


def state(options: RuncGlobals, log: str, container: str) -> list[str]:
    """Prints the OCI runtime spec's state, and what it adds."""
    return [*_base(options, log), "state", container]


def version(options: RuncGlobals) -> list[str]:
    return [options.binary, "--version"]


def _criu(options: CriuOptions) -> list[str]:
    flags = {
        "--tcp-established": options.tcp_established,
        "--ext-unix-sk": options.ext_unix_sk,
        "--shell-job": options.shell_job,
        "--file-locks": options.file_locks,
    }
    paths = ["--image-path", options.images, "--work-path", options.work]
    return paths + [flag for flag, wanted in flags.items() if wanted]


def checkpoint(
    options: RuncGlobals, log: str, container: str, criu: CriuOptions, *, leave_running: bool
) -> list[str]:
    argv = [*_base(options, log), "checkpoint", *_criu(criu)]
    return [*argv, *(["--leave-running"] if leave_running else []), container]


def restore(
    options: RuncGlobals,
    log: str,
    container: str,
    criu: CriuOptions,
    *,
    bundle: str,
    pid_file: str,
    console_socket: str = "",
) -> list[str]:
    argv = [*_base(options, log), "restore", "--detach", "--bundle", bundle]
    return [*argv, *_handing_over(pid_file, console_socket), *_criu(criu), container]
