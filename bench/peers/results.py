"""The figures of a comparison: medians and spreads, tables, and the reason of what is missed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import distributions

from bench.common import ratios, summary
from bench.peers.setting import GLOBAL_BATCH, Setting
from bench.peers.systems import PEERS_PYTHON, REFERENCE, SYSTEMS
from bench.peers.watch import Watched
from bench.peers.work import Work

TARGETS = {"ms-swift": 3.0, "transformers": 2.0}
"""Times as many samples a second as theirs, in both stages, on the tiny model."""
TARGET_SIZE = "tiny"


@dataclass(frozen=True)
class Figures:
    """Of one run."""

    samples_per_second: float
    tokens_per_second: float
    samples_per_cpu_second: float
    """Of all its processes: what a busy machine does not change."""
    peak_gb: float
    start_up_seconds: float


def figures_of(watched: Watched, setting: Setting) -> Figures:
    """From the clock outside: of the steps after the warm-up."""
    before = setting.warm_up - 1
    seconds = watched.ended[-1] - watched.ended[before]
    return Figures(
        samples_per_second=setting.samples / seconds,
        tokens_per_second=setting.tokens / seconds,
        samples_per_cpu_second=setting.samples / (watched.computed[-1] - watched.computed[before]),
        peak_gb=watched.peak_bytes / 1e9,
        start_up_seconds=watched.ended[0] - seconds / setting.steps,
    )


def table(found: Mapping[tuple[int, str], Sequence[Figures]]) -> list[dict]:
    """A row for each stage and system.

    `times` is how many times as many samples a second ours trains, round by round; `cpu_times` the
    same of samples a second of processor time.
    """
    rows = []
    for (stage, name), rounds in found.items():
        row: dict = {"stage": stage, "system": name}
        for field in fields(Figures):
            row[field.name] = summary(getattr(figures, field.name) for figures in rounds)
        if ours := found.get((stage, REFERENCE)):
            row["times"] = _ours_over(ours, rounds, "samples_per_second")
            row["cpu_times"] = _ours_over(ours, rounds, "samples_per_cpu_second")
        rows.append(row)
    return rows


def _ours_over(ours: Sequence[Figures], theirs: Sequence[Figures], name: str) -> dict[str, float]:
    return ratios(*([getattr(figures, name) for figures in rounds] for rounds in (ours, theirs)))


def work_row(size: str, stage: int, work: Work, samples: int) -> dict:
    return {
        "size": size,
        "stage": stage,
        "useful_gflop_per_sample": round(work.useful / samples / 1e9, 3),
        "recipes_flags_over_useful": round(work.surplus, 3),
        "factors": {name: round(factor, 3) for name, factor in work.factors.items()},
    }


def misses(
    speeds: Sequence[dict], works: Sequence[dict], profiles: Sequence[dict], peak: float
) -> list[dict]:
    """A row for each target that is not reached, with the reason.

    Args:
        peak: FLOPs a second of processor time of one large product.
    """
    reasons = {}
    for rows in (works, profiles):
        for row in rows:
            reasons[row["size"], row["stage"]] = reasons.get((row["size"], row["stage"]), {}) | row
    ours = {(r["size"], r["stage"]): r for r in speeds if r["system"] == REFERENCE}
    missed = []
    for row in speeds:
        target, place = TARGETS.get(row["system"], 0.0), (row["size"], row["stage"])
        if row["size"] == TARGET_SIZE and "times" in row and row["times"]["median"] < target:
            missed.append(
                {
                    "stage": row["stage"],
                    "system": row["system"],
                    "target": target,
                    "found": row["times"]["median"],
                    "why": _reason(row, ours[place], reasons[place], peak),
                }
            )
    return missed


def _reason(row: dict, ours: dict, known: dict, peak: float) -> str:
    """`known`: the rows of the work and of the profile, joined."""
    useful, surplus = known["useful_gflop_per_sample"], known["recipes_flags_over_useful"]
    rate = useful * ours["samples_per_cpu_second"]["median"]
    theirs = useful * surplus * row["samples_per_cpu_second"]["median"]
    factors = ", ".join(f"{name} {factor:.2f}x" for name, factor in known["factors"].items())
    parts = ", ".join(f"{kind} {share:.0%}" for kind, share in known["shares"].items())
    target = TARGETS[row["system"]]
    return (
        f"with the recipe's flags there are {surplus:.2f} times the useful FLOPs ({factors}), and "
        f"both compute them at similar speed: in a second of processor time {row['system']} does "
        f"{theirs:.0f} GFLOP, ours {rate:.0f}, one large matrix product {peak / 1e9:.0f}; "
        f"{target:g}x would take {target / surplus:.2f} times its speed; our step's time is {parts}"
    )


def print_gradients(size: str, rows: Sequence[dict]) -> None:
    print(f"{size}: gradient of one step against ours, |difference| / |ours| by part")
    for row in rows:
        shape = f"{GLOBAL_BATCH // row['micro_batch']} x {row['micro_batch']}"
        parts = ", ".join(f"{part} {x:.1e}" for part, x in row["relative_difference"].items())
        print(f"stage {row['stage']}  {row['system']:18} {shape:>7}  {parts}")


def print_speeds(size: str, rows: Sequence[dict]) -> None:
    print(
        f"{size:5} {'system':18} {'samples/s':>9} {'(of rounds)':>13} {'tokens/s':>8}"
        f" {'peak GB':>7} {'start-up s':>10} {'ours is':>8} {'(of rounds)':>13} {'by CPU':>7}"
    )
    for row in rows:
        rate = row["samples_per_second"]
        line = (
            f"{row['stage']:5} {row['system']:18} {rate['median']:9.2f} {_range(rate):>13}"
            f" {row['tokens_per_second']['median']:8.0f} {row['peak_gb']['median']:7.2f}"
            f" {row['start_up_seconds']['median']:10.1f}"
        )
        if times := row.get("times"):
            by_cpu = row["cpu_times"]["median"]
            line += f" {times['median']:7.2f}x {_range(times):>13} {by_cpu:6.2f}x"
        print(line)


def _range(found: dict[str, float]) -> str:
    return f"{found['least']:.2f}..{found['most']:.2f}"


def described(names: Sequence[str]) -> dict[str, str]:
    """What each system is, with ms-swift's version."""
    what = {name: SYSTEMS[name].what for name in names}
    folders = PEERS_PYTHON.parents[1].glob("lib/python*/site-packages")
    for found in distributions(name="ms-swift", path=[str(folder) for folder in folders]):
        what = {
            n: text.replace("ms-swift", f"ms-swift {found.version}") for n, text in what.items()
        }
    return what
