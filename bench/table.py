"""Makes bench/README.md from the results: what was aimed at, what was found, what would refute it.

python -m bench.table
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.__main__ import NEEDS_GPU
from bench.calibrate import OFF as TIME_OFF
from bench.common import RESULTS, ROOT
from bench.flops import TARGETS as FEWER
from bench.linear import OFF
from bench.loss_memory import COMPARED, TARGET_GB

README = ROOT / "bench" / "README.md"
COMMANDS = {"peers": "make peers", "miniature_plans": "make demo; python -m bench.miniature"}
"""Of results that are not written by `python -m bench.<name>`."""
HEAD = """# Figures

Made by `python -m bench.table` from the files of `results/`, which `make bench` writes. `make
peers` compares with ms-swift and with transformers in an environment of its own. Times are ratios
inside one run: what is compared takes turns, and a figure is the median of at least five rounds.
`--quick` shows that a script runs.

| what | target | found | | by | date |
| --- | --- | --- | --- | --- | --- |
"""
NO_TARGET = "none set"


@dataclass(frozen=True)
class Found:
    text: str
    met: bool | None
    """None where no bound is set."""
    why: str = ""
    """The reason, where it is not met and the result tells one."""


@dataclass(frozen=True)
class Target:
    """A row of the table."""

    what: str
    bound: str
    result: str
    """Name of the result that it is read from."""
    read: Callable[[Any], Found]
    """From the result's figures."""
    why: str = ""
    """The reason in case it is missed."""


def _at_least(value: float, least: float, form: str = "{:.2f}x") -> Found:
    return Found(form.format(value), value >= least)


def _at_most(value: float, most: float, form: str) -> Found:
    return Found(form.format(value), value <= most)


def _rows(figures: Any, **wanted: object) -> Iterator[dict]:
    """Rows of any list in the figures that have these values."""
    lists = [figures] if isinstance(figures, list) else figures.values()
    for rows in lists:
        if isinstance(rows, list):
            yield from (
                r for r in rows if all(r.get(key) == value for key, value in wanted.items())
            )


def _of_peak(pack: str, least: float) -> Callable[[Any], Found]:
    def read(figures: Any) -> Found:
        shares = [r["% of peak"] for r in _rows(figures, pack=pack) if r["way"] != "naive"]
        return _at_least(max(shares), least, "{:.1f} %")

    return read


def _stage_1_on_gpu(figures: Any) -> Found:
    """The better of two ways that compute all that the naive one does."""
    rows = [row for row in _rows(figures) if row.get("way") in ("ours", "compiled")]
    best = max(rows, key=lambda row: row["times naive"]["median"])
    times, share = best["times naive"]["median"], best["% of peak"]
    return Found(f"{times:.2f}x, {share:.1f} % ({best['way']})", times >= 2.5 and share >= 52)


def _cached_on_gpu(figures: Any) -> Found:
    (row,) = _rows(figures, way="cached")
    times, share = row["times naive"]["median"], row["% of peak"]
    return Found(f"{times:.2f}x, {share:.1f} % (the ViT's FLOPs not counted)", None)


def _peer(system: str, stage: int, least: float) -> Callable[[Any], Found]:
    def read(figures: Any) -> Found:
        place = {"system": system, "stage": stage}
        (row,) = (r for r in figures["speeds"] if r.items() >= ({"size": "tiny"} | place).items())
        times = row["times"]
        text = f"{times['median']:.2f}x ({times['least']:.2f} to {times['most']:.2f})"
        missed = (r for r in figures.get("miss", ()) if r.items() >= place.items())
        return Found(text, times["median"] >= least, next((r["why"] for r in missed), ""))

    return read


def _fill(figures: Any) -> Found:
    packed, naive = (list(_rows(figures, plan=plan)) for plan in ("packed", "naive"))

    def extent(rows: list[dict], column: str) -> str:
        values = [row[column] for row in rows]
        return f"{min(values):.0%} to {max(values):.0%}"

    fill = min(row["fill"] for row in packed)
    text = f"{fill:.3%}, of padded pairs {extent(naive, 'fill')}; of the budgets' tokens "
    text += f"{extent(packed, 'token_use')}, patches {extent(packed, 'patch_use')}"
    return Found(text, fill >= 0.995)


def _full_packing(figures: Any) -> Found:
    rows = [(row["full_packing"], row) for row in _rows(figures, plan="packed")]
    text = ", ".join(f"{share:.1%} ({row['data']}, {row['ranks']} ranks)" for share, row in rows)
    return Found(text, None)


def _packed(column: str, bound: float, ranks: int | None = None) -> Callable[[Any], Found]:
    """The worst of both files: the least, but for the waiting the most."""

    def read(figures: Any) -> Found:
        rows = list(_rows(figures, plan="packed", **({"ranks": ranks} if ranks else {})))
        values = [row[column] for row in rows]
        if column == "waiting":
            worst = max(rows, key=lambda row: row["waiting"])
            where = f"{worst['data']}, {worst['ranks']} ranks"
            return Found(f"{max(values):.2%} ({where})", max(values) <= bound)
        return Found(f"{min(values):.3%}", min(values) >= bound)

    return read


