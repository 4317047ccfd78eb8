"""A line chart as SVG, without a plotting library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
TICKS = 5

Points = Sequence[tuple[float, float]]


def write_chart(path: Path, title: str, x: str, y: str, lines: Mapping[str, Points]) -> None:
    """Draw named lines of points with both axes from 0; `x` and `y` are the axes' labels."""
    far = max(point[0] for points in lines.values() for point in points)
    high = max(point[1] for points in lines.values() for point in points) * 1.05

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = LEFT + point[0] / far * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - point[1] / high * (HEIGHT - TOP - BOTTOM)

    (left, bottom), (right, top) = at((0, 0)), at((far, high))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 20, title, "middle", "bold"),
        _text((left + right) / 2, HEIGHT - 12, x, "middle"),
        f'<g transform="translate(16 {(top + bottom) / 2}) rotate(-90)">'
        f"{_text(0, 0, y, 'middle')}</g>",
    ]
    for number in range(TICKS + 1):
        share = number / TICKS
        across, up = at((share * far, share * high))
        parts.append(
            f'<path d="M{left} {up:.1f}H{right}M{across:.1f} {top}V{bottom}" '
            'stroke="#ddd" fill="none"/>'
        )
        parts.append(_text(across, bottom + 16, f"{share * far:,.4g}", "middle"))
        parts.append(_text(left - 6, up + 4, f"{share * high:,.3g}", "end"))
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(point) for point in points]
        path_of = "L".join(f"{across:.1f} {up:.1f}" for across, up in places)
        parts.append(f'<path d="M{path_of}" stroke="{colour}" stroke-width="2" fill="none"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{u:.1f}" r="3" fill="{colour}"/>' for a, u in places]
        key = TOP + 16 + 18 * number
        parts.append(f'<path d="M{left + 12} {key}h20" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(left + 38, key + 4, name))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
