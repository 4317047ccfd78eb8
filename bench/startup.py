"""Start-up by size of the data set, once it is indexed: the time to the first planned step.

    python -m bench.startup                     # 1,000 to a million samples

From the opening of the data to the micro-batches of the first step, in one process, as
train/data.py does it: the index from its cache, its fingerprint and costs, the plan and its
report, and the first step's samples read, decoded and collated. The cache is made beforehand, with
the snapshot that a real start leaves (`vlm/data/index_snapshot.py`). So no row of text is read but
the step's; of the rows with an image 256 are, and their files looked at. What still grows are the
columns of numbers, loaded and sorted. Rows are unlike each other, images are a few files.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from bench.common import (
    GOLDEN_MODEL,
    ROUNDS,
    arguments,
    interleaved,
    print_table,
    result_path,
    seconds,
    summary,
    write_result,
)
from bench.plot import write_chart
from vlm.cost import PARTS
from vlm.data.formats import parse_row
from vlm.data.formats.context import RowContext
from vlm.data.index import build_index
from vlm.data.index_cache import IndexCache, Measures, media_stamp, processor_fingerprint
from vlm.data.index_snapshot import SETTLED_NS
from vlm.data.loader import StepDataset, make_plan
from vlm.data.pack import Budget
from vlm.data.plan import Position
from vlm.data.plan_report import report
from vlm.data.processor import Processor, Sizes
from vlm.data.sources import open_sources

SIZES = (1_000, 10_000, 100_000, 300_000, 1_000_000)
KINDS = ("text", "image")
IMAGES = 16
GLOBAL_BATCH = 128


def write_rows(folder: Path, kind: str, count: int) -> Path:
    """JSONL of so many samples."""
    path = folder / f"{kind}-{count}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps(row(kind, number)) + "\n")
    return path


def row(kind: str, number: int) -> dict:
    with_image = kind == "image"
    question = "<image>" * with_image + f"what is number {number}?"
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "it is one of many, as you can see " * 4},
    ]
    return {"messages": turns, "images": [f"{number % IMAGES}.png"] * with_image}


def fill_cache(path: Path, kind: str, processor: Processor, cache: Path) -> None:
    """What an earlier run would have left: the sizes of each row and the stamp of its image, and
    the snapshot, which a start makes of them.

    A digit is a token, so that rows with as many digits and the same image are alike.
    """

    @lru_cache
    def measured(number: int) -> tuple[Sizes, int]:
        sample = parse_row(row(kind, number), str(path), RowContext(path.parent))
        return processor.measure(sample), media_stamp(sample)

    (source,) = open_sources([str(path)])
    known = IndexCache(cache, processor_fingerprint(processor), source)
    number = 0
    for chunk in source.chunks():
        sizes, stamps = {}, {}
        for place in range(len(chunk.rows)):
            least = 10 ** (len(str(number)) - 1) if number > 9 else 0
            sizes[place], stamps[place] = measured(least + (number - least) % IMAGES)
            number += 1
        known.put(chunk.digest, Measures.of(sizes, stamps))
    known.save()
    build_index(open_sources([str(path)]), processor, cache_dir=cache)


def start(path: Path, processor: Processor, cache: Path) -> dict[str, float]:
    """Seconds of each part, up to the first step's micro-batches."""
    found = {}

    def index() -> None:
        found["index"], bad = build_index(open_sources([str(path)]), processor, cache_dir=cache)
        assert not bad
        found["index"].fingerprint()

    def plan() -> None:
        costs = found["index"].costs(processor.config, PARTS)
        found["plan"] = make_plan(found["index"], costs, GLOBAL_BATCH, 42, 8, Budget())
        report(found["plan"], most_steps=20)

    def first_step() -> None:
        dataset = StepDataset(found["index"], processor, found["plan"], rank=0)
        assert not dataset[Position(0, 0)].bad

    works = {"index, s": index, "plan, s": plan, "first step, s": first_step}
    return {name: seconds(work) for name, work in works.items()}


def measure(folder: Path, sizes: Sequence[int], rounds: int) -> list[dict]:
    """A row for each kind and size."""
    processor, cache = Processor.from_pretrained(GOLDEN_MODEL), folder / "cache"
    for number in range(IMAGES):
        Image.effect_noise((112, 112), 40 + number).save(folder / f"{number}.png")
    keys = [(kind, size) for kind in KINDS for size in sizes]
    paths = {key: write_rows(folder, *key) for key in keys}
    time.sleep(SETTLED_NS / 1e9 + 0.1)
    for (kind, _), path in paths.items():
        fill_cache(path, kind, processor, cache)
    parts: dict[tuple[str, int], list[dict]] = {key: [] for key in paths}

    def of(key: tuple[str, int]) -> float:
        parts[key].append(start(paths[key], processor, cache))
        return sum(parts[key][-1].values())

    taken = interleaved(rounds, {key: lambda key=key: of(key) for key in paths})
    rows = []
    for (kind, size), totals in taken.items():
        found = {"kind": kind, "samples": size, "seconds": summary(totals)}
        for name in parts[kind, size][0]:
            found[name] = summary(one[name] for one in parts[kind, size])["median"]
        rows.append(found)
    return rows


def main(given: Sequence[str] | None = None) -> int:
    options = arguments("startup", __doc__).parse_args(given)
    torch.set_num_threads(1)
    sizes, rounds = ((100, 300), 1) if options.quick else (SIZES, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), sizes, rounds)
    print_table(rows)
    added = {}
    for kind in KINDS:
        fewest, *_, most = (r["seconds"]["median"] for r in rows if r["kind"] == kind)
        added[kind] = round((most - fewest) / (sizes[-1] - sizes[0]) * 1e6, 2)
        print(f"{kind}: {added[kind]} s more for each million samples")
    lines = {
        kind: [(r["samples"] / 1e6, r["seconds"]["median"]) for r in rows if r["kind"] == kind]
        for kind in KINDS
    }
    if path := result_path("startup", options):
        labels = ("Start-up from a cached index", "million samples", "seconds to the first step")
        write_chart(path.with_suffix(".svg"), *labels, lines)
    write_result(
        "startup",
        options,
        what="seconds from the opening of indexed data to the first step's micro-batches, one "
        "process, by number of samples",
        target={"start-up": "independent of the data set's size once it is indexed"},
        figures={"sizes": rows, "seconds_per_million": added},
        spread=f"least and most of {rounds} interleaved rounds",
        refuted_by="python -m bench.startup on an idle machine: another slope",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
