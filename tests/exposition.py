"""Reads Prometheus' text exposition format, version 0.0.4, and takes nothing that is not in it.

Written from the format's description, and apart from what writes it and what gcsctl checks it with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TYPES = {"counter", "gauge", "histogram", "summary", "untyped"}
_FIRST = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_:")
_NAME = _FIRST | set("0123456789")


@dataclass
class Family:
    help: str = ""
    type: str = ""
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)


def parse(text: str) -> dict[str, Family]:
    """Metrics by name. Raises AssertionError for a line, an order or a histogram that is wrong."""
    assert text.endswith("\n")
    families: dict[str, Family] = {}
    current = ""
    for line in text[:-1].split("\n"):
        if line.startswith("# "):
            _, kind, name, rest = line.split(" ", 3)
            if name != current:
                assert name not in families, f"{name} comes twice"
                current = name
            family = families.setdefault(name, Family())
            assert not family.samples, f"{line!r} behind its samples"
            _comment(family, kind, rest)
        else:
            _sample(families[current], current, line)
    for name, family in families.items():
        _check(name, family)
    return families


def _comment(family: Family, kind: str, rest: str) -> None:
    if kind == "HELP":
        assert rest
        assert not family.help
        family.help = rest
    else:
        assert kind == "TYPE"
        assert rest in TYPES
        assert not family.type
        family.type = rest


def _sample(family: Family, metric: str, line: str) -> None:
    end = next(at for at, char in enumerate(line) if char not in _NAME)
    name, rest = line[:end], line[end:]
    assert name[0] in _FIRST
    allowed = (
        {metric} if family.type != "histogram" else {metric + end for end in ("_bucket", "_sum", "_count")}
    )
    assert name in allowed, f"{name} among the samples of {metric}"
    labels: list[tuple[str, str]] = []
    if rest.startswith("{"):
        labels, rest = _labels(rest[1:])
    assert rest.startswith(" "), line
    key = (name, tuple(sorted(labels)))
    assert key not in family.samples, f"{line!r} comes twice"
    assert len(dict(labels)) == len(labels), f"{line!r} has a label twice"
    family.samples[key] = float(rest[1:])


def _labels(rest: str) -> tuple[list[tuple[str, str]], str]:
    labels = []
    while True:
        name, _, rest = rest.partition('="')
        assert name, rest
        assert name[0] in _FIRST - {":"}
        assert set(name) <= _NAME - {":"}
        value = ""
        while not rest.startswith('"'):
            if rest[0] == "\\":
                value += {"\\": "\\", '"': '"', "n": "\n"}[rest[1]]
                rest = rest[2:]
            else:
                value, rest = value + rest[0], rest[1:]
        labels.append((name, value))
        rest = rest[1:]
        if rest.startswith("}"):
            return labels, rest[1:]
        assert rest.startswith(","), rest
        rest = rest[1:]


def _check(name: str, family: Family) -> None:
    assert family.help, f"{name} has no HELP"
    assert family.type, f"{name} has no TYPE"
    assert family.samples, f"{name} has no sample"
    assert (family.type == "counter") == name.endswith("_total"), name
    if family.type == "counter":
        assert all(value >= 0 for value in family.samples.values())
    if family.type == "histogram":
        _check_histogram(name, family)


def _check_histogram(name: str, family: Family) -> None:
    series: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    for (sample, labels), value in family.samples.items():
        if sample == f"{name}_bucket":
            rest = tuple(pair for pair in labels if pair[0] != "le")
            series.setdefault(rest, []).append((float(dict(labels)["le"]), value))
    for labels, buckets in series.items():
        assert buckets == sorted(buckets), f"{name} {labels}: not in order, or not added up"
        assert [value for _, value in buckets] == sorted(value for _, value in buckets)
        assert buckets[-1] == (float("inf"), family.samples[f"{name}_count", labels])
        assert family.samples[f"{name}_sum", labels] >= 0
