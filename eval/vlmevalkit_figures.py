"""What VLMEvalKit made of the answers, as our samples and score."""

import json
import math

from eval.benchmarks import Benchmark
from eval.result import EvalError, SampleResult

LABELS = ("split", "Task&Skill", "Category")
"""Columns that say what a row of figures is about."""


def read_sample(row: dict) -> SampleResult:
    """A sample of the worker's as ours; EvalError where its score is none."""
    answer = row["answer"] or {}
    raw = answer.get("content") or ""
    if answer.get("thoughts"):
        raw = f"<think>\n{answer['thoughts']}\n</think>\n\n{raw}"
    failed = row["error"] is not None or row["missing"]
    score = None if failed else row["score"]
    if score is not None and not 0 <= score <= 1:
        raise EvalError(
            f"VLMEvalKit scores sample {row['id']} with {score}, which is how it marks an answer "
            "that it could not score; its figures count that too, so they are no score"
        )
    return SampleResult(
        id=row["id"],
        subset=row["subset"],
        question=row["question"],
        gold=row["gold"],
        raw=raw,
        extracted=None if failed or not raw else row["extracted"],
        score=score,
        truncated=answer.get("finish_reason") == "length",
        error=row["error"],
        images=tuple(row["images"]),
    )


def read_figures(benchmark: Benchmark, outcome: dict) -> tuple[float, dict, list[str]]:
    """(score 0..100, subsets, notes) out of what the library's `evaluate` returned.

    It returns a table or a dict in one of the forms below, in parts of 1 where the questions are
    multiple choice on images, else in per cent.
    """
    figures, rows = outcome["figures"], outcome["samples"]
    unreadable = EvalError(
        f"the figures that VLMEvalKit gives for {benchmark.vlmevalkit} are in no form known here: "
        f"{json.dumps(figures)[:300]}"
    )
    try:
        if isinstance(figures, list):
            scale = 100 if str(outcome["type"]).startswith("MCQ") else 1
            overall, subsets, notes = _from_table(benchmark, figures, rows, scale)
        else:
            overall, subsets, notes = *_from_dict(figures, rows), []
    except (KeyError, ValueError, TypeError, IndexError):
        raise unreadable from None
    if not (math.isfinite(overall) and -1e-6 <= overall <= 100 + 1e-6):
        raise unreadable
    return overall, subsets, notes


def _from_table(benchmark: Benchmark, table: list[dict], rows: list[dict], scale: float):
    label = next((name for name in LABELS if name in table[0]), None)
    f1_first = (
        ("Overall", "acc", "aAcc") if benchmark.metric == "F1" else ("acc", "aAcc", "Overall")
    )
    column = next(name for name in f1_first if name in table[0])
    figure = {str(line.get(label)): scale * float(line[column]) for line in table}
    notes = []
    if len(figure) == 1:
        ((_, overall),) = figure.items()
        parts = {k: scale * v for k, v in table[0].items() if k != label and _is_number(v)}
    elif "Overall" in figure:
        overall, parts = figure["Overall"], figure
    else:
        # Several splits and no figure for all of them: that of all samples.
        sizes = {name: sum(row["split"] == name for row in rows) for name in figure}
        overall = sum(figure[name] * size for name, size in sizes.items()) / sum(sizes.values())
        each = ", ".join(f"{name} {figure[name]:.2f} (n {sizes[name]})" for name in sorted(figure))
        notes.append(f"the score is of the samples of all splits; by split: {each}")
        parts = figure
    return overall, _subsets(parts, rows), notes


def _from_dict(figures: dict, rows: list[dict]) -> tuple[float, dict]:
    if "Final Score" in figures:  # OCRBench: points out of all samples
        return 100 * figures["Final Score"] / len(rows), {}
    overall = figures["overall"]
    if isinstance(overall, dict):  # Video-MME: {"short": {"overall": "0.512", ...}, ...}
        parts = {name: 100 * float(part["overall"]) for name, part in figures.items()}
        return parts.pop("overall"), _subsets(parts, rows)
    parts = {name: 100 * right / n for name, (right, n, _) in figures.items()}  # MVBench
    return parts.pop("overall"), _subsets(parts, rows)


def _subsets(parts: dict[str, float], rows: list[dict]) -> dict[str, dict]:
    """Those figures that are about a category or a split, with its number of samples."""
    sizes: dict[str, int] = {}
    for row in rows:
        names = {row["split"], row["subset"], *row["subset"].split(",")} - {""}
        for name in names:
            sizes[name] = sizes.get(name, 0) + 1
    return {
        name: {"score": score, "n": sizes[name]}
        for name, score in sorted(parts.items())
        if name in sizes and math.isfinite(score)
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