def _planning(figures: Any) -> Found:
    taken = max(row["seconds_per_million"] for row in _rows(figures, plan="packed"))
    memory = figures["peak_gib"] * 2**30 / 1e9
    return Found(f"{taken:.1f} s, {memory:.2f} GB", taken < 30 and memory < 2)


def _loss_peak(figures: Any) -> Found:
    """The more of both dtypes, which grows by 5 % at most."""
    texts, met = [], True
    for dtype in ("bfloat16", "float32"):
        rows = _rows({"memory": figures["memory"]}, dtype=dtype)
        peaks = {row["targets"]: row["ours, peak GB"] for row in rows}
        most = max(peaks)
        texts.append(f"{peaks[COMPARED]:.2f} GB in {dtype}, {peaks[most]:.2f} at {most:,}")
        met &= peaks[COMPARED] < TARGET_GB and peaks[most] <= 1.05 * peaks[COMPARED]
    return Found("; ".join(texts), met)


def _loss_speed(figures: Any) -> Found:
    times = figures["speed"]["times as fast"]
    text = f"{times['median']:.2f}x ({times['least']:.2f} to {times['most']:.2f})"
    return Found(text, times["median"] >= 1)


def _syncs(rows: Any) -> Found:
    micro = max(row["syncs a micro-step"] for row in rows)
    step = max(row["syncs a step"] for row in rows)
    return Found(f"{micro:g} and {step:g}", micro == 0 and step <= 1)


def _fewer(stage: int) -> Callable[[Any], Found]:
    def read(figures: Any) -> Found:
        rows = list(_rows({"all": figures["all samples"]}, stage=stage))
        text = ", ".join(f"{row['times fewer']:.2f}x ({row['data']})" for row in rows)
        met = min(row["times fewer"] for row in rows) >= FEWER[stage]
        if stage == 1:
            spared = {row["data"]: row["if naive spared the ViT"] for row in rows}
            text += "; " + " and ".join(f"{times:.2f}x" for times in spared.values())
            text += " if the loop spared the frozen ViT its backward pass"
            close = " and ".join(data for data, times in spared.items() if times < FEWER[stage])
            if met and close:
                text += f": met for {close} only because it sends gradients through it"
        return Found(text, met)

    return read


def _counted(figures: Any) -> Found:
    off = max(
        abs(row[f"{side}, counted / formula"] - 1)
        for row in figures["counted"]
        for side in ("ours", "naive")
    )
    return Found("equal" if not off else f"{off:.2%} off", not off)


def _memory(rows: Any) -> Found:
    off = max(abs(row["predicted peak MB"] / row["peak MB"] - 1) for row in rows)
    return Found(f"{off:.1%} off at most", off <= 0.05)


def _time(rows: Any) -> Found:
    each = ", ".join(f"{row['off']['median']:.1%} (stage {row['stage']})" for row in rows)
    most = max(row["off"]["most"] for row in rows)
    met = all(row["off"]["median"] <= TIME_OFF for row in rows)
    return Found(f"{each} off, in the worst round {most:.1%}", met)


def _straight(rows: Any) -> Found:
    worst = {k: max(r["off"] for r in rows if r["kind"] == k) for k in ("measured", "counted")}
    text = f"{worst['measured']:.1%} off a line (time), {worst['counted']:.1%} (FLOPs); "
    return Found(text + "[plot](results/linear.svg)", max(worst.values()) <= OFF)


def _startup(figures: Any) -> Found:
    added = ", ".join(f"{s:.1f} s ({kind})" for kind, s in figures["seconds_per_million"].items())
    most = max(row["seconds"]["median"] for row in figures["sizes"])
    least = min(row["seconds"]["median"] for row in figures["sizes"])
    return Found(f"{added} more a million; [plot](results/startup.svg)", most < 1.1 * least)


def _graft_speed(figures: Any) -> Found:
    found = figures["build_to_cp"]
    return _at_least(found["median"], 1.0, "{:.2f} of `cp`'s")


