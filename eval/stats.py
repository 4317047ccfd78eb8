"""How far a score, or a difference of two, can be trusted: 95 % intervals and an exact test.

Samples are taken as independent. Where many ask the same question or share an image, the true
intervals are wider (Miller 2024, arXiv 2411.00640).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0
Interval = tuple[float, float]
INDEPENDENT = (
    "Intervals take samples as independent; where several ask the same question, as in MMBench "
    "and MathVerse, they are too narrow."
)
"""What a reader of intervals must know."""


def is_binary(scores: Sequence[float]) -> bool:
    """Whether every score is 0 or 1."""
    return set(scores) <= {0, 1}


def score_interval(scores: Sequence[float]) -> Interval:
    """95 % interval of the mean of at least one score, in the scores' unit.

    Of 0/1 scores it is Wilson's (1927, JASA 22, 209-212; advised by Brown, Cai and DasGupta 2001,
    Statistical Science 16, 101-133), which keeps its coverage near 0 and 1; of others the
    bootstrap's, which is too narrow for a handful of samples.
    """
    if is_binary(scores):
        test = binomtest(int(sum(scores)), len(scores))
        low, high = test.proportion_ci(confidence_level=CONFIDENCE, method="wilson")
        return float(low), float(high)
    return bootstrap_interval(np.asarray(scores))


def bootstrap_interval(values: np.ndarray) -> Interval:
    """95 % percentile interval of the mean of `values` (n,); the same at every call.

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13. A resample is drawn as
    how often each distinct value occurs in it, a multinomial: the same distribution as n draws
    with replacement, at a cost that does not grow with n.
    """
    distinct, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(SEED)
    means = np.empty(RESAMPLES)
    step = max(1, 2**22 // len(distinct))  # bounds memory
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = generator.multinomial(len(values), counts / len(values), size=size)
        means[start : start + size] = drawn @ distinct / len(values)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p that A and B are equally often right, from the samples that they split.

    McNemar 1947, Psychometrika 12, 153-157, with the binomial in place of chi-square: if they are
    equal, each split sample falls to either side with probability one half.
    """
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


@dataclass(frozen=True)
class Paired:
    """Scores of A and B on the same samples; means and differences in the scores' unit."""

    n: int
    mean_a: float
    mean_b: float
    interval: Interval
    """Of `difference`."""
    only_a: int
    """Samples on which A scored higher; of 0/1 scores those that only A got right."""
    only_b: int
    p: float | None
    """McNemar's; None where a score is neither 0 nor 1."""

    @property
    def difference(self) -> float:
        return self.mean_b - self.mean_a

    @property
    def apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval[0] > 0 or self.interval[1] < 0


def compare_scores(a: Sequence[float], b: Sequence[float]) -> Paired:
    """A and B on the same n >= 1 samples, in the same order.

    The bootstrap draws samples, each with both its scores, which is to draw their differences.
    """
    scores_a, scores_b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    differences = scores_b - scores_a
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    return Paired(
        n=len(differences),
        mean_a=float(scores_a.mean()),
        mean_b=float(scores_b.mean()),
        interval=bootstrap_interval(differences),
        only_a=only_a,
        only_b=only_b,
        p=mcnemar(only_a, only_b) if is_binary([*a, *b]) else None,
    )
