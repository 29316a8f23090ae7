"""Computes confidence intervals of mean rewards: percentile bootstrap (Efron & Tibshirani 1993,
chapter 13) over samples, Student's t over seeds.

`scipy.stats.bootstrap` draws the same resamples, but its quantiles differ in the last bit and between
its versions; the intervals in evals.jsonl must not.
"""

import numpy as np
from scipy import special

LEAST_VALUES = 2  # for an interval: one sample says nothing about spread
CHUNK = 1000  # resamples drawn at once: 1000 x 1000 values are 8 MB


def bootstrap_interval(
    values, *, confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean and its percentile bootstrap interval: (mean, low, high).

    Args:
      values: [N]. NaN is a sample that could not be scored and is left out.
      confidence: the interval holds this middle share of the resamples' means.
      draws: number of resamples of N values with replacement.
      seed: of the resamples; equal arguments give equal results.

    Raises:
      ValueError: fewer than `LEAST_VALUES` values, or an argument out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1; 0.95 is usual")
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1; 10000 gives stable bounds")
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise ValueError(f"values must be [N], got shape {values.shape}")
    given, values = len(values), values[~np.isnan(values)]  # [M]
    if len(values) < LEAST_VALUES:
        raise ValueError(
            f"a confidence interval needs {LEAST_VALUES} values or more, got {len(values)}"
            + (f" ({given - len(values)} of {given} are NaN)" if given > len(values) else "")
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"values must be finite or NaN, {np.isinf(values).sum()} of {given} are infinite"
        )
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[rng.integers(len(values), size=(min(CHUNK, draws - first), len(values)))].mean(1)
            for first in range(0, draws, CHUNK)
        ]
    )  # [draws]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(values.mean()), float(low), float(high)


def paired_difference(before, after) -> tuple[float, float, float]:
    """Return the mean of after - before and its 95 % bootstrap interval: (mean, low, high).

    Both are [N], for the same prompts and seeds in the same order; pairs with a NaN are left out.
    The interval is narrower than their own, because what makes a prompt hard for both cancels.
    Raises ValueError for different shapes or fewer than `LEAST_VALUES` complete pairs.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape != after.shape:
        raise ValueError(
            f"pairs need the same samples before and after, got shapes {before.shape} and "
            f"{after.shape}"
        )
    return bootstrap_interval(after - before)


def t_interval(values) -> tuple[float, float]:
    """Return the mean of values [N] and half the width of its 95 % interval, t sqrt(s^2 / N).

    s^2 is the unbiased variance and t the quantile of Student's distribution with N - 1 degrees of
    freedom. The half-width of one value is NaN; without values both are NaN.
    """
    values = np.asarray(values, np.float64)
    mean = float(values.mean()) if len(values) else float("nan")
    if len(values) < 2:
        return mean, float("nan")
    t = special.stdtrit(len(values) - 1, (1 + 0.95) / 2)
    return mean, float(t * values.std(ddof=1) / np.sqrt(len(values)))
