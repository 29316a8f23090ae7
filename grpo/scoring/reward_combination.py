"""Several rewards as one: what training maximises, and which videos count.

The spelling, how stable the text is in time and what a CLIP model says count as they are. A measure
of quality (`rewards/quality.py`) has no scale of its own, so it counts against the videos of the
model that training starts from, on the held-out prompts: 0 within one standard deviation of their
mean, falling to -1 at four, on the side that is bad. Weight 0 means measured and logged, and
nothing else.
"""

from collections.abc import Mapping

import numpy as np

from grpo.advantages import group_advantages

MAIN = "ocr"
# the side that is bad: a deviation above the base model's mean (+1), below (-1), both (0)
BAD_SIDE = {
    "sharpness": 0,
    "exposure": 0,
    "contrast": 0,
    "compressibility": 0,
    "flicker": 1,
    "motion": -1,
}
FREE, WORST = 1.0, 4.0  # standard deviations

Base = Mapping[str, tuple[float, float]]  # mean and standard deviation by measure


def base_statistics(parts: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Mean and population standard deviation of each measure over the videos that have it; nan with
    fewer than two, which say nothing about the spread.
    """
    found = {name: values[np.isfinite(values)] for name, values in parts.items() if name != MAIN}
    return {
        name: (float(v.mean()), float(v.std())) if len(v) > 1 else (np.nan, np.nan)
        for name, v in found.items()
    }


def without_base(weights: Mapping[str, float], base: Base) -> list[str]:
    """Return the weighted measures of quality that cannot be judged because `base` has no
    statistics of them.
    """
    return [
        name
        for name, weight in weights.items()
        if weight and name in BAD_SIDE and not np.isfinite(base.get(name, np.nan)).all()
    ]


def against_base(name: str, values: np.ndarray, mean: float, std: float) -> np.ndarray:
    """-1 to 0, [N] float64; nan stays nan. A measure that did not vary in the base model has a
    thousandth of its mean as standard deviation.
    """
    z = (np.asarray(values, np.float64) - mean) / max(std, 1e-3 * abs(mean), 1e-6)
    side = BAD_SIDE[name]
    z = np.abs(z) if side == 0 else side * z
    return -np.clip((z - FREE) / (WORST - FREE), 0.0, 1.0)


def means(measured: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Each one's mean over the videos that have it, nan without any."""
    found = {name: values[np.isfinite(values)] for name, values in measured.items()}
    return {name: float(v.mean()) if len(v) else float("nan") for name, v in found.items()}


def terms(
    values: np.ndarray, parts: Mapping[str, np.ndarray], weights: Mapping[str, float], base: Base
) -> dict[str, np.ndarray]:
    """The rewards that train, by name: [N] float64 each, nan where a video has none. values [N]:
    the spelling. base: of the weighted measures of quality.
    """
    found = {MAIN: np.asarray(values, np.float64)}
    for name in weights.keys() - {MAIN}:
        found[name] = parts.get(name, np.full(len(values), np.nan))  # no video may have it
    return {
        name: against_base(name, found[name], *base[name]) if name in BAD_SIDE else found[name]
        for name, weight in weights.items()
        if weight
    }


def combined(rewards: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The weighted sum, [N] float64; nan where one of them is."""
    return sum(weights[name] * values for name, values in rewards.items())


def combined_advantages(
    rewards: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    groups: np.ndarray,
    valid: np.ndarray,
    *,
    std: str,
    clip: float | None,
) -> np.ndarray:
    """Advantages of each reward by itself, then their weighted sum over its standard deviation, [N]
    float32 (GDPO).

    However much one reward varies, its say is its weight. Where everything is equal, all are 0.
    """

    def advantages(values):
        return group_advantages(np.where(valid, values, 0.0), groups, valid, std=std).astype(
            np.float64
        )

    total = sum(weights[name] * advantages(values) for name, values in rewards.items())
    total[valid] -= total[valid].mean() if valid.any() else 0.0
    spread = total[valid].std() if valid.any() else 0.0
    total = np.where(valid, total / max(spread, 1e-6), 0.0) if spread > 0 else np.zeros_like(total)
    return (np.clip(total, -clip, clip) if clip is not None else total).astype(np.float32)
