"""Two checkpoints on the same samples of the same benchmarks."""

from dataclasses import dataclass
from pathlib import Path

from eval.matrix import Key, result_folders
from eval.protocol import differences, not_the_mean, not_whole, partly_scored, shortfall, trial
from eval.result import EvalError, Result, SampleResult, read_result
from eval.stats import Paired, compare_scores


@dataclass(frozen=True)
class Pair:
    """One sample as both answered it; both have a score."""

    a: SampleResult
    b: SampleResult

    @property
    def change(self) -> float:
        """From A to B, -1..1."""
        return self.b.score - self.a.score


@dataclass(frozen=True)
class Comparison:
    """A and B on one benchmark with one backend."""

    key: Key
    a: Result
    b: Result
    statistics: Paired
    """Scores 0..1."""
    fell: tuple[Pair, ...]
    """Samples on which B scored lower, the largest falls first."""
    rose: tuple[Pair, ...]
    """Samples on which B scored higher, the largest rises first."""
    only_in_a: int
    """Samples with a score in A and none in B."""
    only_in_b: int
    warnings: tuple[str, ...]

    @property
    def names(self) -> tuple[str, str]:
        """What A and B are called."""
        if self.a.checkpoint == self.b.checkpoint:
            return f"{self.a.checkpoint} (A)", f"{self.b.checkpoint} (B)"
        return self.a.checkpoint, self.b.checkpoint


def shared(a: Path, b: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Folders of each benchmark and backend that both have, and the names of what one lacks.

    EvalError where they share none, or one holds several checkpoints.
    """
    in_a, in_b = _by_key(a), _by_key(b)
    keys = sorted(in_a.keys() & in_b.keys())
    if not keys:
        have = [", ".join(map(str, sorted(found))) for found in (in_a, in_b)]
        raise EvalError(
            f"{a} and {b} share no benchmark with the same backend: the first has {have[0]}, "
            f"the second {have[1]}"
        )
    lacking = [str(key) for key in sorted(in_a.keys() ^ in_b.keys())]
    return [(in_a[key], in_b[key]) for key in keys], lacking


def _by_key(folder: Path) -> dict[Key, Path]:
    found: dict[Key, Path] = {}
    checkpoints = set()
    for path in result_folders([folder]):
        result, _ = read_result(path)
        key = Key(result.benchmark, result.backend)
        checkpoints.add(result.checkpoint)
        if len(checkpoints) > 1:
            names = ", ".join(sorted(checkpoints))
            raise EvalError(f"{folder} holds several checkpoints ({names}); name one's folder")
        if key in found:
            raise EvalError(f"{found[key]} and {path} both hold {key}; name only one of them")
        found[key] = path
    return found


def compare(folder_a: Path, folder_b: Path) -> Comparison:
    """Two results of one benchmark and backend.

    EvalError where their samples cannot be matched: another metric, ids that occur twice or mean
    another question in the other, no sample that both have a score of. Whatever else differs is
    told as a warning.
    """
    (a, samples_a), (b, samples_b) = read_result(folder_a), read_result(folder_b)
    key, differing = Key(a.benchmark, a.backend), differences({"A": a, "B": b})
    where = f"{key}: {folder_a} and {folder_b} cannot be compared"
    if "metric" in differing:
        raise EvalError(f"{where}: {differing['metric']}")
    by_id_a, by_id_b = _scored(folder_a, samples_a), _scored(folder_b, samples_b)
    pairs = [Pair(by_id_a[i], by_id_b[i]) for i in by_id_a if i in by_id_b]
    if not pairs:
        raise EvalError(f"{where}: no sample has a score in both")
    for pair in pairs:
        if (pair.a.question, pair.a.gold) != (pair.b.question, pair.b.gold):
            also = "".join(f"; {said}" for said in differing.values())
            raise EvalError(f"{where}: sample {pair.a.id} is not the same question in both{also}")
    return Comparison(
        key=key,
        a=a,
        b=b,
        statistics=compare_scores([p.a.score for p in pairs], [p.b.score for p in pairs]),
        fell=tuple(sorted((p for p in pairs if p.change < 0), key=lambda p: p.change)),
        rose=tuple(sorted((p for p in pairs if p.change > 0), key=lambda p: -p.change)),
        only_in_a=len(by_id_a) - len(pairs),
        only_in_b=len(by_id_b) - len(pairs),
        warnings=(
            *(f"settings or data differ, {said}" for said in differing.values()),
            *_warn("A", a, samples_a),
            *_warn("B", b, samples_b),
        ),
    )


def _scored(folder: Path, samples: list[SampleResult]) -> dict[tuple[str, str], SampleResult]:
    """Samples with a score by subset and id."""
    found: dict[tuple[str, str], SampleResult] = {}
    for sample in samples:
        if found.setdefault((sample.subset, sample.id), sample) is not sample:
            raise EvalError(
                f"{folder} holds sample {sample.id} of subset {sample.subset!r} twice; "
                "run the benchmark again"
            )
    return {key: sample for key, sample in found.items() if sample.score is not None}


def _warn(name: str, result: Result, samples: list[SampleResult]) -> list[str]:
    known = (trial(result), not_whole(result), partly_scored(result, samples))
    said = [f"{name}: {reason}" for reason in known if reason]
    if reason := shortfall(result):
        said.append(f"{name} is incomplete, {reason}; samples without a score are left out")
    elif reason := not_the_mean(result, samples):
        said.append(f"{name}: {reason}; what follows is about the mean of the samples")
    return said
