"""Benchmarks x checkpoints: scores, their intervals, and footnotes on all that a reader must know.

A row is a benchmark with a backend: scores of two backends are never put side by side.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from eval.protocol import (
    differences,
    not_the_mean,
    not_whole,
    partly_scored,
    scores_of,
    shortfall,
    trial,
)
from eval.result import EvalError, Result, SampleResult, find_results, read_result
from eval.stats import Interval, score_interval

SHARE = 0.01
"""Unreadable or cut-off answers from which on a footnote tells."""


class Key(NamedTuple):
    """What a row is of."""

    benchmark: str
    backend: str

    def __str__(self) -> str:
        return f"{self.benchmark} ({self.backend})"


@dataclass(frozen=True)
class Cell:
    """One result; score and interval 0..100, None where they cannot be given."""

    result: Result
    score: float | None
    interval: Interval | None
    notes: tuple[int, ...]
    """Footnotes, counted from 1."""


@dataclass(frozen=True)
class Row:
    key: Key
    cells: dict[str, Cell]
    """By checkpoint; those that have a result."""
    notes: tuple[int, ...]

    @property
    def n(self) -> str:
        """Samples, of each checkpoint where they differ."""
        return " / ".join(dict.fromkeys(str(cell.result.n) for cell in self.cells.values()))


@dataclass(frozen=True)
class Mean:
    """Macro mean of a backend's rows."""

    backend: str
    benchmarks: tuple[str, ...]
    """Two or more, or no mean is taken and `scores` is empty."""
    left_out: tuple[str, ...]
    """Benchmark and reason."""
    scores: dict[str, float]
    """By checkpoint, 0..100."""

    def __str__(self) -> str:
        over = f"over {', '.join(self.benchmarks)}" if self.scores else "not taken"
        out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"Macro mean ({self.backend}): {over}{out}."


@dataclass(frozen=True)
class Matrix:
    checkpoints: tuple[str, ...]
    rows: tuple[Row, ...]
    means: tuple[Mean, ...]
    """One a backend that has several rows."""
    notes: tuple[str, ...]
    """Footnote k is notes[k - 1]."""


class _Notes:
    """Footnotes in order of appearance, each text once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, texts: Iterable[str]) -> tuple[int, ...]:
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
        return tuple(self.texts.index(text) + 1 for text in dict.fromkeys(texts))


def read_matrix(folders: Iterable[Path]) -> Matrix:
    """All results at or below the folders.

    EvalError: a folder without a result, a damaged one, or two of one benchmark, backend and
    checkpoint.
    """
    places: dict[tuple[Key, str], Path] = {}
    found: dict[Key, dict[str, tuple[Result, Interval | None, list[str]]]] = {}
    for folder in result_folders(folders):
        result, samples = read_result(folder)
        key = Key(result.benchmark, result.backend)
        first = places.setdefault((key, result.checkpoint), folder)
        if first != folder:
            raise EvalError(
                f"{first} and {folder} both hold {key} of checkpoint {result.checkpoint}; "
                "name only one of them"
            )
        found.setdefault(key, {})[result.checkpoint] = (result, *_judge(key, result, samples))
    checkpoints = tuple(dict.fromkeys(checkpoint for _, checkpoint in places))
    notes = _Notes()
    rows, differing = [], {}
    for key in sorted(found):
        results = {name: found[key][name][0] for name in checkpoints if name in found[key]}
        differing[key] = differences(results)
        others = [other.backend for other in sorted(found) if other.benchmark == key.benchmark]
        about_row = [f"{key}: {text}." for text in differing[key].values()]
        if len(others) > 1:
            about_row.append(
                f"{key.benchmark} was scored by {' and '.join(others)}; scores of two backends "
                "are not comparable."
            )
        row_notes, cells = notes.add(about_row), {}
        for name in results:
            result, interval, about = found[key][name]
            score = None if shortfall(result) else result.score
            cells[name] = Cell(result, score, interval, notes.add(about))
        rows.append(Row(key, cells, row_notes))
    means = _means(rows, checkpoints, differing)
    return Matrix(checkpoints, tuple(rows), means, tuple(notes.texts))


def result_folders(folders: Iterable[Path]) -> list[Path]:
    """Every result at or below the folders, each once; EvalError names a folder without one."""
    found: dict[Path, Path] = {}
    for folder in folders:
        below = find_results([folder])
        if not below:
            why = "holds no result.json" if folder.is_dir() else "is not a folder"
            raise EvalError(f"{folder} {why}; name what eval/run.py wrote, or a folder above it")
        for path in below:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _judge(
    key: Key, result: Result, samples: list[SampleResult]
) -> tuple[Interval | None, list[str]]:
    """The score's interval, and what must be said about the result."""
    where, interval = f"{key}, {result.checkpoint}", None
    known = (trial(result), not_whole(result), partly_scored(result, samples))
    about = [f"{key}: {note.rstrip('.')}." for note in (*result.notes, *filter(None, known))]
    if reason := shortfall(result):
        about.append(f"{where}: no score, {reason}; run it again with --resume.")
    elif reason := not_the_mean(result, samples):
        about.append(f"{where}: no interval, {reason}.")
    else:
        low, high = score_interval(scores_of(samples))
        interval = (100 * low, 100 * high)
    if result.unparsed >= SHARE:
        about.append(f"{where}: {100 * result.unparsed:.1f} % of the answers could not be read.")
    if result.truncated >= SHARE:
        about.append(f"{where}: {100 * result.truncated:.1f} % of the answers ended at max_tokens.")
    return interval, about


def _means(
    rows: list[Row], checkpoints: tuple[str, ...], differing: dict[Key, dict[str, str]]
) -> tuple[Mean, ...]:
    """Over benchmarks that are whole, complete and asked alike for all checkpoints."""
    means = []
    for backend in dict.fromkeys(row.key.backend for row in rows):
        ours = [row for row in rows if row.key.backend == backend]
        if len(ours) < 2:
            continue
        used, left_out = [], []
        for row in ours:
            if reason := _unfit(row, checkpoints, differing[row.key]):
                left_out.append(f"{row.key.benchmark} ({reason})")
            else:
                used.append(row)
        scores = {}
        if len(used) > 1:
            for name in checkpoints:
                scores[name] = sum(row.cells[name].score for row in used) / len(used)
        over = tuple(row.key.benchmark for row in used)
        means.append(Mean(backend, over, tuple(left_out), scores))
    return tuple(means)


def _unfit(row: Row, checkpoints: tuple[str, ...], differing: dict[str, str]) -> str | None:
    """Why the row has no place in a mean, or None."""
    results = [cell.result for cell in row.cells.values()]
    scored = [name for name, cell in row.cells.items() if cell.score is not None]
    if lacking := [name for name in checkpoints if name not in scored]:
        return f"no score of {', '.join(lacking)}"
    if any(map(trial, results)):
        return "a trial"
    if any(map(not_whole, results)):
        return "not the whole benchmark"
    return f"{', '.join(differing)} not the same" if differing else None
