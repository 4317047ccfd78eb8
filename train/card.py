"""The run's card: what was run, with what, what came of it, and what is known to be wrong.

    python -m train.card RUN                    # written at the end of a run; again by this
    python -m train.card RUN --same_as OTHER    # with a resume check: are the weights the same?

`card.yaml` is made anew each time, but for `resume_check` and `known_failures`: the latter is for
people, who write into the file itself. Exit code 1: the weights differ.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
import yaml
from torch import Tensor

from train.config import UsageError
from train.disk import write_text
from train.metrics import read_log
from vlm.checkpoint import CheckpointError, TensorReader
from vlm.cost import CONVENTION

WAITS = ("data_wait", "rank_wait", "save_wait")
KEPT = {"resume_check": None, "known_failures": []}
"""What the run itself does not know."""


def write_card(run: Path, uninterrupted: Path | None = None) -> dict:
    """Write `card.yaml` into a run's directory and return what it holds.

    Raises UsageError where it is no run, cannot be compared with the other, or has a card that
    cannot be read, which is left as it is.
    """
    path = run / "card.yaml"
    kept = _kept(path)
    if uninterrupted:
        kept["resume_check"] = check_resume(run, uninterrupted)
    card = make_card(run) | kept
    write_text(path, yaml.safe_dump(card, sort_keys=False, allow_unicode=True).rstrip())
    return card


def _kept(path: Path) -> dict:
    """What stays of an earlier card; UsageError where people's words in it would be lost."""
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "")
        raise UsageError(f"{path} is not YAML; mend it or remove it ({reason})") from None
    if not isinstance(before, dict | None):
        raise UsageError(f"{path} is no card, `name: value` lines; mend it or remove it")
    return {key: (before or {}).get(key, empty) for key, empty in KEPT.items()}


def make_card(run: Path) -> dict:
    """What a run's files say of it, as far as it has come. UsageError where it is no run."""
    try:
        text = (run / "config.yaml").read_bytes()
    except OSError as error:
        raise UsageError(f"{run} is no run: {error.strerror} (config.yaml)") from None
    events: dict[str, list[dict]] = {}
    for line in read_log(run / "log.jsonl"):
        events.setdefault(line["event"], []).append(line)
    config = yaml.safe_load(text)
    # those that found nothing left to train are no part of the run
    starts = [start for start in events.get("start", []) if start["step"] < start["total_steps"]]
    trains = events.get("train", [])
    learnt = [line for line in trains if "loss" in line]
    total = starts[-1]["total_steps"] if starts else None
    checkpoint = _last_checkpoint(run)
    progress = checkpoint and json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
    ledger = run / "ledger.jsonl"
    bad = len(ledger.read_text(encoding="utf-8").splitlines()) if ledger.exists() else 0
    return {
        "run": config.get("run_name") or run.resolve().name,
        "command": starts[0]["command"] if starts else None,
        "started": starts[0]["time"] if starts else None,
        "resumed": [
            {name: start[name] for name in ("step", "time", "command", "ranks", "revision")}
            for start in starts[1:]
        ],
        "versions": starts[-1]["versions"] if starts else None,
        "revision": starts[-1]["revision"] if starts else None,
        "hardware": hardware(starts),
        "model": str(config["model"]),
        "config_sha256": hashlib.sha256(text).hexdigest(),
        "trains": {
            part: {"trained": trained, "of": size}
            for part, (trained, size) in (starts[-1].get("trains", {}) if starts else {}).items()
        },
        "micro_batch_budget": starts[-1].get("budget") if starts else None,
        "data_fingerprint": progress and progress["data"],
        "data_samples": progress and progress["samples"],
        "steps": trains[-1]["step"] if trains else 0,
        "of_steps": total,
        "updates": progress and progress["updates"],
        "checkpoint": checkpoint and checkpoint.name,
        "training_loss": {
            "first": learnt[0]["loss"] if learnt else None,
            "last": learnt[-1]["loss"] if learnt else None,
            "last_by_source": learnt[-1].get("loss_by_source") if learnt else None,
        },
        "held_out": {
            name: _without(events["eval"][place], "event", "seconds")
            for name, place in (("first", 0), ("last", -1))
            if "eval" in events
        },
        "throughput": throughput(trains),
        "steps_refused": len(events.get("refused", [])),
        "steps_skipped": len(events.get("skipped", [])),
        "bad_samples": bad,
    }


