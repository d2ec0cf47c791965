"""Small charts as SVG text; colours come from the page's style sheet, for light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 24, 36
"""Margins of the plot area."""
FOREST = 220
"""Width of an interval in a table."""


class Curve(NamedTuple):
    """A named line; its class is its colour."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]


class Bars(NamedTuple):
    """A named histogram over the x axis."""

    name: str
    style: str
    heights: Sequence[float]


class Axis(NamedTuple):
    """One axis: its title, its range, and where it has labels."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value, 0 to 1; values outside are at the end."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        return min(max((value - low) / (high - low), 0.0), 1.0)


def linear(title: str, low: float, high: float) -> Axis:
    """Return an axis with about five round ticks."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next((m for m in (1, 2, 5) if (high - low) / (step * m) <= 6), 10)  # noqa: PLR2004
    first = math.ceil(low / step)
    values = [i * step for i in range(first, math.floor(high / step) + 1)]
    return Axis(title, low, high, [(v, f"{v:g}" if abs(v) > step / 2 else "0") for v in values])


def shares(title: str) -> Axis:
    """Return an axis from 0 to 1."""
    return Axis(title, 0, 1, [(i / 4, f"{i / 4:g}") for i in range(5)])


def log_shares(title: str) -> Axis:
    """Return a logarithmic axis from 0.1 % to 100 %."""
    ticks = [(0.001, "0.1 %"), (0.01, "1 %"), (0.1, "10 %"), (1.0, "100 %")]
    return Axis(title, 0.001, 1, ticks, log=True)


def plot(
    x: Axis,
    y: Axis,
    *,
    curves: Sequence[Curve] = (),
    bars: Sequence[Bars] = (),
    threshold: float | None = None,
    diagonal: bool = False,
    label: str,
) -> str:
    """Return one chart.

    Args:
        x: horizontal axis.
        y: vertical axis.
        curves: lines, the first one on top.
        bars: histograms, drawn as filled steps below the lines.
        threshold: an x value that is marked.
        diagonal: draw chance.
        label: what the chart shows, for readers who cannot see it.
    """
    parts = [*_axes(x, y)]
    if diagonal:
        parts.append(_line("chance", x, y, [(x.low, y.low), (x.high, y.high)]))
    parts += [_steps(bar, y) for bar in bars]
    parts += [
        _line(f"curve {curve.style}", x, y, curve.points, curve.name)
        for curve in reversed(curves)
        if curve.points
    ]
    if threshold is not None:
        at = _x(x, threshold)
        parts.append(
            f'<line class="threshold" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}"/>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def forest(
    value: float, interval: tuple[float, float], style: str, low: float = 0.0, high: float = 1.0
) -> str:
    """Return a value with its interval on a line from `low` to `high`, the middle marked."""

    def at(v: float) -> float:
        return 4 + (FOREST - 8) * min(max((v - low) / (high - low), 0), 1)

    return (
        f'<svg class="forest {escape(style)}" viewBox="0 0 {FOREST} 16" aria-hidden="true">'
        f'<line class="grid" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="8" y2="8"/>'
        f'<line class="chance" x1="{at((low + high) / 2):.1f}" '
        f'x2="{at((low + high) / 2):.1f}" y1="1" y2="15"/>'
        f'<line class="range" x1="{at(interval[0]):.1f}" x2="{at(interval[1]):.1f}" y1="8" y2="8"/>'
        f'<circle cx="{at(value):.1f}" cy="8" r="4"/></svg>'
    )


def _x(axis: Axis, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * axis.at(value)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis.at(value)


def _axes(x: Axis, y: Axis) -> Iterable[str]:
    for value, text in y.ticks:
        at = _y(y, value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        low = at + 3.5
        yield f'<text class="tick" x="{LEFT - 6}" y="{low:.1f}" text-anchor="end">{text}</text>'
    for value, text in x.ticks:
        at = _x(x, value)
        bottom = HEIGHT - BOTTOM
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 3}"/>'
        yield (
            f'<text class="tick" x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{text}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield (
        f'<text class="title" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x.title)}</text>"
    )
    if y.title:
        yield (
            f'<text class="title" x="{LEFT}" y="{TOP - 11}" text-anchor="start">'
            f"{escape(y.title)}</text>"
        )


def _line(
    style: str, x: Axis, y: Axis, points: Sequence[tuple[float, float]], name: str = ""
) -> str:
    path = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in points)
    title = f"<title>{escape(name)}</title>" if name else ""
    return f'<polyline class="{escape(style)}" points="{path}">{title}</polyline>'


def _steps(bar: Bars, y: Axis) -> str:
    base = _y(y, y.low)
    width = (WIDTH - LEFT - RIGHT) / len(bar.heights)
    points = [f"{LEFT:.1f},{base:.1f}"]
    for i, height in enumerate(bar.heights):
        top = _y(y, height)
        points += [f"{LEFT + i * width:.1f},{top:.1f}", f"{LEFT + (i + 1) * width:.1f},{top:.1f}"]
    points.append(f"{WIDTH - RIGHT:.1f},{base:.1f}")
    return (
        f'<polygon class="bars {escape(bar.style)}" points="{" ".join(points)}">'
        f"<title>{escape(bar.name)}</title></polygon>"
    )
