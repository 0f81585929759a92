"""The agent's requests: every operation, what it may carry, what it does.

    spawn    run the runtime; answered when it has ended, its result kept until ``forget_call``
    cancel   kill a running call
    join     as spawn, for a call that an earlier agent made
    forget_call, forget_process   the agent has taken the result
    hold, fetch, release          descriptors by name
    list     everything kept: names, calls, processes, exit records
    ready    the agent serves
    upgrade  the next agent is to run other code; upgrade_status
    stopping an end has begun: what is not through it in time is ended from here
    stop     end: nothing of the agent's is left to do
    log      lines of the supervisor's own log; log_level: what it and the agents after this one log from
    stats    how much of everything is kept, by the names agent.metrics has for it

Nothing here trusts the agent: arguments are checked for type and bound before they are used, and whatever
goes wrong is an answer. Descriptors that came with a packet and were not stored are closed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import msgpack

from gcsagent.common import channel
from gcsagent.supervisor import log
from gcsagent.supervisor.console import ConsoleSocket
from gcsagent.supervisor.store import StoreError

TYPE_CHECKING = False  # typing itself is half a megabyte
if TYPE_CHECKING:
    from typing import Any

    from gcsagent.supervisor.main import Supervisor

MAX_CALL_SECONDS = 24 * 3600.0
MAX_TARGET_FD = 63
_TARGETS = frozenset(str(number) for number in range(MAX_TARGET_FD + 1))

MAX_KEY = 512
"""Characters of a call's or a process's key."""

MAX_CALLS = 32_768
"""Calls running or not forgotten yet: more than the agent's own limits let it have (common.config.LIMITS)."""


