"""An agent's metrics, put together from their pages; everything the agent says is checked by line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gcsagent.host.client import Client
from protocol.errors import RemoteProtocolError
from protocol.families.diagnostics import AskMetrics, Metrics

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = rf'{_NAME}="(?:[^"\\\x00-\x1f\x7f-\x9f]|\\["\\n])*"'
SAMPLE = re.compile(rf"({_NAME})(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? (-?[0-9.]+(?:e[+-]?[0-9]+)?|NaN|[+-]Inf)")
COMMENT = re.compile(rf"# (HELP|TYPE) ({_NAME}) ([^\x00-\x1f\x7f-\x9f]*)")

_PAIR = re.compile(rf'({_NAME})="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")

MAX_PAGES = 4096


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of the format."""

    name: str
    labels: dict[str, str]
    value: float


def samples(text: str) -> list[Sample]:
    """Those of a text that :func:`metrics` has given."""
    matches = (SAMPLE.fullmatch(line) for line in text.splitlines() if not line.startswith("#"))
    return [Sample(found[1], _labels(found[2] or ""), float(found[3])) for found in matches if found]


def _labels(text: str) -> dict[str, str]:
    return {
        name: _ESCAPED.sub(lambda match: "\n" if match[1] == "n" else match[1], value)
        for name, value in _PAIR.findall(text)
    }


async def metrics(client: Client) -> str:
    """All of them, in Prometheus' text exposition format, each metric once with its HELP and TYPE.

    Raises what :meth:`Client.call` raises; RemoteProtocolError when a line is none of that format.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}
    after = None
    for _ in range(MAX_PAGES):
        page: Metrics = await client.call("agent.metrics", AskMetrics(after))
        _merge(families, page.text)
        if page.next is None or (after is not None and page.next <= after):
            break
        after = page.next
    lines = (line for comments, samples in families.values() for line in (*comments, *samples))
    return "".join(f"{line}\n" for line in lines)


def _merge(families: dict[str, tuple[list[str], list[str]]], text: str) -> None:
    """Prometheus takes a metric's samples together, behind one HELP and TYPE."""
    current = ""
    for line in text.split("\n"):
        comment = COMMENT.fullmatch(line)
        if comment is not None:
            current = comment[2]
            comments = families.setdefault(current, ([], []))[0]
            if not any(each.startswith(f"# {comment[1]} ") for each in comments):
                comments.append(line)
        elif line:
            sample = SAMPLE.fullmatch(line)
            if sample is None or not current or not sample[1].startswith(current):
                raise RemoteProtocolError("metrics", "the agent's metrics are not in Prometheus' text format")
            families[current][1].append(line)
