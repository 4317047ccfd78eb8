"""Intervals and tests of scores, against scipy's own, known tables and simulation."""

from math import comb

import numpy as np
import pytest
from scipy import stats as scipy_stats

from eval.stats import bootstrap_interval, compare_scores, is_binary, mcnemar, score_interval


def test_wilson_equals_the_formula_and_stays_within_bounds():
    for right, n in ((0, 10), (10, 10), (1, 1), (37, 120), (899, 900)):
        share, z = right / n, scipy_stats.norm.ppf(0.975)
        centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        low, high = score_interval([1] * right + [0.0] * (n - right))
        assert (low, high) == pytest.approx((max(0, centre - half), min(1, centre + half)))
        assert 0 <= low <= share <= high <= 1


@pytest.mark.parametrize("true", [0.03, 0.5, 0.9])
def test_wilson_covers_the_truth_in_about_95_of_100_runs(true):
    """Exactly: over every count of right answers, by its probability."""
    n, covered = 100, 0.0
    for right in range(n + 1):
        low, high = score_interval([1] * right + [0] * (n - right))
        if low <= true <= high:
            covered += scipy_stats.binom.pmf(right, n, true)
    assert 0.93 < covered < 0.975


def test_graded_scores_are_bootstrapped_as_scipy_does():
    scores = np.random.default_rng(3).choice([0, 0.3, 0.6, 0.9, 1], size=231)
    reference = scipy_stats.bootstrap(
        (scores,), np.mean, n_resamples=20_000, method="percentile", rng=5
    ).confidence_interval
    assert score_interval(list(scores)) == pytest.approx(tuple(reference), abs=0.003)


def test_the_bootstrap_of_many_distinct_values_equals_drawing_with_replacement():
    values = np.random.default_rng(0).normal(0.3, 1, size=1500)
    generator = np.random.default_rng(9)
    means = [generator.choice(values, size=1500).mean() for _ in range(4000)]
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.006)


def test_the_bootstrap_covers_the_truth_and_repeats_itself():
    generator = np.random.default_rng(11)
    levels, chances = np.array([0, 0.5, 0.8, 1]), [0.4, 0.1, 0.2, 0.3]
    truth, hits = levels @ chances, 0
    for _ in range(300):
        low, high = bootstrap_interval(generator.choice(levels, size=200, p=chances))
        hits += low <= truth <= high
    assert 0.92 <= hits / 300 <= 0.98
    values = generator.normal(size=300)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_mcnemar_equals_the_binomial_sum_and_a_known_table():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(7, 7) == 1.0
    assert mcnemar(2, 8) == mcnemar(8, 2) == pytest.approx(112 / 1024)
    # Agresti, Categorical Data Analysis: approval of the Prime Minister, 86 and 150 who changed.
    tail = sum(comb(236, k) for k in range(87)) / 2**236
    assert mcnemar(86, 150) == pytest.approx(2 * tail)


def test_compare_pairs_samples():
    # 2 x 2: 40 both right, 5 only A, 15 only B, 20 neither.
    a = [1] * 40 + [1] * 5 + [0] * 15 + [0] * 20
    b = [1] * 40 + [0] * 5 + [1] * 15 + [0] * 20
    paired = compare_scores(a, b)
    assert (paired.n, paired.only_a, paired.only_b) == (80, 5, 15)
    assert (paired.mean_a, paired.mean_b) == (45 / 80, 55 / 80)
    assert paired.difference == pytest.approx(10 / 80)
    assert paired.p == pytest.approx(2 * sum(comb(20, k) for k in range(6)) / 2**20)
    assert paired.apart
    reference = scipy_stats.bootstrap(
        (np.array(a, float), np.array(b, float)),
        lambda x, y, axis: (y - x).mean(axis=axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert paired.interval == pytest.approx(tuple(reference), abs=0.013)  # a sample is 0.0125
    # Scores that go together are told apart by far fewer samples than independent ones.
    shuffled = compare_scores(a, list(np.random.default_rng(0).permutation(b)))
    assert np.ptp(shuffled.interval) > 1.3 * np.ptp(paired.interval)


def test_compare_of_graded_and_of_equal_scores():
    graded = compare_scores([0.2, 0.5, 1], [0.4, 0.5, 0.9])
    assert graded.p is None and (graded.only_a, graded.only_b) == (1, 1)
    equal = compare_scores([1, 0, 1], [1, 0, 1])
    assert equal.interval == (0, 0) and equal.p == 1.0 and not equal.apart


def test_only_right_and_wrong_are_binary():
    assert is_binary([0, 1.0, True]) and not is_binary([0, 0.999])