class RequestError(ValueError):
    """An operation that is unknown or whose arguments are not what it takes; EAGAIN: one too many."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class Reply:
    """``now`` False: the answer comes later (spawn)."""

    __slots__ = ("fds", "now", "result")

    def __init__(self, result: Any = None, fds: tuple[int, ...] = (), now: bool = True) -> None:
        self.result, self.fds, self.now = result, fds, now


def handle(supervisor: Supervisor, ident: int, operation: Any, arguments: Any, fds: list[int]) -> Reply:
    """Carries out one request. Raises RequestError, StoreError or OSError; ``fds`` are always used up."""
    kept: set[int] = set()
    try:
        handler = _OPERATIONS.get(operation) if isinstance(operation, str) else None
        if handler is None:
            raise RequestError("there is no such operation")
        if not isinstance(arguments, dict):
            raise RequestError("arguments are a map")
        return handler(supervisor, ident, arguments, fds, kept)
    finally:
        channel.close_all([fd for fd in fds if fd not in kept])


def _spawn(supervisor: Supervisor, ident: int, args: dict[str, Any], fds: list[int], kept: set[int]) -> Reply:
    key, argv, env = _text(args, "call", None, MAX_KEY), _texts(args, "argv"), args.get("env", {})
    if (
        not argv
        or not isinstance(env, dict)
        or not all(_is_plain(k) and _is_plain(v) for k, v in env.items())
    ):
        raise RequestError("spawn takes argv, a list of strings, and env, a map of strings")
    if key in supervisor.reaper.calls:
        raise RequestError(f"call {key} exists already")
    process, pid_file = _text(args, "process", "", MAX_KEY), _text(args, "pid_file", "")
    if len(supervisor.reaper.calls) >= MAX_CALLS:
        raise RequestError(f"{MAX_CALLS} calls are running or wait to be forgotten", errno.EAGAIN)
    if process and (supervisor.reaper.is_claimed(process) or process in supervisor.exits.records):
        raise RequestError(f"process {process} exists already")
    timeout = args.get("timeout", 60.0)
    if not isinstance(timeout, (int, float)) or not 0 < timeout <= MAX_CALL_SECONDS:
        raise RequestError("timeout is a number of seconds")
    child = _child_fds(args.get("fds", {}), fds)
    holds = _holds(supervisor, args.get("hold", {}), fds)
    console = _console(supervisor, args)
    try:
        supervisor.reaper.start_call(
            key,
            argv,
            env,
            child,
            pid_file=pid_file,
            process=process,
            console=console,
            timeout=float(timeout),
        )
    except (OSError, ValueError) as error:  # ValueError: no environment variable, no program name
        if console is not None:
            console.finish()
        if isinstance(error, ValueError):
            raise RequestError(f"{argv[0]}: {error}") from error
        raise
    for name, fd in holds.items():
        supervisor.store.put(name, fd)
        kept.add(fd)
    supervisor.waiting[key] = ident
    return Reply(now=False)


def _child_fds(wanted: Any, fds: list[int]) -> dict[int, int]:
    if not isinstance(wanted, dict):
        raise RequestError("fds maps descriptor numbers, as strings, to indexes")
    result: dict[int, int] = {}
    for target, index in wanted.items():
        if not (isinstance(target, str) and target in _TARGETS):
            raise RequestError(f"a descriptor number is 0 to {MAX_TARGET_FD}, not {target[:16]!r}")
        result[int(target)] = fds[_index(index, fds)]
    return result


def _holds(supervisor: Supervisor, wanted: Any, fds: list[int]) -> dict[str, int]:
    if not isinstance(wanted, dict):
        raise RequestError("hold maps names to indexes")
    result: dict[str, int] = {}
    for name, index in wanted.items():
        if not isinstance(name, str):
            raise RequestError("a name is a string")
        result[name] = fds[_index(index, fds)]
    supervisor.store.check_new(*result)
    if len(set(result.values())) != len(result):
        raise RequestError("each descriptor is held under one name")
    return result


def _console(supervisor: Supervisor, args: dict[str, Any]) -> ConsoleSocket | None:
    path, name = _text(args, "console_path", ""), _text(args, "console_name", "")
    if not path:
        return None
    supervisor.store.check_new(name)
    if os.path.dirname(path) != supervisor.console_directory:
        raise RequestError(f"a console socket lives in {supervisor.console_directory}")

    def received(fd: int) -> None:
        try:
            supervisor.store.put(name, fd)
        except StoreError:
            os.close(fd)

    try:
        return ConsoleSocket(supervisor.loop, path, received)
    except ValueError as error:
        raise RequestError(str(error)) from error


def _cancel(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    supervisor.reaper.cancel_call(_text(args, "call"))
    return Reply()


def _join(
    supervisor: Supervisor, ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    call = supervisor.reaper.calls.get(_text(args, "call"))
    if call is None:
        raise RequestError(f"there is no call {args['call']}")
    supervisor.waiting[call.key] = ident
    if call.result is not None:
        supervisor.answer_call(call)
    return Reply(now=False)


def _forget_call(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    supervisor.reaper.forget_call(_text(args, "call"))
    return Reply()


def _forget_process(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    supervisor.exits.forget(_text(args, "process"))
    return Reply()


def _hold(supervisor: Supervisor, _ident: int, args: dict[str, Any], fds: list[int], kept: set[int]) -> Reply:
    for name, fd in _holds(supervisor, args.get("hold"), fds).items():
        supervisor.store.put(name, fd)
        kept.add(fd)
    return Reply()


def _fetch(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    names = _texts(args, "names")
    if len(names) > channel.MAX_FDS:
        raise RequestError(f"at most {channel.MAX_FDS} descriptors at a time")
    return Reply(fds=tuple(supervisor.store.get(name) for name in names))


def _release(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    return Reply(supervisor.store.release(_texts(args, "names")))


PAGE_BYTES = channel.MAX_PACKET // 2
"""Of a list's items in one packet; one item is never half as large."""


