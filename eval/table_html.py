"""The table of scores as one HTML page with a chart."""

from eval.chart import Group, Point, chart
from eval.matrix import Cell, Matrix, Mean, Row
from eval.stats import INDEPENDENT
from vlm.page import page, text


def table_page(matrix: Matrix) -> str:
    """HTML of the whole page."""
    several = len(matrix.checkpoints) > 1
    title = f"Scores of {len(matrix.checkpoints)} checkpoints" if several else "Scores"
    notes = "".join(f'<li id="note{k}">{text(note)}</li>' for k, note in enumerate(matrix.notes, 1))
    body = (
        f"<h1>{title}</h1>\n"
        '<p class="quiet">0 to 100, with 95 % intervals (Wilson for right or wrong, else '
        f"bootstrap). {INDEPENDENT} Scores of different backends are not comparable.</p>\n"
        f'<div class="wide">{_table(matrix)}</div>\n'
        + "".join(f'<p class="quiet">{text(mean)}</p>\n' for mean in matrix.means)
        + (f'<ol class="notes">{notes}</ol>\n' if notes else "")
        + f'<h2>Intervals</h2>\n<div class="wide">{_chart(matrix)}</div>'
    )
    return page(title, body)


def _table(matrix: Matrix) -> str:
    names = "".join(f'<th scope="col">{text(name)}</th>' for name in matrix.checkpoints)
    rows = "".join(_row(row, matrix.checkpoints) for row in matrix.rows)
    means = "".join(_mean(mean, matrix.checkpoints) for mean in matrix.means if mean.scores)
    return (
        f'<table><thead><tr><th scope="col">Benchmark</th><th scope="col">Samples</th>{names}'
        f"</tr></thead><tbody>{rows}</tbody>" + (f"<tfoot>{means}</tfoot>" if means else "")
    ) + "</table>"


def _row(row: Row, checkpoints: tuple[str, ...]) -> str:
    metrics = dict.fromkeys(cell.result.metric for cell in row.cells.values())
    head = (
        f'<th scope="row">{text(row.key.benchmark)}{_marks(row.notes)}'
        f"<small>{text(' / '.join(metrics))}, {text(row.key.backend)}</small></th>"
    )
    cells = "".join(f"<td>{_cell(row.cells.get(name))}</td>" for name in checkpoints)
    return f"<tr>{head}<td>{text(row.n)}</td>{cells}</tr>"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return '<span class="quiet">not run</span>'
    if cell.score is None:
        return f'<span class="bad">no score</span>{_marks(cell.notes)}'
    interval = cell.interval
    spread = f"<small>{interval[0]:.1f} – {interval[1]:.1f}</small>" if interval else ""
    return f"{cell.score:.1f}{_marks(cell.notes)}{spread}"


def _marks(notes: tuple[int, ...]) -> str:
    links = ", ".join(f'<a href="#note{k}">{k}</a>' for k in notes)
    return f" <sup>{links}</sup>" if links else ""


def _mean(mean: Mean, checkpoints: tuple[str, ...]) -> str:
    scores = "".join(f"<td>{mean.scores[name]:.1f}</td>" for name in checkpoints)
    return (
        f'<tr><th scope="row">Macro mean<small>{len(mean.benchmarks)} benchmarks, '
        f"{text(mean.backend)}</small></th><td></td>{scores}</tr>"
    )


def _chart(matrix: Matrix) -> str:
    groups = []
    for row in matrix.rows:
        points = []
        for series, name in enumerate(matrix.checkpoints):
            if cell := row.cells.get(name):
                shown = "no score" if cell.score is None else f"{cell.score:.1f}"
                points.append(Point(name, cell.score, cell.interval, shown, series))
        groups.append(Group(str(row.key), points))
    return chart(groups, 0, 100, 20, "Scores with 95 % intervals, by benchmark and checkpoint")
