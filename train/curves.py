"""Curves over steps as inline SVG: light, dark, narrow and without a script.

Legend: a series is a name and its points (step, value); steps rise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vlm.page import text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 230, 64, 10, 10, 28
"""Of the picture and its margins, in its own units."""
COLORS = 6
"""Of vlm/page.py."""
DASHES = (("solid", ""), ("dashed", "7 4"), ("dotted", "2 3"))
"""Of the legend and of the line: colour is not all that tells series apart."""
POINTS = 120
"""More of a series are shown as means of as many stretches, over the range of each."""
FEW = 24
"""So many points are marked as such."""
LOG_FROM = 20
"""Ratio of largest to smallest value from which the axis is logarithmic."""

Points = list[tuple[int, float]]

STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
  gap: 1rem; }
.chart { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem .4rem; min-width: 0; display: flex; flex-direction: column;
  justify-content: space-between; }
.chart h3 { font-size: 1rem; margin: 0; } .chart small { font-weight: 400; }
.key { display: inline-block; margin-right: 1rem; font-size: .875rem; color: var(--quiet);
  overflow-wrap: anywhere; }
.key i { display: inline-block; width: 1.4rem; border-top: 2px; margin-right: .35rem;
  vertical-align: middle; }
.key b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.chart svg { min-width: 0; margin: .25rem 0 0; }
.chart path, .chart circle, .chart .mark line { pointer-events: none; }
.chart .stretch rect { fill: transparent; }
.chart .stretch:hover rect { fill: var(--line); fill-opacity: .7; }
.chart .mark { stroke: var(--quiet); stroke-dasharray: 1 3; }
@media (max-width: 40rem) { .chart { padding: .7rem .6rem .3rem; }
  .chart svg text, .chart svg .quiet { font-size: 16px; } }
"""


@dataclass(frozen=True)
class Series:
    name: str
    points: Points
    look: tuple[int, int] | None = None
    """Which of the colours and of `DASHES`; None: by its place in the picture."""


