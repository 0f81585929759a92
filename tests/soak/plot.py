"""What was held over time, one row for each thing, as SVG written by hand."""

from __future__ import annotations

from html import escape

ROW, LEFT, WIDTH, GAP = 60, 190, 560, 12
INK, LINE, KILL = "#444444", "#3b7d4f", "#b4552d"


def svg(times: list[float], rows: dict[str, list[int]], kills: list[float], title: str) -> str:
    """``times`` in seconds, ``rows`` as many values each; a tick for each kill of the agent."""
    last = max([*times, 1.0])
    height = (ROW + GAP) * len(rows) + 50
    drawn = [
        _row(name, values, times, last, 30 + number * (ROW + GAP))
        for number, (name, values) in enumerate(rows.items())
    ]
    ticks = "".join(
        f'<line x1="{_x(at, last)}" x2="{_x(at, last)}" y1="{height - 18}" y2="{height - 10}"'
        f' stroke="{KILL}"/>'
        for at in kills
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 90}" height="{height}"'
        f' font-family="sans-serif" font-size="12" fill="{INK}">'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="16">{escape(title)}</text>{"".join(drawn)}'
        f'<text x="{LEFT - 8}" y="{height - 8}" text-anchor="end">agent killed</text>{ticks}</svg>\n'
    )


def _x(at: float, last: float) -> str:
    return f"{LEFT + WIDTH * at / last:.1f}"


def _row(name: str, values: list[int], times: list[float], last: float, top: int) -> str:
    most = max([*values, 1])
    points = " ".join(
        f"{_x(at, last)},{top + ROW - ROW * value / most:.1f}"
        for at, value in zip(times, values, strict=True)
    )
    return (
        f'<text x="{LEFT - 8}" y="{top + ROW / 2}" text-anchor="end">{escape(name)}</text>'
        f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{top + ROW}" y2="{top + ROW}" stroke="#dddddd"/>'
        f'<polyline points="{points}" fill="none" stroke="{LINE}" stroke-width="1.5"/>'
        f'<text x="{LEFT + WIDTH + 8}" y="{top + 10}">{most}</text>'
    )
