"""Scores of checkpoints side by side, each with its interval and what must be known about it.

    python eval/table.py results                          # Markdown
    python eval/table.py results/stage1 results/stage2 --out report

With --out also table.md, table.csv (a line a score) and table.html (with a chart). Checkpoints
keep the order in which they are named. Exit code 2 is a mistake in what was asked for.
"""

import csv
import io
import sys
from pathlib import Path

from eval.matrix import Cell, Matrix, read_matrix
from eval.output import Parser, markdown_rows, write_files
from eval.result import EvalError
from eval.stats import INDEPENDENT
from eval.table_html import table_page

SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
COLUMNS = (
    *("benchmark", "backend", "backend_version", "checkpoint", "model", "metric"),
    *("score", "low", "high", "n", "errored", "missing", "unparsed", "truncated", "complete"),
    *("data_hash", "notes"),
)


def to_markdown(matrix: Matrix) -> str:
    """The table, its macro means and footnotes."""
    rows = [["Benchmark", "Backend", "n", *matrix.checkpoints]]
    for row in matrix.rows:
        cells = [_cell(row.cells.get(name)) for name in matrix.checkpoints]
        rows.append([row.key.benchmark + _marks(row.notes), row.key.backend, row.n, *cells])
    for mean in matrix.means:
        if mean.scores:
            scores = [f"{mean.scores[name]:.1f}" for name in matrix.checkpoints]
            rows.append(["Macro mean", mean.backend, "", *scores])
    blocks = [markdown_rows(rows), f"Score of 100 [95 % interval]. {INDEPENDENT}"]
    blocks += [str(mean) for mean in matrix.means]
    blocks += [f"{_marks((k,))} {note}" for k, note in enumerate(matrix.notes, 1)]
    return "\n\n".join(blocks) + "\n"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "not run"
    shown = "no score" if cell.score is None else f"{cell.score:.1f}"
    if cell.interval:
        shown += f" [{cell.interval[0]:.1f}, {cell.interval[1]:.1f}]"
    return shown + _marks(cell.notes)


def _marks(notes: tuple[int, ...]) -> str:
    return " ".join(map(str, notes)).translate(SUPERSCRIPT)


def to_csv(matrix: Matrix) -> str:
    """A line per benchmark, backend and checkpoint; empty where there is no figure."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in matrix.rows:
        for cell in row.cells.values():
            low, high = cell.interval or (None, None)
            notes = [matrix.notes[k - 1] for k in (*row.notes, *cell.notes)]
            own = {"score": cell.score, "low": low, "high": high, "notes": " ".join(notes)}
            own["complete"] = cell.result.complete
            writer.writerow(vars(cell.result) | own)
    return text.getvalue()


def main(arguments: list[str] | None = None) -> int:
    try:
        parser = Parser("python eval/table.py", __doc__)
        add = parser.add_argument
        add("results", metavar="RESULTS", nargs="+", type=Path, help="folders with results below")
        add("--out", metavar="DIR", type=Path, help="write the files there")
        options = parser.parse_args(arguments)
        matrix = read_matrix(options.results)
        markdown = to_markdown(matrix)
        print(markdown, end="")
        if options.out:
            files = {"table.md": markdown, "table.csv": to_csv(matrix)}
            write_files(options.out, files | {"table.html": table_page(matrix)})
            print(f"\nWritten to {options.out}/table.md, table.csv and table.html.")
        return 0
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