def show(value: float) -> str:
    """Four significant digits, thousands apart."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 4)}f}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def chart(
    title: str,
    series: Sequence[Series],
    unit: Callable[[float], str] = show,
    from_zero: bool = False,
    marks: Sequence[int] = (),
) -> str:
    """A figure with its legend; nothing where no series has a point.

    Args:
        unit: how values are written.
        from_zero: the axis begins at 0; else it fits the values, and is logarithmic where they
            differ by much.
        marks: steps at which the run was resumed.
    """
    series = _kept(series, math.isfinite)
    if not series:
        return ""
    values = [value for s in series for _, value in s.points]
    positive = [value for value in values if value > 0]
    logarithmic = bool(positive) and not from_zero and max(positive) > LOG_FROM * min(positive)
    if logarithmic:  # what is 0 has no place there: a step at learning rate 0 changes nothing
        series, values = _kept(series, lambda value: value > 0), positive
    ticks = _decades(min(values), max(values)) if logarithmic else _ticks(values, from_zero)
    first, last = _ends([step for s in series for step, _ in s.points])
    y = _scale(min([*ticks, *values]), max([*ticks, *values]), HEIGHT - BOTTOM, TOP, logarithmic)
    x = _scale(first, last, LEFT, WIDTH - RIGHT)
    stretches = [_stretches(s.points, first, last) for s in series]
    parts = [_grid(ticks, y, unit), _steps(first, last, x), _hovers(series, stretches, x, unit)]
    for step in marks:
        if first <= step <= last:
            parts.append(
                f'<g class="mark"><title>resumed at step {step:,}</title><line x1="{x(step)}" '
                f'x2="{x(step)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></g>'
            )
    looks = [s.look or (number % COLORS, number % len(DASHES)) for number, s in enumerate(series)]
    parts += [_line(look, each, x, y) for look, each in zip(looks, stretches, strict=True)]
    scale = ' <small class="quiet">logarithmic</small>' if logarithmic else ""
    return (
        f'<figure class="chart"><figcaption><h3>{text(title)}{scale}</h3>'
        f"{_legend(series, looks, unit)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _kept(series: Sequence[Series], wanted: Callable[[float], bool]) -> list[Series]:
    """Series of the points whose value is wanted; those without one are left out."""
    cut = [replace(s, points=[point for point in s.points if wanted(point[1])]) for s in series]
    return [s for s in cut if s.points]


def _legend(series: Sequence[Series], looks, unit: Callable[[float], str]) -> str:
    """Each series with its last value."""
    keys = []
    for s, (color, dash) in zip(series, looks, strict=True):
        style = f"{DASHES[dash][0]} var(--s{color})"
        keys.append(
            f'<span class="key"><i style="border-top: 2px {style}"></i>'
            f"<b>{unit(s.points[-1][1])}</b> {text(s.name or 'last')}</span>"
        )
    return "".join(keys)


@dataclass(frozen=True)
class _Stretch:
    """Neighbouring points as one."""

    step: float
    mean: float
    low: float
    high: float


def _stretches(points: Points, first: float, last: float) -> list[_Stretch]:
    if len(points) <= POINTS:
        return [_Stretch(step, value, value, value) for step, value in points]
    groups: dict[int, Points] = {}
    for step, value in points:
        place = int((step - first) / (last - first) * POINTS)
        groups.setdefault(min(place, POINTS - 1), []).append((step, value))
    out = []
    for group in groups.values():
        values = [value for _, value in group]
        step = sum(step for step, _ in group) / len(group)
        out.append(_Stretch(step, sum(values) / len(values), min(values), max(values)))
    return out


def _line(look: tuple[int, int], stretches: list[_Stretch], x, y) -> str:
    color, dash = f"var(--s{look[0]})", DASHES[look[1]][1]
    parts = []
    if any(s.low != s.high for s in stretches):
        there = [f"{x(s.step)} {y(s.high)}" for s in stretches]
        back = [f"{x(s.step)} {y(s.low)}" for s in reversed(stretches)]
        band = "L".join([*there, *back])
        parts.append(f'<path d="M{band}z" fill="{color}" fill-opacity=".16"/>')
    line = "L".join(f"{x(s.step)} {y(s.mean)}" for s in stretches)
    parts.append(
        f'<path d="M{line}" fill="none" stroke="{color}" stroke-width="1.8" '
        f'stroke-linejoin="round"{f" stroke-dasharray={dash!r}" if dash else ""}/>'
    )
    if len(stretches) <= FEW:
        parts += [
            f'<circle cx="{x(s.step)}" cy="{y(s.mean)}" r="2.6" fill="{color}"/>' for s in stretches
        ]
    return "".join(parts)


def _hovers(series: Sequence[Series], stretches: list[list[_Stretch]], x, unit) -> str:
    """Columns that tell the values of their steps where the pointer rests."""
    told: dict[float, list[str]] = {}
    for s, each in zip(series, stretches, strict=True):
        for stretch in each:
            words = f"{s.name} {unit(stretch.mean)}".strip()
            if stretch.low != stretch.high:
                words += f" ({unit(stretch.low)} to {unit(stretch.high)})"
            told.setdefault(stretch.step, []).append(words)
    steps = sorted(told)
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in pairwise(steps))]
    edges.append(WIDTH - RIGHT)
    columns = []
    for step, (left, right) in zip(steps, pairwise(edges), strict=True):
        words = "\n".join([f"step {step:,.0f}", *told[step]])
        columns.append(
            f'<g class="stretch"><title>{text(words)}</title><rect x="{left:.1f}" y="{TOP}" '
            f'width="{right - left:.1f}" height="{HEIGHT - BOTTOM - TOP}"/></g>'
        )
    return "".join(columns)


def _grid(ticks: Sequence[float], y, unit) -> str:
    parts = []
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
            f'<text class="quiet" x="{LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">'
            f"{_short(tick, unit)}</text>"
        )
    return "".join(parts)


def _short(tick: float, unit: Callable[[float], str]) -> str:
    """A tick's label: no digit more than it needs."""
    if unit is percent:
        return f"{100 * tick:g} %"
    if 1e4 <= abs(tick) < 1e6:
        return f"{tick / 1e3:g}k"
    if 0 < abs(tick) < 1e-4:
        return f"{tick:.0e}".replace("e-0", "e-")
    return f"{tick:g}"


def _steps(first: float, last: float, x) -> str:
    labels = "".join(
        f'<text class="quiet" x="{x(tick)}" y="{HEIGHT - 8}" '
        f'text-anchor="{"middle" if x(tick) < WIDTH - 30 else "end"}">{tick:,.0f}</text>'
        for tick in _nice(first, last, 4)
        if tick == int(tick) and first <= tick <= last
    )
    axis = HEIGHT - BOTTOM
    return f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis}" y2="{axis}"/>{labels}'


def _scale(
    low: float, high: float, start: float, end: float, logarithmic: bool = False
) -> Callable[[float], float]:
    """low..high -> start..end."""
    to = math.log if logarithmic else float
    begin, width = to(low), (to(high) - to(low)) or 1.0
    return lambda value: round(start + (to(value) - begin) / width * (end - start), 1)


def _ends(steps: list[int]) -> tuple[float, float]:
    first, last = min(steps), max(steps)
    return (first, last) if first < last else (first - 1, last + 1)


def _ticks(values: list[float], from_zero: bool) -> list[float]:
    low, high = min(values), max(values)
    if from_zero:
        low = min(0.0, low)
    if low == high:
        high = low + (abs(low) / 10 or 1)
    return _nice(low, high, 4)


def _nice(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)
    return [round(k * step, 12) for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten inside, with 2 and 5 between where they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5) if len(powers) <= 3 else (1, 3)
    return [t for p in powers for k in factors if low <= (t := k * 10.0**p) <= high]
