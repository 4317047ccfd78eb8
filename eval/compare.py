"""Two checkpoints on the same samples: the difference, how sure it is, and what changed.

    python eval/compare.py results/stage1 results/stage2 --out report   # all shared benchmarks
    python eval/compare.py results/stage1/mmmu results/stage2/mmmu      # one

A difference is B - A. With --out also compare.md, compare.html, and a page for each benchmark
with the samples that changed. Exit code 2: nothing could be compared; 1: some could not.
"""

import json
import re
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from eval.compare_html import overview_page, samples_page, show_p
from eval.matrix import Key
from eval.output import Parser, markdown_rows, write_files
from eval.pairs import Comparison, compare, shared
from eval.result import EvalError
from eval.stats import INDEPENDENT


def to_markdown(comparisons: Sequence[Comparison], said: Sequence[str]) -> str:
    """A row a benchmark, and below it what must be known beside."""
    heading = "Benchmark|Backend|A|B|B - A|95 % interval|fell|rose|McNemar p|n|only in A|only in B"
    rows = [heading.split("|")]
    for c in comparisons:
        paired = c.statistics
        means = (f"{100 * mean:.1f}" for mean in (paired.mean_a, paired.mean_b))
        low, high = (100 * end for end in paired.interval)
        counts = (paired.only_a, paired.only_b, show_p(paired.p), paired.n)
        rows.append(
            [
                *(c.key.benchmark, c.key.backend, *means),
                *(f"{100 * paired.difference:+.1f}", f"[{low:+.1f}, {high:+.1f}]"),
                *map(str, (*counts, c.only_in_a, c.only_in_b)),
            ]
        )
    a, b = comparisons[0].names
    blocks = [f"A: {a}, B: {b}", markdown_rows(rows)]
    blocks.append(
        "Points of 100 over the samples that both have a score of; paired bootstrap interval, "
        "exact McNemar test where all scores are 0 or 1. Fell and rose: right to wrong and wrong "
        "to right, or a lower and a higher score. " + INDEPENDENT
    )
    return "\n\n".join(blocks + [f"Warning: {one}." for one in said]) + "\n"


def page_name(key: Key) -> str:
    """File of a benchmark's samples: the same in every report, and no other benchmark's.

    What is not plain gets a digest: different names may be alike once cleaned, or where case does
    not count.
    """
    name = "-".join(key)
    if re.fullmatch(r"[a-z0-9_-]{1,100}-[a-z]+", name):
        return f"{name}.html"
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:100]
    return f"{clean}-{sha256(json.dumps(key).encode()).hexdigest()[:8]}.html"


def run(a: Path, b: Path, out: Path | None) -> int:
    """Compare, print, write; the exit code."""
    folders, lacking = shared(a, b)
    comparisons, refused = [], []
    for pair in folders:
        try:
            comparisons.append(compare(*pair))
        except EvalError as error:
            refused.append(str(error))
    if not comparisons:
        raise EvalError("; ".join(refused))
    said = [*refused, *(f"{c.key}: {one}" for c in comparisons for one in c.warnings)]
    if lacking:
        said.append(f"only one of them has {', '.join(lacking)}")
    markdown = to_markdown(comparisons, said)
    print(markdown, end="")
    if out:
        names = {c.key: page_name(c.key) for c in comparisons}
        overview = overview_page(comparisons, said, names)
        pages = {names[c.key]: samples_page(c) for c in comparisons}
        write_files(out, {"compare.md": markdown, "compare.html": overview} | pages)
        print(f"\nWritten to {out}/compare.md, compare.html, {', '.join(pages)}.")
    for one in refused:
        print(f"error: {one}", file=sys.stderr)
    return 1 if refused else 0


def main(arguments: list[str] | None = None) -> int:
    try:
        parser = Parser("python eval/compare.py", __doc__)
        for name in ("a", "b"):
            about = "a result's folder, or a checkpoint's with several below"
            parser.add_argument(name, metavar=name.upper(), type=Path, help=about)
        parser.add_argument("--out", metavar="DIR", type=Path, help="write the pages there")
        options = parser.parse_args(arguments)
        return run(options.a, options.b, options.out)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
