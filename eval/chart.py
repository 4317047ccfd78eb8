"""Points with their 95 % intervals, one to a line, as inline SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.stats import Interval
from vlm.page import text

WIDTH, LEFT, RIGHT = 960, 210, 60
"""Of the picture, of the names' column and of the figures' column, in pixels."""
LINE, HEAD, GAP, TOP = 22, 22, 14, 26
SERIES = 6
"""Colours of vlm/page.py."""
LONGEST = 26
"""Characters of a name."""


@dataclass(frozen=True)
class Point:
    """One line of the chart."""

    name: str
    value: float | None
    """None: `shown` stands in its place."""
    interval: Interval | None
    shown: str
    series: int
    """Which colour and shape."""


@dataclass(frozen=True)
class Group:
    """Points under one heading; an empty heading takes no room."""

    heading: str
    points: Sequence[Point]


def chart(groups: Sequence[Group], low: float, high: float, step: float, label: str) -> str:
    """SVG over the axis low..high with a tick every `step`; `label` says what is shown."""
    right = WIDTH - RIGHT
    heights = [HEAD * bool(g.heading) + LINE * len(g.points) + GAP for g in groups]
    height = TOP + sum(heights) + 4

    def x(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (right - LEFT), 1)

    parts = []
    for k in range(round((high - low) / step) + 1):
        tick = low + k * step
        kind = "axis" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x(tick)}" x2="{x(tick)}" y1="20" y2="{height}"/>')
        parts.append(
            f'<text class="quiet" x="{x(tick)}" y="13" text-anchor="middle">{tick:g}</text>'
        )
    y = TOP
    for group, taken in zip(groups, heights, strict=True):
        line = y
        if group.heading:
            parts.append(f'<text class="head" x="0" y="{y + 15}">{text(group.heading)}</text>')
            line += HEAD
        for point in group.points:
            parts.append(_point(point, x, line + LINE / 2))
            line += LINE
        y += taken
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _point(point: Point, x, y: float) -> str:
    name = point.name
    short = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    tip = f"{name}: {point.shown}"
    parts = [f'<text class="quiet" x="12" y="{y + 4}">{text(short)}</text>']
    if point.value is None:
        parts.append(f'<text class="quiet" x="{LEFT + 6}" y="{y + 4}">{text(point.shown)}</text>')
    else:
        color = f"var(--s{point.series % SERIES})"
        if point.interval:
            low, high = map(x, point.interval)
            tip += f", 95 % interval {point.interval[0]:.1f} to {point.interval[1]:.1f}"
            parts.append(
                f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}" stroke="{color}" '
                'stroke-width="3" stroke-opacity=".5" stroke-linecap="round"/>'
            )
        parts.append(f'<path d="{_shape(point.series, x(point.value), y)}" fill="{color}"/>')
        parts.append(f'<text x="{WIDTH}" y="{y + 4}" text-anchor="end">{text(point.shown)}</text>')
    return f"<g><title>{text(tip)}</title>{''.join(parts)}</g>"


def _shape(series: int, x: float, y: float) -> str:
    """Circle, square, diamond, triangle: colour is not all that tells series apart."""
    return (
        f"M{x - 5} {y}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
        f"M{x - 4.5} {y - 4.5}h9v9h-9z",
        f"M{x} {y - 6.5}l6 6.5l-6 6.5l-6 -6.5z",
        f"M{x} {y - 6}l6 10.5h-12z",
    )[series % 4]
