"""Combination of several rewards: what training maximises, and which videos count.

The spelling, the stability of the text and the CLIP rewards count as they are. A measure of quality
(`rewards/quality.py`) has no scale of its own, so it becomes a penalty relative to the model that
training starts from, on the held-out prompts: 0 within one standard deviation of that model's mean,
falling linearly to -1 at four, on the bad side. Weight 0 means that a reward is measured and logged
but not trained.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from grpo.scoring.advantages import group_advantages

MAIN = "ocr"  # the main reward of most runs, the spelling (`grpo.settings.schema.main_reward`)
# the bad side of each measure: above the base model's mean (+1), below it (-1), both (0)
BAD_SIDE = {
    "sharpness": 0,
    "exposure": 0,
    "contrast": 0,
    "compressibility": 0,
    "flicker": 1,
    "motion": -1,
    "dark": 1,
    "edges": 0,
    "colours": 0,
    "text_area": 1,
}
FREE, WORST = 1.0, 4.0  # standard deviations where the penalty starts, and where it is -1

Base = Mapping[str, tuple[float, float]]  # (mean, standard deviation) by measure


def base_statistics(
    parts: Mapping[str, np.ndarray], main: str = MAIN
) -> dict[str, tuple[float, float]]:
    """Return the mean and the population standard deviation of each measure but the main reward over
    the videos that have it; nan with fewer than two, which have no spread.
    """
    finite = {
        name: values[np.isfinite(values)]
        for name, values in parts.items()
        if name != main or name in BAD_SIDE
    }
    return {
        name: (float(values.mean()), float(values.std())) if len(values) > 1 else (np.nan, np.nan)
        for name, values in finite.items()
    }


def without_base(weights: Mapping[str, float], base: Base) -> list[str]:
    """Return the names of the weighted measures of quality for which `base` has no statistics."""
    return [
        name
        for name, weight in weights.items()
        if weight and name in BAD_SIDE and not np.isfinite(base.get(name, np.nan)).all()
    ]


def against_base(name: str, values: np.ndarray, mean: float, std: float) -> np.ndarray:
    """Return the penalty of a measure in [-1, 0], [N] float64; nan stays nan.

    With z = (value - mean) / std towards the bad side: -clip((z - FREE) / (WORST - FREE), 0, 1).
    mean, std: of the base model. A measure that did not vary there gets a thousandth of its mean as
    standard deviation.
    """
    z = (np.asarray(values, np.float64) - mean) / max(std, 1e-3 * abs(mean), 1e-6)
    side = BAD_SIDE[name]
    z = np.abs(z) if side == 0 else side * z
    return -np.clip((z - FREE) / (WORST - FREE), 0.0, 1.0)


def means(measured: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the mean of each measure over the videos that have it, nan without any."""
    finite = {name: values[np.isfinite(values)] for name, values in measured.items()}
    return {
        name: float(values.mean()) if len(values) else float("nan")
        for name, values in finite.items()
    }


def terms(
    values: np.ndarray,
    parts: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    base: Base,
    main: str = MAIN,
) -> dict[str, np.ndarray]:
    """Return the rewards with a weight by name, [N] float64 each; nan where a video has none.

    values: the main reward, [N]. parts: the other rewards, [N] each; a reward that no video has may
    be absent. base: statistics of the weighted measures of quality. main: the main reward's name.
    """
    raw = {main: np.asarray(values, np.float64)}
    for name in weights.keys() - {main}:
        raw[name] = parts.get(name, np.full(len(values), np.nan))
    return {
        name: against_base(name, raw[name], *base[name]) if name in BAD_SIDE else raw[name]
        for name, weight in weights.items()
        if weight
    }


def weighted_sum(rewards: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Return the weighted sum of the rewards, [N] float64; nan where one of them is nan."""
    return _total([weights[name] * values for name, values in rewards.items()])


def _total(terms: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of at least one term, added in order."""
    return functools.reduce(np.add, terms)


def combined_advantages(
    rewards: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    groups: np.ndarray,
    valid: np.ndarray,
    *,
    std: str,
    clip: float | None,
) -> np.ndarray:
    """Return the advantages of a weighted sum of rewards, [N] float32, after GDPO: the advantages of
    each reward are computed alone, and their weighted sum is normalised over all valid videos.

        A = clip((S - mean(S)) / std(S), -clip, clip),   S = sum_k weights[k] group_advantages(k)

    So the influence of a reward is its weight, however much the reward varies. Where S does not
    vary, and where a video is not valid, the advantage is 0.

    rewards: [N] each. groups: int [N], the group of each video. valid: bool [N]. std: as in
    `grpo.scoring.advantages.group_advantages`. clip: largest magnitude; None does not clip.
    """

    def advantages(values: np.ndarray) -> np.ndarray:
        values = np.where(valid, values, 0.0)
        return group_advantages(values, groups, valid, std=std).astype(np.float64)

    total = _total([weights[name] * advantages(values) for name, values in rewards.items()])
    total[valid] -= total[valid].mean() if valid.any() else 0.0
    spread = total[valid].std() if valid.any() else 0.0
    if not spread > 0:
        return np.zeros(len(total), np.float32)
    total = np.where(valid, total / max(spread, 1e-6), 0.0)
    return (np.clip(total, -clip, clip) if clip is not None else total).astype(np.float32)
