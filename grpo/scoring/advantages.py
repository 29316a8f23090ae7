"""Group-relative advantages: a video is compared with the other videos of its own prompt.

NumPy on the host in float64: every process has the gathered rewards and computes the same bits.
Videos that failed to score are masked, never removed, so that shapes are static.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from grpo.settings.choices import STDS

LEAST_PROGRESS = 1e-6  # added to the progress of every step before normalisation


@dataclasses.dataclass(frozen=True)
class GroupStatistics:
    """Statistics of one epoch's rewards. All are finite; without a valid reward all are 0.

    Attributes:
        mean_reward: mean of the valid rewards.
        std_reward: their population standard deviation.
        mean_group_std: mean of the standard deviations of the groups with at least 2 valid rewards.
        zero_std_fraction: share of these groups in which all rewards are equal.
    """

    mean_reward: float
    std_reward: float
    mean_group_std: float
    zero_std_fraction: float


def group_advantages(
    rewards: np.ndarray,
    groups: np.ndarray,
    valid: np.ndarray,
    *,
    std: str,
    eps: float = 1e-4,
    clip: float | None = None,
) -> np.ndarray:
    """Return A = (r - mean of the group) / (std + eps), [N] float32 (GRPO, Shao et al., arXiv
    2402.03300).

    Invalid samples, groups with fewer than 2 valid members and groups of equal rewards get exactly
    0. The result does not depend on the order of the samples. Raises ValueError on unequal lengths,
    a valid reward that is not finite, or an unknown `std`.

    Args:
        rewards: [N] float.
        groups: [N] int, the group of each sample.
        valid: [N] bool.
        std: the divisor, a population standard deviation over valid members. 'group': of the
            sample's group. 'global': of all valid rewards (Flow-GRPO's image recipes). 'max': the
            largest of any group, so that small differences in one group are not amplified. 'none':
            no division (Dr. GRPO, arXiv 2503.20783).
        eps: added to the divisor.
        clip: bound of |A|; None: no bound.
    """
    if std not in STDS:
        raise ValueError(f"std={std!r} is unknown; choose one of {', '.join(STDS)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: must be > 0, or None for no clipping")
    rewards, groups, valid = _check_rewards(rewards, groups, valid)
    groups_members = _members(groups, valid)
    # sums over sorted values do not depend on the order of the samples
    groups_sorted = [np.sort(rewards[members]) for members in groups_members]
    common_scales = {
        "global": np.std(np.sort(rewards[valid])) if valid.any() else 0.0,
        "max": max(map(np.std, groups_sorted), default=0.0),
        "none": 1.0 - eps,
    }
    advantages = np.zeros(len(rewards))
    for members, ordered in zip(groups_members, groups_sorted):
        if ordered[0] < ordered[-1]:
            scale = np.std(ordered) if std == "group" else common_scales[std]
            advantages[members] = (rewards[members] - np.mean(ordered)) / (scale + eps)
    if clip is not None:
        advantages = np.clip(advantages, -clip, clip)
    return advantages.astype(np.float32)


def exponential_advantages(
    advantages: np.ndarray, spread: np.ndarray, clip: float | None
) -> np.ndarray:
    """Return -exp(-A) where a video is from a group with different rewards, and 0 elsewhere, within
    [-clip, clip], [N] float32 (DDRL, arXiv 2512.04332, whose code clips after the exponential).

    advantages: A, [N], without a clip. spread: bool [N], `from_groups_with_spread`: without it, a group
    of equal rewards would have -1. clip: None does not clip.
    """
    exponential = np.where(spread, -np.exp(-np.asarray(advantages, np.float64)), 0.0)
    return (exponential if clip is None else np.clip(exponential, -clip, clip)).astype(np.float32)


def step_advantages(
    rewards: np.ndarray,
    kl: np.ndarray,
    weight: float,
    groups: np.ndarray,
    valid: np.ndarray,
    *,
    std: str,
    clip: float | None = None,
) -> np.ndarray:
    """Return the advantages of each step, [K, N] float32, where the KL to the reference is part of
    the reward: `group_advantages` of r - weight KL_k for step k (Flow-GRPO's code).

    kl [K, N]: of each step; a video is invalid in the steps where its KL is not finite. The other
    arguments are those of `group_advantages`.
    """
    return np.stack(
        [
            group_advantages(
                rewards - weight * step_kl, groups, valid & np.isfinite(step_kl), std=std, clip=clip
            )
            for step_kl in np.asarray(kl, np.float64)
        ]
    )


def step_importance(progress: np.ndarray) -> np.ndarray:
    """Return the factors of a video's advantage in each of its trained steps, [K, N] float32.

    They are proportional to max(progress, 0) + LEAST_PROGRESS, and their mean over the steps of a
    video is 1. progress [K, N]: the result of `rollout.progress`; a value that is not finite counts
    as 0.

    This is the trajectory-level credit of OTCA (arXiv 2604.19234), implemented from a description
    in words: the cosine similarities of adjacent latents to the final latents are subtracted and
    clipped, a small constant is added, and the result is normalised over time. The size of the
    constant and the normalisation to a mean of 1 are our choices. OTCA's allocation among several
    rewards is not implemented.
    """
    gains = np.maximum(np.nan_to_num(np.asarray(progress, np.float64)), 0.0) + LEAST_PROGRESS
    return (gains / gains.mean(0)).astype(np.float32)


def extremes(rewards: np.ndarray, groups: np.ndarray, valid: np.ndarray, count: int) -> np.ndarray:
    """Return which videos are among the `count` best or the `count` worst valid ones of their
    group, bool [N] (DanceGRPO's selection, arXiv 2505.07818).

    Advantages are still computed within the whole group. Of equal rewards the first videos rank as
    the worst. All valid videos are selected where `count` is 0, and in groups with at most 2 count
    valid videos.
    """
    rewards, groups, valid = _check_rewards(rewards, groups, valid)
    selected = valid.copy()
    for group in np.unique(groups) if count else ():
        members = np.flatnonzero((groups == group) & valid)
        order = members[np.argsort(rewards[members], kind="stable")]
        selected[order[count : max(count, len(order) - count)]] = False
    return selected


def largest_spread(
    rewards: np.ndarray, groups: np.ndarray, valid: np.ndarray, count: int
) -> np.ndarray:
    """Return which videos are in the `count` groups with the largest standard deviations of valid
    rewards, bool [N]; of equal groups the first ones.

    It selects the most informative of the groups that were sampled in excess. DAPO (arXiv
    2503.14476) instead samples until groups of equal rewards are replaced.
    """
    rewards, groups, valid = _check_rewards(rewards, groups, valid)
    # the groups in the order of their first videos
    names = groups[np.sort(np.unique(groups, return_index=True)[1])]
    ordered = [np.sort(rewards[(groups == name) & valid]) for name in names]
    spread = np.array([np.std(r) if len(r) > 1 and r[0] < r[-1] else 0.0 for r in ordered])
    return np.isin(groups, names[np.argsort(-spread, kind="stable")[:count]])


def from_groups_with_spread(
    rewards: Sequence[np.ndarray], groups: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """Return which videos are valid and in a group where one of the `rewards` ([N] each) differs
    between valid videos, bool [N]. No method can learn from the other videos.
    """
    selected = np.zeros(len(groups), bool)
    for values in rewards:
        values, groups, valid = _check_rewards(values, groups, valid)
        for members in _members(groups, valid):
            selected[members] |= np.ptp(values[members]) > 0
    return selected


def below_spread(
    rewards: np.ndarray, groups: np.ndarray, valid: np.ndarray, least: float
) -> np.ndarray:
    """Return which videos are in a group whose valid rewards have a standard deviation below `least`,
    bool [N] (train.min_group_std). Groups with fewer than 2 valid rewards are not: they have no
    advantages anyway.
    """
    rewards, groups, valid = _check_rewards(rewards, groups, valid)
    below = np.zeros(len(groups), bool)
    for members in _members(groups, valid):
        below[members] = np.std(np.sort(rewards[members])) < least
    return below


def group_statistics(rewards: np.ndarray, groups: np.ndarray, valid: np.ndarray) -> GroupStatistics:
    """Return the statistics of rewards, groups and valid, [N] each, as `group_advantages` takes
    them. Raises ValueError as it does.
    """
    rewards, groups, valid = _check_rewards(rewards, groups, valid)
    ordered = np.sort(rewards[valid])
    stds = np.array(
        [
            np.std(rewards[members]) if np.ptp(rewards[members]) > 0 else 0.0
            for members in _members(groups, valid)
        ]
    )
    return GroupStatistics(
        mean_reward=float(ordered.mean()) if len(ordered) else 0.0,
        std_reward=float(ordered.std()) if len(ordered) else 0.0,
        mean_group_std=float(stds.mean()) if len(stds) else 0.0,
        zero_std_fraction=float(np.mean(stds == 0)) if len(stds) else 0.0,
    )


def _members(groups: np.ndarray, valid: np.ndarray) -> list[np.ndarray]:
    """Return the indices of the valid members of each group with at least 2 of them."""
    indices = (np.flatnonzero((groups == group) & valid) for group in np.unique(groups))
    return [members for members in indices if len(members) >= 2]


def _check_rewards(rewards, groups, valid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the arguments as arrays [N] of float64, any type and bool. Raises ValueError on unequal
    lengths or a valid reward that is not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    groups = np.asarray(groups)
    valid = np.asarray(valid, bool)
    if rewards.ndim != 1 or not rewards.shape == groups.shape == valid.shape:
        raise ValueError(
            f"rewards {rewards.shape}, groups {groups.shape} and valid {valid.shape} must be "
            "of one dimension and one length"
        )
    bad = np.flatnonzero(valid & ~np.isfinite(rewards))
    if len(bad):
        raise ValueError(
            f"reward {rewards[bad[0]]} of sample {bad[0]} is not finite ({len(bad)} in all); "
            "mark failed samples as invalid"
        )
    return rewards, groups, valid
