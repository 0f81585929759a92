"""Writes Prometheus' text exposition format, version 0.0.4.

Source: prometheus.io/docs/instrumenting/exposition_formats. All samples of a metric stand together, behind
its HELP and TYPE.
"""

from __future__ import annotations

from collections.abc import Mapping

Families = Mapping[str, tuple[str, str]]
"""Type and meaning of each metric, by name."""

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class Exposition:
    """``size`` is about how many characters :meth:`text` will have."""

    def __init__(self, families: Families) -> None:
        self._families = families
        self._samples: dict[str, list[str]] = {}
        self.size = 0

    def add(self, name: str, value: float | None, suffix: str = "", **labels: str) -> None:
        """One sample of the metric ``name``; none when it is not known. ``suffix`` is a histogram's."""
        if value is None:
            return
        samples = self._samples.get(name)
        if samples is None:
            samples = self._samples[name] = []
            self.size += len(name) * 2 + len(self._families[name][1]) + 32
        pairs = ",".join(f'{key}="{text.translate(_ESCAPES)}"' for key, text in labels.items())
        shown = f"{{{pairs}}}" if pairs else ""
        line = f"{name}{suffix}{shown} {_number(value)}"
        samples.append(line)
        self.size += len(line) + 1

    def text(self) -> str:
        lines = []
        for name, samples in self._samples.items():
            kind, meaning = self._families[name]
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *samples]
        return "".join(f"{line}\n" for line in lines)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else format(value, ".9g")
