"""Validate a dataset completely, as training would meet it.

    python -m vlm.data.check data/train.jsonl --model models/graft-8b [--prove_packing 32]

Every row is parsed, tokenised and measured, and its images and videos are decoded. A table shows
what each source holds, and why its bad samples are bad. `--prove_packing N` then takes N samples
through the model, packed and one by one, and compares losses and gradients of each tower.

Exit code 1: more bad samples than `--max_bad_fraction` allows, or packing does not hold; 2: what
was asked for is not possible.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import copy
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from vlm.data.ledger import Entry
from vlm.data.options import data_parser, exit_code, open_data
from vlm.data.out_file import check_out, written
from vlm.data.processor import IGNORED, Processor
from vlm.data.prove import prove
from vlm.data.schema import BadSample, Sample, printable
from vlm.data.sources import Chunk, DataError, Source
from vlm.hub import resolve_model

CHANGING = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\S+\.\w{2,4}\b|\d[\d.,]*")
"""What differs between reasons of one kind: quoted text, names of files, numbers."""
COUNTS = ("rows", "good", "bad", "too_long", "tokens", "learnt", "images", "videos")


@dataclass
class Tally:
    """What was found in some rows of one source."""

    counts: Counter = field(default_factory=Counter)
    """Of COUNTS; tokens, learnt tokens, images and videos are those of good samples, after
    truncation. Too long are good ones that are cut, and bad ones."""
    longest: int = 0
    """Tokens, before truncation."""
    bad: list[Entry] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.counts += other.counts
        self.longest = max(self.longest, other.longest)
        self.bad += other.bad


def check(sources: tuple[Source, ...], processor: Processor, workers: int = 1) -> list[Tally]:
    """Go through all rows.

    Args:
        workers: processes that share the work; 1 is this one alone.

    Returns:
        One tally a source.

    Raises:
        DataError: there is no row at all, or a process died.
    """
    tallies = [Tally() for _ in sources]
    with tqdm(desc="check", unit=" samples", disable=None) as bar:
        for number, tally in _checked(sources, processor, workers):
            tallies[number].add(tally)
            bar.update(tally.counts["rows"])
    if not any(tally.counts["rows"] for tally in tallies):
        raise DataError(f"{', '.join(s.name for s in sources)}: there is no sample in it")
    return tallies


def _checked(sources, processor: Processor, workers: int) -> Iterator[tuple[int, Tally]]:
    """(number of the source, tally) of each chunk, in order."""
    chunks = ((number, chunk) for number, s in enumerate(sources) for chunk in s.chunks())
    if workers <= 1:
        for number, chunk in chunks:
            yield number, check_chunk(sources[number], chunk, processor)
        return
    initial = (sources, processor)
    context = get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_remember, initargs=initial) as pool:
        pending = deque()  # a few chunks ahead: Executor.map would read the whole file first
        try:
            for number, chunk in chunks:
                pending.append((number, chunk.places[0], pool.submit(_check, number, chunk)))
                if len(pending) > 2 * workers:
                    yield pending[0][0], pending[0][2].result()
                    pending.popleft()
            while pending:
                yield pending[0][0], pending[0][2].result()
                pending.popleft()
        except BrokenProcessPool:
            number, place, _ = pending[0]
            name = sources[number].files[place.file]
            raise DataError(
                f"a process died at {name}:{place.line} or behind it; is memory short, or a file "
                "broken? Fewer --workers take less memory, and 1 shows where it dies"
            ) from None


_worker: tuple = ()


def _remember(*state) -> None:
    global _worker
    _worker = state
    torch.set_num_threads(1)  # the processes share the machine


def _check(number: int, chunk: Chunk) -> Tally:
    sources, processor = _worker
    return check_chunk(sources[number], chunk, processor)


def check_chunk(source: Source, chunk: Chunk, processor: Processor) -> Tally:
    tally = Tally()
    for row, place in zip(chunk.rows, chunk.places, strict=True):
        tally.counts["rows"] += 1
        try:
            _check_sample(source.parse(row, place), processor, tally)
            tally.counts["good"] += 1
        except BadSample as error:
            tally.counts["bad"] += 1
            tally.bad.append(Entry(error.sample_id, error.reason, "decoding"))
    return tally


def _check_sample(sample: Sample, processor: Processor, tally: Tally) -> None:
    """BadSample where the index or the loader of a run would leave the sample out."""
    unlimited = copy(processor)
    unlimited.max_length = None
    sizes = unlimited.measure(sample)
    tally.longest = max(tally.longest, sizes.length)
    tally.counts["too_long"] += sizes.length > processor.max_length
    example = processor.encode(sample)
    tally.counts["tokens"] += example.length
    tally.counts["learnt"] += int((example.targets != IGNORED).sum())
    tally.counts["images"] += len(sample.images)
    tally.counts["videos"] += len(sample.videos)


@dataclass(frozen=True)
class Kind:
    """Bad samples whose reasons differ only in names and numbers."""

    reason: str
    count: int
    first: Entry


def kinds_of(bad: Iterable[Entry]) -> list[Kind]:
    """The most frequent first."""
    groups: dict[str, list[Entry]] = {}
    for entry in bad:
        groups.setdefault(general(entry.reason), []).append(entry)
    kinds = [Kind(reason, len(entries), entries[0]) for reason, entries in groups.items()]
    return sorted(kinds, key=lambda kind: -kind.count)


def general(reason: str) -> str:
    """A reason without what is the one sample's own."""
    return re.sub(r"…(\W*…)+", "…", CHANGING.sub("…", reason))