def _list(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    """One page of everything kept: ``kind`` names, calls, processes or exits, from index ``start``.

    The pages are those of the list as it was when the first was asked for: what ends between two of them
    would else move others to indexes that have been through.
    """
    reaper = supervisor.reaper
    kinds: dict[str, Callable[[], list[Any]]] = {
        "names": supervisor.store.names,
        "calls": lambda: [[call.key, call.result] for call in reaper.calls.values()],
        "processes": lambda: [[process.key, process.pid] for process in reaper.processes.values()],
        "exits": lambda: [[key, record] for key, record in supervisor.exits.records.items()],
    }
    kind, start = kinds.get(_text(args, "kind")), args.get("start", 0)
    if kind is None or not isinstance(start, int) or start < 0:
        raise RequestError("list takes kind (names, calls, processes or exits) and start, an index")
    if start == 0:
        supervisor.listing = kind()
    page = _page(supervisor.listing, start)
    if not page:
        supervisor.listing = []
    return Reply(page)


def _page(items: list[Any], start: int) -> list[Any]:
    """What fits a packet of ``items`` from ``start`` on: at least one, if there is any."""
    size = 0
    for end in range(start, len(items)):
        size += len(msgpack.packb(items[end], use_bin_type=True))
        if size > PAGE_BYTES:
            return items[start : max(end, start + 1)]
    return items[start:]


def _pidfd(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    process = supervisor.reaper.processes.get(_text(args, "process"))
    if process is None:
        raise RequestError(f"no live process {args['process']}")
    return Reply(process.pid, (process.pidfd,))


def _ready(
    supervisor: Supervisor, _ident: int, _args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    supervisor.agent_ready()
    return Reply()


def _stop(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    supervisor.finish(_action(args))
    return Reply()


MAX_GRACE_MS = 600_000


def _stopping(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    action, grace_ms = _action(args), args.get("grace_ms")
    if type(grace_ms) is not int or not 0 <= grace_ms <= MAX_GRACE_MS:
        raise RequestError(f"grace_ms is a number from 0 to {MAX_GRACE_MS}")
    supervisor.ask_to_stop(action, grace_ms / 1000)
    return Reply()


def _action(args: dict[str, Any]) -> str:
    action = _text(args, "action")
    if action not in ("poweroff", "reboot", "exit"):
        raise RequestError("action is poweroff, reboot or exit")
    return action


def _log(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    """A page of the lines numbered above ``after``."""
    after = args.get("after")
    if not isinstance(after, int):
        raise RequestError("log takes after, a number")
    return Reply(_page(log.lines_after(after), 0))


def _log_level(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    level = _text(args, "level")
    if level not in log.LEVELS:
        raise RequestError(f"level is one of {', '.join(log.LEVELS)}")
    log.set_level(level)
    supervisor.agent.log_level = level
    return Reply()


def _stats(
    supervisor: Supervisor, _ident: int, _args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    reaper = supervisor.reaper
    return Reply(
        {
            "held_fds": len(supervisor.store),
            "max_held_fds": supervisor.store.limit,
            "calls": len(reaper.calls),
            "calls_total": reaper.started,
            "processes": len(reaper.processes),
            "exit_records": len(supervisor.exits.records),
        }
    )


MAX_TRIAL_SECONDS = 3600.0


def _upgrade(
    supervisor: Supervisor, _ident: int, args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    path, seconds = _text(args, "path"), args.get("seconds")
    if not isinstance(seconds, (int, float)) or not 0 < seconds <= MAX_TRIAL_SECONDS:
        raise RequestError("seconds is how long the new code may take to be ready")
    if os.path.dirname(path) != supervisor.code_directory:
        raise RequestError(f"code is a directory in {supervisor.code_directory}")
    if not os.path.isdir(os.path.join(path, "gcsagent")):
        raise RequestError(f"there is no gcsagent in {path}")
    supervisor.upgrade.begin(path, float(seconds))
    return Reply()


def _upgrade_status(
    supervisor: Supervisor, _ident: int, _args: dict[str, Any], _fds: list[int], _kept: set[int]
) -> Reply:
    return Reply(supervisor.upgrade.status())


_OPERATIONS: dict[str, Callable[[Supervisor, int, dict[str, Any], list[int], set[int]], Reply]] = {
    "spawn": _spawn,
    "cancel": _cancel,
    "join": _join,
    "forget_call": _forget_call,
    "forget_process": _forget_process,
    "hold": _hold,
    "fetch": _fetch,
    "release": _release,
    "list": _list,
    "pidfd": _pidfd,
    "ready": _ready,
    "upgrade": _upgrade,
    "upgrade_status": _upgrade_status,
    "stop": _stop,
    "stats": _stats,
    "stopping": _stopping,
    "log": _log,
    "log_level": _log_level,
}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _text(args: dict[str, Any], name: str, default: str | None = None, longest: int = 4096) -> str:
    value = args.get(name, default)
    if not isinstance(value, str) or "\0" in value or len(value) > longest:
        raise RequestError(f"{name} is a string of at most {longest} characters")
    return value


def _texts(args: dict[str, Any], name: str) -> list[str]:
    value = args.get(name)
    if not isinstance(value, list) or not all(_is_plain(item) for item in value):
        raise RequestError(f"{name} is a list of strings")
    return value


def _index(index: Any, fds: list[int]) -> int:
    if type(index) is not int or not 0 <= index < len(fds):
        raise RequestError(f"a descriptor index is a number below {len(fds)}, as many as the packet carries")
    return index
