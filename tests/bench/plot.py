"""The picture for README: each ratio on its way to its target, as SVG written by hand."""

from __future__ import annotations

from html import escape
from typing import Any

Document = dict[str, Any]

ROW, LEFT, WIDTH, MOST = 22, 330, 420, 2.0
"""Pixels of a row, of the names, of the bars; and the ratio where a bar is cut off."""

MET, MISSED, INK = "#3b7d4f", "#b4552d", "#444444"


def svg(document: Document) -> str:
    """Ratios only: amounts have no baseline to be drawn against."""
    found = [each for each in document["figures"] if "theirs" in each]
    height = ROW * (len(found) + 2)
    rows = [_row(each, ROW * (number + 1)) for number, each in enumerate(found)]
    scale = "".join(_tick(ratio, height) for ratio in (0.5, 1.0, 1.5, 2.0))
    words = f"ratio to the baseline, median and quartiles; | the target ({escape(document['date'])})"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 80}" height="{height}"'
        f' font-family="sans-serif" font-size="12" fill="{INK}">'
        f'<rect width="100%" height="100%" fill="white"/><text x="{LEFT}" y="14">{words}</text>'
        f"{scale}{''.join(rows)}</svg>\n"
    )


def _x(ratio: float) -> float:
    return LEFT + WIDTH * min(ratio, MOST) / MOST


def _row(found: Document, top: int) -> str:
    value, middle = found["value"], top + ROW / 2
    colour = MET if found["met"] else MISSED
    bound = _x(float(found["target"].split()[1]))
    name = escape(f"{found['name']} ({found['tier']})")
    told = escape(f"{value['median']:.2f} {found['target']}")
    return (
        f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{name}</text>'
        f'<rect x="{LEFT}" y="{top + 4}" width="{_x(value["median"]) - LEFT:.1f}" height="{ROW - 8}"'
        f' fill="{colour}" fill-opacity="0.75"/>'
        f'<line x1="{_x(value["q1"]):.1f}" x2="{_x(value["q3"]):.1f}" y1="{middle}" y2="{middle}"'
        f' stroke="{INK}" stroke-width="2"/>'
        f'<line x1="{bound:.1f}" x2="{bound:.1f}" y1="{top + 1}" y2="{top + ROW - 1}" stroke="black"/>'
        f'<text x="{LEFT + WIDTH + 8}" y="{middle + 4}">{told}</text>'
    )


def _tick(ratio: float, height: int) -> str:
    return (
        f'<line x1="{_x(ratio)}" x2="{_x(ratio)}" y1="{ROW}" y2="{height - ROW + 4}" stroke="#dddddd"/>'
        f'<text x="{_x(ratio)}" y="{height - 4}" text-anchor="middle">{ratio:g}</text>'
    )