def table(sources: tuple[Source, ...], tallies: list[Tally], max_length: int) -> str:
    """What is to be read at the end."""
    total = Tally()
    for tally in tallies:
        total.add(tally)
    rows = [(source.name, tally) for source, tally in zip(sources, tallies, strict=True)]
    rows += [("all", total)] if len(rows) > 1 else []
    width = max(len("source"), *(len(name) for name, _ in rows))
    heads = [*(name.replace("_", " ") for name in COUNTS), "longest"]
    lines = [f"{'source':{width}}" + "".join(f"{head:>13}" for head in heads)]
    for name, tally in rows:
        numbers = [*(tally.counts[name] for name in COUNTS), tally.longest]
        lines.append(f"{name:{width}}" + "".join(f"{number:>13,}" for number in numbers))
    lines.append(f"(too long: above max_length {max_length}; longest: tokens before truncation)")
    for kind in kinds_of(total.bad):
        lines += ["", f"{kind.count:,} bad: {kind.reason}"]
        lines += [f"    {kind.first.id}: {kind.first.reason}"]
    return "\n".join(lines)


def as_json(sources: tuple[Source, ...], tallies: list[Tally]) -> dict:
    """The same, with every bad sample."""
    bad = [entry for tally in tallies for entry in tally.bad]
    return {
        "sources": [
            {
                "name": source.name,
                **{name: tally.counts[name] for name in COUNTS},
                "longest": tally.longest,
            }
            for source, tally in zip(sources, tallies, strict=True)
        ],
        "reasons": [
            {"reason": k.reason, "count": k.count, "first": k.first.id} for k in kinds_of(bad)
        ],
        "bad": [{"id": entry.id, "reason": entry.reason} for entry in bad],
    }


def parse_arguments(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    parser = data_parser("check", __doc__)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max_bad_fraction", type=float, default=0.01)
    parser.add_argument("--json", type=Path, help="write what was found into this file")
    parser.add_argument(
        "--prove_packing", type=int, metavar="N", help="compare N samples packed and one by one"
    )
    options = parser.parse_args(arguments)
    if options.prove_packing is not None and options.prove_packing < 2:
        parser.error(f"--prove_packing is {options.prove_packing}; packing takes two samples")
    return options


def check_and_tell(arguments: Iterable[str] | None) -> int:
    options = parse_arguments(arguments)
    if options.json:
        check_out("json", options.json)
    sources, processor = open_data(options)
    tallies = check(sources, processor, options.workers)
    show(table(sources, tallies, options.max_length))
    found = as_json(sources, tallies)
    complaint = too_many(tallies, options.max_bad_fraction)
    if options.prove_packing is not None:
        model = resolve_model(options.model, options.hub)
        proof = prove(sources, processor, model, options.prove_packing)
        show("\n" + proof.table())
        found["packing"] = proof.as_json()
        complaint = complaint or (None if proof.holds else "packing does not hold")
    if options.json:
        with written(options.json) as file:
            json.dump(found, file, indent=1)
    if complaint:
        print(f"error: {complaint}", file=sys.stderr)
    return 1 if complaint else 0


def main(arguments: Iterable[str] | None = None) -> int:
    return exit_code(lambda: check_and_tell(arguments), "interrupted")


def too_many(tallies: list[Tally], max_bad_fraction: float) -> str | None:
    """A sentence where the share of bad samples is too large."""
    rows, bad = (sum(tally.counts[name] for tally in tallies) for name in ("rows", "bad"))
    if bad <= max_bad_fraction * rows:
        return None
    return (
        f"{bad} of {rows} samples are bad, more than max_bad_fraction {max_bad_fraction:g} allows"
    )


def show(text: str) -> None:
    """Print it, even a file's name that is no text."""
    print(printable(text), flush=True)


if __name__ == "__main__":
    sys.exit(main())
