"""Intervals: against SciPy, against all resamples, by coverage, and arguments that are refused."""

import itertools

import numpy as np
import pytest
from scipy import stats

from grpo.records.statistics import bootstrap_interval, paired_difference, t_interval


@pytest.mark.parametrize("count", [2, 17, 300])
def test_equals_scipy(count):
    """The draws are the same; quantiles and standard errors differ by a few roundings of float64."""
    values = np.random.default_rng(count).random(count)
    reference = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=2500,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(7),
    ).confidence_interval
    found = bootstrap_interval(values, draws=2500, seed=7)
    np.testing.assert_allclose(found, [values.mean(), *reference], rtol=1e-14)
    mean, half = t_interval(values)
    reference = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose([mean - half, mean + half], reference, rtol=1e-13)


def test_t_interval_of_few_values():
    mean, half = t_interval([0.5, 0.7, 0.9])  # 4.3027 is the quantile for 2 degrees of freedom
    assert mean == pytest.approx(0.7) and half == pytest.approx(4.302652729911275 * 0.2 / 3**0.5)
    assert t_interval([0.5])[0] == 0.5 and np.isnan(t_interval([0.5])[1])
    assert np.isnan(t_interval([])).all()


def test_equals_all_resamples():
    """Of 5 values there are 5^5 equally likely resamples: their means' quantiles are what the draws
    estimate.
    """
    values = np.array([0.0, 0.1, 0.45, 0.7, 1.0])
    means = np.array([np.mean(r) for r in itertools.product(values, repeat=5)])
    for confidence in (0.5, 0.95):
        mean, low, high = bootstrap_interval(values, confidence=confidence)
        assert mean == pytest.approx(values.mean())
        tail = (1 - confidence) / 2
        np.testing.assert_allclose([low, high], np.quantile(means, [tail, 1 - tail]), atol=0.015)


def test_covers_the_true_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(3), 0
    for i in range(400):
        _, low, high = bootstrap_interval(rng.beta(2, 3, 50), confidence=0.9, draws=400, seed=i)
        hits += low <= 0.4 <= high
    # 0.9 less the percentile method's small bias, give or take 0.03
    assert 0.85 < hits / 400 < 0.94


def test_narrows_with_the_root_of_the_sample():
    values = np.random.default_rng(0).random(64)
    _, low, high = bootstrap_interval(values)
    _, low_many, high_many = bootstrap_interval(np.tile(values, 16))
    assert (high - low) / (high_many - low_many) == pytest.approx(4, rel=0.1)


def test_masked_values_do_not_count():
    values = np.random.default_rng(1).random(20)
    masked = np.insert(values, [0, 7, 20], np.nan)
    assert bootstrap_interval(masked) == bootstrap_interval(values)


def test_deterministic_and_seeded():
    values = np.random.default_rng(2).random(30)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(list(values), seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    "values, message",
    [
        ([], "got 0"),
        ([0.5], "got 1"),
        ([0.5, np.nan, np.nan], r"got 1 \(2 of 3 are NaN\)"),
        ([0.5, np.inf, 1.0], "1 of 3 are infinite"),
        (np.zeros((2, 2)), r"shape \(2, 2\)"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values)


def test_refuses_wrong_confidence():
    with pytest.raises(ValueError, match="confidence=95"):
        bootstrap_interval([0.0, 1.0], confidence=95)


def test_pairs_cancel_what_they_share():
    rng = np.random.default_rng(6)
    before = rng.random(200)
    after = before + 0.05 + 0.01 * rng.standard_normal(200)
    mean, low, high = paired_difference(before, after)
    assert mean == pytest.approx((after - before).mean()) and low > 0.04 and high < 0.06
    # unpaired, the two cannot be told apart
    assert bootstrap_interval(before)[2] > bootstrap_interval(after)[1]
    after[3], before[9] = np.nan, np.nan
    keep = np.delete(np.arange(200), [3, 9])
    assert paired_difference(before, after) == paired_difference(before[keep], after[keep])
    with pytest.raises(ValueError, match="same samples"):
        paired_difference(before, after[:-1])
