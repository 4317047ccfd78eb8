"""What an index says of its data: totals, lengths, and what will be dropped and why."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlm.data.ledger import Entry

if TYPE_CHECKING:
    from vlm.data.index import Index

BINS = 12
BAR = 40
"""Characters of the histogram's longest bar."""
MOST_REASONS = 20
NAME = re.compile(r"\S*(/\S*|\.\w{2,5}\b)|'[^']*'|\"[^\"]*\"")
NUMBER = re.compile(r"\d+(\.\d+)?")


def index_report(index: "Index", bad: Sequence[Entry]) -> str:
    """Tables for the one who starts a run; several lines."""
    parts = [_totals(index, bad), _histogram(index.length), _dropped(bad)]
    text = "\n\n".join(part for part in parts if part)
    return text.encode(errors="backslashreplace").decode()  # names of files may be no UTF-8


def _totals(index: "Index", bad: Sequence[Entry]) -> str:
    """A row per source, and one for all."""
    names = [source.name for source in index.sources]
    rows = [_figures(index, index.source == number) for number in range(len(names))]
    dropped = [sum(_is_of(entry, source) for entry in bad) for source in index.sources]
    if len(names) > 1:
        names.append("all")
        rows.append(_figures(index, np.ones(len(index), bool)))
        dropped.append(len(bad))
    heads = ("samples", "dropped", "tokens", "learnt", "images+videos", "patches", "longest")
    width = max(len("source"), *map(len, names))
    lines = [f"{'source':{width}}" + "".join(f"{head:>15}" for head in heads)]
    for name, (samples, *figures), lost in zip(names, rows, dropped, strict=True):
        cells = "".join(f"{figure:>15,}" for figure in (samples, lost, *figures))
        lines.append(f"{name:{width}}{cells}")
    return "\n".join(lines)


def _figures(index: "Index", chosen: np.ndarray) -> tuple[int, ...]:
    columns = (index.length, index.targets, index.media, index.patches)
    sums = (int(column[chosen].sum(dtype=np.int64)) for column in columns)
    return int(chosen.sum()), *sums, int(index.length[chosen].max(initial=0))


def _is_of(entry: Entry, source) -> bool:
    return entry.id.rpartition(":")[0] in map(str, source.files)


def _histogram(lengths: np.ndarray) -> str:
    """Of tokens per sample, in bins of equal width."""
    edges = np.linspace(0, lengths.max() + 1, BINS + 1).round().astype(np.int64)
    edges = np.unique(edges)
    counts, _ = np.histogram(lengths, edges)
    lines = ["tokens of a sample"]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * -(-BAR * int(count) // int(counts.max()))
        lines.append(f"{low:>8,} - {high - 1:>7,}{count:>12,} {bar}".rstrip())
    middle = [f"{share} % have at most {np.percentile(lengths, share):,.0f}" for share in (50, 99)]
    return "\n".join([*lines, "; ".join(middle)])


def _dropped(bad: Sequence[Entry]) -> str:
    """Reasons that differ in names and numbers alone are one."""
    groups: dict[str, list[Entry]] = {}
    for entry in bad:
        kind = NUMBER.sub("N", NAME.sub("...", entry.reason))
        groups.setdefault(kind, []).append(entry)
    if not groups:
        return ""
    ordered = sorted(groups.values(), key=len, reverse=True)
    lines = [f"{len(bad):,} samples will be dropped:"]
    for entries in ordered[:MOST_REASONS]:
        lines.append(f"{len(entries):>8,} x {entries[0].id}: {entries[0].reason}")
    if rest := sum(map(len, ordered[MOST_REASONS:])):
        lines.append(f"{rest:>8,} x other reasons")
    return "\n".join(lines)
