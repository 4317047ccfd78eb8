"""What must be the same for two scores of a benchmark to be compared."""

import json
from collections.abc import Mapping

from eval.result import Result, SampleResult

FIELDS = ("metric", "n", "data_hash", "backend_version")
LONGEST = 60
"""Characters of a value that is quoted."""
ROUNDING = 0.05
"""Points by which a library's rounded score may miss the mean of its samples."""


def differences(results: Mapping[str, Result]) -> dict[str, str]:
    """Field -> who has what, where the results (by checkpoint) of one benchmark do not agree.

    Entries of `protocol` are named `protocol.KEY`, nested ones with further dots.
    """
    values = {name: _values(result) for name, result in results.items()}
    fields = list(dict.fromkeys(field for found in values.values() for field in found))
    said = {}
    for field in fields:
        who: dict[str, list[str]] = {}
        for name, found in values.items():
            who.setdefault(found.get(field, "not set"), []).append(name)
        if len(who) > 1:
            said[field] = _say(field, who)
    return said


def _values(result: Result) -> dict[str, str]:
    fields = {field: str(getattr(result, field)) for field in FIELDS}
    return fields | _flat(result.protocol, "protocol")


def _flat(entry: object, name: str) -> dict[str, str]:
    if isinstance(entry, dict) and entry:
        parts = [_flat(value, f"{name}.{key}") for key, value in entry.items()]
        return {key: value for part in parts for key, value in part.items()}
    return {name: json.dumps(entry, ensure_ascii=False, sort_keys=True)}


def _say(field: str, who: Mapping[str, list[str]]) -> str:
    short = {value: value[:12] if field == "data_hash" else value for value in who}
    if max(map(len, short.values())) > LONGEST or len(set(short.values())) < len(short):
        groups = " | ".join(", ".join(names) for names in who.values())
        return f"{field} differs between {groups} (see result.json)"
    parts = [f"{short[value]} for {', '.join(names)}" for value, names in who.items()]
    return f"{field} is {'; '.join(parts)}"


def shortfall(result: Result) -> str | None:
    """Why there is no score; None where there is one that can be relied on."""
    if not result.complete:
        return f"{result.errored} of {result.n} samples errored, {result.missing} missing"
    return "no score was given" if result.score is None else None


def scores_of(samples: list[SampleResult]) -> list[float]:
    """0..1, of the samples that have one."""
    return [sample.score for sample in samples if sample.score is not None]


def trial(result: Result) -> str | None:
    """That only the first samples were asked, or None."""
    limit = result.protocol.get("limit")
    return f"asked with --limit {limit}, a trial and not the benchmark's score" if limit else None


def not_whole(result: Result) -> str | None:
    """That the data held fewer or more samples than the benchmark has, or None."""
    if result.size is None or result.n == result.size or trial(result):
        return None
    return f"n {result.n:,} of {result.size:,}: not the benchmark as it is known"


def partly_scored(result: Result, samples: list[SampleResult]) -> str | None:
    """That a complete result's metric is of some samples only, as of multiple choice; or None."""
    scored = len(scores_of(samples))
    if not result.complete or scored in (0, result.n):
        return None
    return f"{scored:,} of {result.n:,} samples have this metric"


def not_the_mean(result: Result, samples: list[SampleResult]) -> str | None:
    """Why statistics over samples say nothing about this complete result's score, or None.

    Some benchmarks score groups of samples, or count subsets alike.
    """
    scores = scores_of(samples)
    if not scores:
        return "no sample carries a score of its own"
    mean = 100 * sum(scores) / len(scores)
    if abs(mean - result.score) > ROUNDING:
        return f"the score {result.score:.2f} is not the mean of its samples' scores, {mean:.2f}"
    return None
