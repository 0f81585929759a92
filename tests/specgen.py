"""Renders the tables of protocol/SPEC.md from the contract's code.

Each table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. ``python -m tests.specgen``
rewrites them in place; tests/unit/test_protocol_spec.py fails when that would change anything.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from enum import Enum
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from gcsagent.agent.container import ALLOWED, REQUESTS
from protocol import checks, errors, limits, method, methods, mountchecks, netchecks, pods, usage
from protocol import types as records
from protocol.connection import TRANSITIONS
from protocol.families import guest, shell
from protocol.method import Empty

SPEC = Path(__file__).parent.parent / "protocol" / "SPEC.md"
BLOCK = re.compile(r"(<!-- generated: ([\w .]+) -->\n).*?(<!-- end -->)", re.DOTALL)

_NAMED = {
    checks.identifier: "id",
    checks.absolute_path: "path",
    checks.file_name: "file name",
    mountchecks.exact_path: "exact path",
    mountchecks.mount_option: "mount option",
    mountchecks.pci_path: "PCI address",
    mountchecks.virtio_name: "virtio device",
    mountchecks.device_name: "string",
    mountchecks.root_hash: "hex digits",
    checks.signal: "signal",
    checks.cpus: "number 0.01 to 8192, or -1",
    checks.cpuset: "list of numbers",
    checks.device: "device",
    checks.request_id: "request id",
    checks.sha256: "64 hex digits",
    checks.chunk: "bytes",
    checks.labels: "map of string to string",
    checks.host_name: "host name",
    checks.search_domain: "domain name",
    checks.ip_address: "IP address",
    checks.dns_option: "option of resolv.conf",
    netchecks.ifname: "interface name",
    netchecks.mac: "MAC address",
    netchecks.interface_address: "IP address/prefix length",
    netchecks.subnet: "network/prefix length",
    netchecks.destination: "network/prefix length, or `default`",
    netchecks.sysctls: "map of string to string",
    shell.command: f"array of string, at most {shell.MAX_WORDS}",
    shell.environment: "map of string to string",
    shell.terminal_type: "string",
    guest.random_bytes: f"1 to {guest.MAX_ENTROPY} bytes",
    checks.Between(0, limits.MAX_STREAM_OFFSET): "offset",
}
_PLAIN = {str: "string", int: "integer", bool: "bool", float: "number", bytes: "bytes", Any: "any"}
_EVERYWHERE = {
    "container": "Which container.",
    "process": "Which process of it; `init` is its init.",
    "mount": "Which mount.",
}


def render(text: str) -> str:
    """``text`` with every generated block made anew. Raises KeyError for a block nobody can make."""
    return BLOCK.sub(lambda match: match[1] + block(match[2]) + match[3], text)


def block(name: str) -> str:
    kind, _, argument = name.partition(" ")
    return "".join(f"{line}\n" for line in _RENDERERS[kind](argument))


def _find(name: str) -> Any:
    return next(
        getattr(module, name)
        for module in (records, usage, pods, method, *methods.families(), limits, errors)
        if hasattr(module, name)
    )


def _states(_: str) -> Iterable[str]:
    yield "| in state | what happens | next state |"
    yield "|---|---|---|"
    for (state, step), target in TRANSITIONS.items():
        yield f"| {state} | {step} | {target} |"


def _requests(_: str) -> Iterable[str]:
    columns = list(records.Status)
    yield f"| request | {' | '.join(status.value for status in columns)} | then |"
    yield "|---" * (len(columns) + 2) + "|"
    for name, (action, leads_to) in REQUESTS.items():
        cells = ["yes" if status in ALLOWED[action] else "" for status in columns]
        method, _, rest = name.partition(" ")
        request = f"`{method}` {rest}".strip()
        yield f"| {request} | {' | '.join(cells)} | {leads_to.value if leads_to else ''} |"


def _limits(_: str) -> Iterable[str]:
    yield "| name | value | meaning |"
    yield "|---|---|---|"
    docs = _attribute_docs(limits)[""]
    for name, doc in docs.items():
        yield f"| `{name}` | {getattr(limits, name)} | {doc} |"


def _enum(kind: Any) -> Iterable[str]:
    yield "| value | meaning |"
    yield "|---|---|"
    docs = _docs_of(kind)
    for member in kind:
        yield f"| `{member.value}` | {docs.get(member.name, '')} |"


def _method(name: str) -> Iterable[str]:
    entry = methods.METHODS[name]
    deadline = "none" if entry.deadline_ms is None else f"{entry.deadline_ms} ms"
    commit = f"; takes `request_id`; commit point: {entry.commit}" if entry.mutating else ""
    yield f"Default deadline: {deadline}{commit}."
    yield ""
    yield from _record(entry.params, "argument", "No arguments.")
    yield ""
    if entry.result is Empty:
        yield "Result: an empty map."
    elif entry.result.__module__ in (records.__name__, usage.__name__, pods.__name__):
        yield f"Result: {_link(entry.result)}."
    else:
        yield "Result:"
        yield ""
        yield from _record(entry.result)


def _record(cls: Any, heading: str = "key", empty: str = "Empty.") -> Iterable[str]:
    fields, docs = dataclasses.fields(cls), _docs_of(cls)
    if not fields:
        yield empty
        return
    hints = typing.get_type_hints(cls, include_extras=True)
    yield f"| {heading} | type | default | meaning |"
    yield "|---|---|---|---|"
    for field in fields:
        meaning = docs.get(field.name) or _EVERYWHERE[field.name]
        yield f"| `{field.name}` | {_type(hints[field.name])} | {_default(field)} | {meaning} |"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "{}"
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "absent"
    if dataclasses.is_dataclass(value):
        return "all defaults"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):  # 0 and 1 equal False and True
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value) or "[]"
    return f"`{value}`" if value != "" else "empty"


def _type(hint: Any) -> str:
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        check = arguments[1]
        if check in _NAMED:
            return _NAMED[check]
        if isinstance(check, checks.AtMost):
            return f"{_type(arguments[0])}, {f'{check.least} to' if check.least else 'at most'} {check.most}"
        extra = ", or -1" if isinstance(check, checks.Limit) else ""
        return f"integer {check.low} to {check.high}{extra}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(option) for option in arguments if option is not type(None))
    if origin is tuple:
        return f"array of {_type(arguments[0])}"
    if origin is dict:
        return "map" if arguments[1] is Any else f"map of string to {_type(arguments[1])}"
    return _link(hint)


def _link(cls: type) -> str:
    return f"[{cls.__name__}](#{cls.__name__.lower()})"


def _docs_of(cls: type) -> dict[str, str]:
    return _attribute_docs(sys.modules[cls.__module__])[cls.__name__]


@cache
def _attribute_docs(module: types.ModuleType) -> dict[str, dict[str, str]]:
    """For each class of ``module`` ("" for the module itself): the string below each assignment."""
    tree = ast.parse(inspect.getsource(module))
    docs = {"": _docs_in(tree.body)}
    docs |= {node.name: _docs_in(node.body) for node in tree.body if isinstance(node, ast.ClassDef)}
    return docs


def _docs_in(body: list[ast.stmt]) -> dict[str, str]:
    docs = {}
    for statement, following in pairwise(body):
        match statement, following:
            case (
                (ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name))),
                ast.Expr(value=ast.Constant(value=str() as text)),
            ):
                docs[name] = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    return docs


_RENDERERS: dict[str, Callable[[str], Iterable[str]]] = {
    "states": _states,
    "requests": _requests,
    "limits": _limits,
    "method": _method,
    "record": lambda name: _record(_find(name)),
    "enum": lambda name: _enum(_find(name)),
}


if __name__ == "__main__":
    SPEC.write_text(render(SPEC.read_text()))
