"""What could stand at the cursor of a gcsctl command line, read off argparse's own tree.

The shells' part (:mod:`gcsagent.host.cli.shells`) is a few lines that call ``gcsctl __complete``; so nothing
there can be older than this gcsctl. Names that only an agent or the VM store knows are asked for within
DEADLINE_SECONDS; whoever cannot be reached has none.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gcsagent.host.checkpoints import list_checkpoints
from gcsagent.host.cli.common import agent_address
from gcsagent.host.client import Client
from gcsagent.host.errors import HostError
from gcsagent.host.image.cache import ImageCache
from gcsagent.host.storage import list_mounts
from gcsagent.host.vm.errors import VmError
from gcsagent.host.vm.named import VmStore
from protocol.errors import ProtocolError, RpcError

DEADLINE_SECONDS = 2.0
"""Somebody waits with a finger on the key."""

_PATHS = frozenset({"FILE", "DIR", "DIR|FILE", "PATH", "IMAGE"})


@dataclass(frozen=True, slots=True)
class Completion:
    """``values`` with what each means; ``files``: it may be a path; ``glued``: more belongs to the word."""

    values: tuple[tuple[str, str], ...] = ()
    files: bool = False
    glued: bool = False


@dataclass(slots=True)
class _Place:
    """Where in the tree the words have led to."""

    parser: argparse.ArgumentParser
    path: list[str] = field(default_factory=list)
    positionals: list[argparse.Action] = field(default_factory=list)
    given: dict[str, str] = field(default_factory=dict)

    def enter(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser
        self.positionals = [action for action in parser._actions if not action.option_strings]

    @property
    def commands(self) -> argparse._SubParsersAction[argparse.ArgumentParser] | None:
        """What the next word chooses from, if that is a command."""
        first = self.positionals[0] if self.positionals else None
        return first if isinstance(first, argparse._SubParsersAction) else None


def complete(parser: argparse.ArgumentParser, words: list[str]) -> Completion:
    """What the last of ``words`` could become; they are those after ``gcsctl``."""
    *before, current = words or [""]
    place = _Place(parser)
    place.enter(parser)
    wants = _walk(place, before)
    if wants is not None:
        return _of_action(place, wants, current)
    if place.positionals and place.positionals[0].nargs == argparse.REMAINDER and before[-1:] == ["--"]:
        return Completion(files=True)
    option, equals, value = current.partition("=")
    if equals and (action := place.parser._option_string_actions.get(option)) is not None:
        found = _of_action(place, action, value)
        glued = tuple((f"{option}={text}", about) for text, about in found.values)
        return Completion(glued, files=found.files)
    if current.startswith("-"):
        return Completion(tuple(_starting(current, _options(place.parser))))
    if place.commands is not None:
        return Completion(tuple(_starting(current, _commands(place.commands))))
    return _of_action(place, place.positionals[0], current) if place.positionals else Completion()


def _walk(place: _Place, before: list[str]) -> argparse.Action | None:
    """Follows the words; the option whose value is to come, if the last of them is one."""
    wants: argparse.Action | None = None
    for word in before:
        if wants is not None:
            place.given[wants.dest] = word
            wants = None
        elif word.startswith("-") and word != "-":
            wants = _option(place, word)
        elif (commands := place.commands) is not None:
            if word not in commands.choices:
                place.positionals = []
                return None
            place.path.append(word)
            place.enter(commands.choices[word])
        elif place.positionals and place.positionals[0].nargs in (None, "?"):
            del place.positionals[0]
    return wants


def _option(place: _Place, word: str) -> argparse.Action | None:
    """The option that ``word`` is, if its value is the next word."""
    name, equals, value = word.partition("=")
    action = place.parser._option_string_actions.get(name)
    if action is None or action.nargs == 0:
        return None
    if equals:
        place.given[action.dest] = value
        return None
    return action


def _starting(current: str, found: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    return ((value, about) for value, about in found if value.startswith(current))


def _commands(action: argparse._SubParsersAction[argparse.ArgumentParser]) -> Iterator[tuple[str, str]]:
    return ((choice.dest, choice.help or "") for choice in action._choices_actions)


def _options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        about = action.help or ""
        about = about % {**vars(action), "prog": parser.prog} if "%" in about else about
        yield from ((name, about) for name in action.option_strings if name.startswith("--"))


def _of_action(place: _Place, action: argparse.Action, current: str) -> Completion:
    kind = kind_of(" ".join(place.path), action)
    if action.choices is not None:
        names = [getattr(choice, "value", choice) for choice in action.choices]
        return Completion(tuple(_starting(current, ((str(name), "") for name in names))))
    values = tuple(_starting(current, _known(_KINDS[kind], place.given))) if kind in _KINDS else ()
    files = kind == "files" or (kind in ("places", "images") and not values)
    return Completion(values, files, glued=kind == "places")


# -- what is known by name ------------------------------------------------------------------------


def kind_of(path: str, action: argparse.Action) -> str:
    """What the values of an argument of the command ``path`` are; "" when that is anybody's guess."""
    where, name = path.split(" ")[0], action.dest
    if name == "vm" or (where == "vm" and name == "name" and path not in ("vm start", "vm stop")):
        return "running VMs"
    if path == "vm stop" and name == "name":
        return "VMs"
    if where in ("checkpoint", "restore") and name == "checkpoint" and path != "checkpoint create":
        return "checkpoints"
    if where == "storage" and name == "id":
        return "" if path == "storage mount" else "mounts"
    if name == "pod" or (where == "pod" and name == "id"):
        return "pods"
    if path == "cp":
        return "places"
    if action.metavar in ("IMAGE", "ID|NAME"):
        return "images"
    by_dest = {"container": "containers", "process": "processes", "signal": "signals", "runtime": "runtimes"}
    if name in by_dest:
        return by_dest[name]
    if action.metavar == "ID":
        return "" if action.option_strings else "containers"
    return "files" if action.metavar in _PATHS else ""