def hardware(starts: list[dict]) -> str | None:
    """Of the starts whose steps stand: `2 x cpu, from step 20 on 1 x cpu`."""
    standing: list[dict] = []
    for start in starts:
        while standing and standing[-1]["step"] >= start["step"]:
            standing.pop()  # its steps were taken again
        standing.append(start)
    words: list[str] = []
    before = ""
    for start in standing:
        devices = f"{start['ranks']} x {start['device']}"
        if devices != before:
            words.append(f"from step {start['step']} on {devices}" if words else devices)
        before = devices
    return ", ".join(words) or None


def throughput(trains: list[dict]) -> dict | None:
    """Over all logged steps: rates, and waits as shares of the time."""
    seconds = sum(line["seconds"] for line in trains)
    if not seconds:
        return None

    def mean(name: str) -> float | None:
        """Weighed by time; None where a line lacks it."""
        pairs = [(line.get(name), line["seconds"]) for line in trains]
        if any(value is None for value, _ in pairs):
            return None
        return round(sum(value * weight for value, weight in pairs) / seconds, 4)

    return {
        "training_seconds": round(seconds, 1),
        "tokens_per_second": round(sum(line["tokens"] for line in trains) / seconds, 1),
        "samples_per_second": round(sum(line["samples"] for line in trains) / seconds, 2),
        "useful_tflops_per_second": mean("useful_tflops_per_second"),
        "mfu": mean("mfu"),
        **{name: mean(name) for name in WAITS},
        "memory_gb": max((line.get("memory_gb", 0) for line in trains), default=0) or None,
        "convention": CONVENTION,
    }


def check_resume(run: Path, other: Path) -> dict:
    """Whether a run that was interrupted ended where one that was not did.

    Raises UsageError where the two cannot be compared.
    """
    ours, theirs = _given_checkpoint(run), _given_checkpoint(other)
    if ours.name != theirs.name:
        raise UsageError(
            f"{run} and {other} do not end at the same step ({ours.name}, {theirs.name}), so "
            "nothing is compared"
        )
    a, b = TensorReader(ours / "model"), TensorReader(theirs / "model")
    if a.names() != b.names() or any(a.shape(name) != b.shape(name) for name in a.names()):
        raise UsageError(f"{run} and {other} trained models of other shapes")
    furthest = max(_difference(a.get(name), b.get(name)) for name in a.names())
    return {
        "compared_with": str(other),
        "checkpoint": ours.name,
        "weights_equal": furthest == 0,
        "max_abs_difference": furthest,
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return 0.0 if torch.equal(a, b) else float((a.double() - b.double()).abs().max())


def _given_checkpoint(run: Path) -> Path:
    if not run.is_dir():
        raise UsageError(f"{run} is no directory; give that of a run")
    checkpoint = _last_checkpoint(run)
    if not checkpoint:
        raise UsageError(f"{run} has no checkpoint, so nothing is compared")
    return checkpoint


def _last_checkpoint(run: Path) -> Path | None:
    latest = run / "latest"
    return run / latest.read_text(encoding="utf-8").strip() if latest.exists() else None


def _without(line: dict, *names: str) -> dict:
    return {name: value for name, value in line.items() if name not in names}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.card", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--same_as", type=Path, help="an uninterrupted run of the same options")
    options = parser.parse_args(arguments)
    try:
        card = write_card(options.run, options.same_as)
    except (UsageError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.same_as:
        print(f"written: {options.run / 'card.yaml'}")
        return 0
    check = card["resume_check"]
    furthest = check["max_abs_difference"]
    found = "equal" if check["weights_equal"] else f"differ by up to {furthest:#.3g}"
    print(f"{check['checkpoint']}: weights {found}")
    return int(not check["weights_equal"])


if __name__ == "__main__":
    sys.exit(main())