SAMPLES_STAY = (
    "no row is read any more, but each sample's 48 bytes are loaded and checked, its FLOPs counted "
    "and its place in the epoch drawn"
)
TARGETS = (
    Target("stage 2, text, 8B, one GPU", ">= 60 % of the peak", "gpu_stage2", _of_peak("text", 60)),
    Target("stage 2, text and images", ">= 55 %", "gpu_stage2", _of_peak("mixed", 55)),
    Target("stage 1 / naive loop", ">= 2.5x, >= 52 %", "gpu_stage1", _stage_1_on_gpu),
    Target("stage 1, ViT's features cached / naive loop", NO_TARGET, "gpu_stage1", _cached_on_gpu),
    Target("stage 1 / ms-swift, CPU", ">= 3x", "peers", _peer("ms-swift", 1, 3)),
    Target("stage 2 / ms-swift, CPU", ">= 3x", "peers", _peer("ms-swift", 2, 3)),
    Target("stage 1 / transformers, CPU", ">= 2x", "peers", _peer("transformers", 1, 2)),
    Target("stage 2 / transformers, CPU", ">= 2x", "peers", _peer("transformers", 2, 2)),
    Target("FLOPs, stage 1: naive / ours", f">= {FEWER[1]}x", "flops", _fewer(1)),
    Target(
        "FLOPs, stage 2: naive / ours",
        f">= {FEWER[2]}x",
        "flops",
        _fewer(2),
        why="captions are of like length: padding a pair adds 23 %, with instructions 36 %",
    ),
    Target("fill of packed micro-batches", ">= 99.5 %", "plan", _fill),
    Target("fewest micro-batches that budgets allow / ours", NO_TARGET, "plan", _full_packing),
    Target("balance, 8 ranks", ">= 99 %", "plan", _packed("balance", 0.99, 8)),
    Target("balance, 64 ranks", ">= 99 %", "plan", _packed("balance", 0.99, 64)),
    Target(
        "waiting for the slowest rank",
        "<= 1 %",
        "plan",
        _packed("waiting", 0.01),
        why="one step of 20 fills 97 % of its token budgets, which leaves little to balance: 5.5 % "
        "there, 0.8 % without it",
    ),
    Target("planning a million samples", "< 30 s, < 2 GB", "plan", _planning),
    Target(
        "image headers, one core",
        ">= 5,000 a second",
        "index",
        lambda f: _at_least(f["image_headers_per_second"]["median"], 5000, "{:,.0f}"),
    ),
    Target(
        "image pipeline / transformers' processor",
        ">= 2.5x",
        "image",
        lambda f: _at_least(f["ratio_of_all"], 2.5),
        why="most of ours is the resize kernel, which both share",
    ),
    Target(
        f"loss, peak at {COMPARED:,} targets",
        f"< {TARGET_GB} GB, not growing",
        "loss_memory",
        _loss_peak,
    ),
    Target("loss, speed / torch's", ">= 1x", "loss_memory", _loss_speed),
    Target("host syncs a micro-step, a step", "0 and 1", "syncs", _syncs),
    Target(
        "graft of 8B, peak RSS",
        "< 2 GB",
        "graft_full_size",
        lambda f: Found(f"{f['peak_rss_bytes'] / 1e9:.2f} GB", f["peak_rss_bytes"] < 2e9),
    ),
    Target(
        "graft of 8B, speed",
        "that of the disk",
        "graft_full_size",
        _graft_speed,
        why="what is read is hashed as well, which `cp` does not do",
    ),
    Target("predicted / real FLOPs", "exact", "flops", _counted),
    Target("predicted / real memory", "within 5 %", "recompute", _memory),
    Target("predicted / real time", f"within {TIME_OFF:.0%}", "calibrate", _time),
    Target("growth with tokens and patches", "linear up to the budgets", "linear", _straight),
    Target(
        "start-up, once indexed",
        "independent of the data's size",
        "startup",
        _startup,
        why=SAMPLES_STAY,
    ),
)


def make(results: Path = RESULTS) -> str:
    """The text of bench/README.md."""
    found = {}
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "refuted_by" in content:  # the demo's own record is another form
            found[content["name"]] = content
    lines = [_line(target, found.get(target.result)) for target in TARGETS]
    sections = [_section(result) for result in found.values()]
    return HEAD + "\n".join(lines) + "\n" + "".join(sections)


def _line(target: Target, result: dict | None) -> str:
    command = f"[{target.result}](#{target.result})"
    if result is None:
        command = f"`python -m bench.{target.result}`"
        waits = "needs an NVIDIA GPU" if target.result.startswith(NEEDS_GPU) else "no result"
        return f"| {target.what} | {target.bound} |  | not run: {waits} | {command} |  |"
    found = target.read(result["figures"])
    missed = f"**missed**: {found.why or target.why or 'no reason known'}"
    verdict = {None: "", True: "met", False: missed}[found.met]
    cells = (target.what, target.bound, found.text, verdict, command, result["date"])
    return f"| {' | '.join(cells)} |"


def _section(result: dict) -> str:
    name = result["name"]
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    return f"""
## {name}

{result["what"][0].upper()}{result["what"][1:]}.

- `{COMMANDS.get(name, f"python -m bench.{name}")}`, {result["kind"]} {result["date"]}
- {result["machine"]}; {versions}
- spread: {result["spread"]}
- refuted by: {result["refuted_by"]}
"""


def main() -> int:
    README.write_text(make(), encoding="utf-8")
    print(f"{README.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