Source = Callable[[dict[str, str]], Awaitable[Iterable[str]]]


def _known(source: Source, given: dict[str, str]) -> list[tuple[str, str]]:
    """Names and nothing else: whatever goes wrong, there are none."""

    async def ask() -> list[tuple[str, str]]:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return [(name, "") for name in dict.fromkeys(await source(given)) if name.isprintable()]

    try:
        return asyncio.run(ask())
    except (HostError, VmError, RpcError, ProtocolError, OSError):  # OSError: TimeoutError is one
        return []


async def _ask(given: dict[str, str], question: Callable[[Client], Awaitable[Any]]) -> Any:
    address = agent_address(argparse.Namespace(vm=given.get("vm"), address=given.get("address")))
    async with await Client.connect(address, timeout=DEADLINE_SECONDS) as client:
        return await question(client)


async def _containers(given: dict[str, str]) -> Iterable[str]:
    found = await _ask(given, lambda client: client.list_containers(processes=False))
    return [each.container for each in found]


async def _places(given: dict[str, str]) -> Iterable[str]:
    return [f"{container}:" for container in await _containers(given)]


async def _pods(given: dict[str, str]) -> Iterable[str]:
    found = await _ask(given, lambda client: client.list_containers(processes=False))
    return [each.pod for each in found if each.pod]


async def _processes(given: dict[str, str]) -> Iterable[str]:
    found = await _ask(given, lambda client: client.list_containers())
    return [process.process for each in found for process in each.processes]


async def _checkpoints(given: dict[str, str]) -> Iterable[str]:
    return [each.checkpoint for each in await _ask(given, list_checkpoints)]


async def _mounts(given: dict[str, str]) -> Iterable[str]:
    return [each.mount for each in await _ask(given, list_mounts)]


async def _runtimes(given: dict[str, str]) -> Iterable[str]:
    return [each.name for each in (await _ask(given, lambda client: client.info())).runtimes]


async def _images(_given: dict[str, str]) -> Iterable[str]:
    return [name for each in ImageCache().entries() for name in (*each.names, each.ident)]


async def _vms(_given: dict[str, str]) -> Iterable[str]:
    return [each.name for each in VmStore().list()]


async def _running_vms(_given: dict[str, str]) -> Iterable[str]:
    return [each.name for each in VmStore().list() if each.state == "running"]


async def _signals(_given: dict[str, str]) -> Iterable[str]:
    return sorted(each.name.removeprefix("SIG") for each in signal.Signals)


_KINDS: dict[str, Source] = {
    "containers": _containers,
    "places": _places,
    "pods": _pods,
    "processes": _processes,
    "checkpoints": _checkpoints,
    "mounts": _mounts,
    "runtimes": _runtimes,
    "images": _images,
    "VMs": _vms,
    "running VMs": _running_vms,
    "signals": _signals,
}
