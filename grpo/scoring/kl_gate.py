"""The gate of the KL: only videos whose main reward is ahead of their other rewards are held.

A KL on all videos also holds those that are good by every reward. GARDO (gated and adaptive
regularisation of diffusion RL) holds those for which the main reward, a proxy, is high and other
rewards disagree.
"""

from collections.abc import Mapping

import numpy as np

from grpo.scoring.reward_combination import BAD_SIDE, Base


def auxiliary_rewards(
    parts: Mapping[str, np.ndarray], weights: Mapping[str, float], base: Base, main: str
) -> dict[str, np.ndarray]:
    """Return the measured rewards without a weight, float64 [N] each, higher is better; nan where a
    video has none.

    A measure of quality becomes minus its distance from the base model's mean, in either direction,
    and is left out without that mean. parts, weights, base, main: as in `reward_combination.terms`.
    """
    rewards = {}
    for name, weight in weights.items():
        if weight or name == main or name not in parts:
            continue
        if name not in BAD_SIDE:
            rewards[name] = parts[name]
        elif np.isfinite(mean := base.get(name, (np.nan, np.nan))[0]):
            rewards[name] = -np.abs(parts[name] - mean)
    return rewards


def kl_gate(
    main: np.ndarray, others: Mapping[str, np.ndarray], valid: np.ndarray, share: float
) -> np.ndarray:
    """Return the weight of the KL of each video, float32 [N]: 1 for those that are held, else 0.

    With rank(r) in [0, 1] among the videos that have r, 1 for the highest, and equal values at
    their mean rank: u = rank(main) - mean of rank(other). Held are the valid videos with the largest
    u: those above its (1 - share) quantile, without further bound. A video without any other reward
    has u = 0. (GARDO's published code ranks from the highest down, so that its u has the opposite
    sign.)

    main: float64 [N]. others: `auxiliary_rewards`. valid: bool [N]. share: in (0, 1).
    """
    if not valid.any():
        return np.zeros(len(main), np.float32)
    among = [ranks(np.where(valid, values, np.nan)) for values in others.values()]
    found = np.array(among).reshape(len(among), len(main))
    count = np.isfinite(found).sum(axis=0)
    mean = np.nansum(found, axis=0) / np.maximum(count, 1)
    ahead = np.where(count > 0, ranks(np.where(valid, main, np.nan)) - mean, 0.0)
    return (valid & (ahead > np.quantile(ahead[valid], 1 - share))).astype(np.float32)


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of the finite values among each other, float64 [N] from 0, the lowest, to 1;
    equal values have their mean rank, and a single one 1/2. nan where a value is not finite.
    """
    finite = np.isfinite(values)
    some = np.sort(values[finite])
    low, high = (np.searchsorted(some, values, side) for side in ("left", "right"))
    middle = (low + high - 1) / 2 / max(len(some) - 1, 1)
    return np.where(finite, middle if len(some) > 1 else 0.5, np.nan)
