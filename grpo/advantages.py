"""Group-relative advantages: a video is judged against the other videos of its own prompt.

Host-side NumPy in float64, so that every process that holds the gathered rewards gets the same
bits. Videos whose scoring failed are masked, never removed: shapes stay static and every batch
keeps its size.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from grpo.settings.choices import STDS

LEAST_PROGRESS = 1e-6


@dataclasses.dataclass(frozen=True)
class GroupStatistics:
    """What the rewards of one epoch look like. NaN-free: with nothing valid, all are 0."""

    num_valid: int  # rewards that count
    num_groups: int  # groups with at least 2 valid rewards, the ones that teach anything
    mean_reward: float  # over valid rewards
    std_reward: float  # population standard deviation over valid rewards
    mean_group_std: float  # over groups with at least 2 valid rewards
    # the share of those groups whose rewards are all equal: no learning signal
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
    """A = (r - mean of the group) / (std + eps), [N] float32; GRPO, Shao et al., arXiv 2402.03300.

    rewards [N] float, groups [N] int, valid [N] bool. std names the divisor, a population standard
    deviation over valid members: 'group' of the sample's own group, 'global' of all valid rewards
    (Flow-GRPO's image recipes), 'max' the largest of any group's (so that no group's small
    differences are blown up), 'none' no division (Dr. GRPO, arXiv 2503.20783). clip bounds |A|.
    Invalid samples, groups with fewer than 2 valid members, and groups of equal rewards get exactly
    0. The result does not depend on the order of the samples. Raises ValueError on unequal lengths,
    a valid reward that is not finite, or another `std`.
    """
    if std not in STDS:
        raise ValueError(f"std={std!r} is unknown; choose one of {', '.join(STDS)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: must be > 0, or None for no clipping")
    rewards, groups, valid = _checked(rewards, groups, valid)
    members_of = _members(groups, valid)
    # summed in order, a permutation changes no bit
    sorted_of = [np.sort(rewards[members]) for members in members_of]
    everyone = {
        "global": np.std(np.sort(rewards[valid])) if valid.any() else 0.0,
        "max": max(map(np.std, sorted_of), default=0.0),
        "none": 1.0 - eps,
    }
    advantages = np.zeros(len(rewards))
    for members, ordered in zip(members_of, sorted_of):
        if ordered[0] < ordered[-1]:
            scale = np.std(ordered) if std == "group" else everyone[std]
            advantages[members] = (rewards[members] - np.mean(ordered)) / (scale + eps)
    if clip is not None:
        advantages = np.clip(advantages, -clip, clip)
    return advantages.astype(np.float32)


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
    """`group_advantages` of each step by itself, [K, N] float32, where the KL to the reference is
    part of the reward: of r - weight KL_k, so that a video's steps are told apart (Flow-GRPO's
    code). kl [K, N]; a video is left out of the steps where its KL is not finite.
    """
    return np.stack(
        [
            group_advantages(
                rewards - weight * of_step, groups, valid & np.isfinite(of_step), std=std, clip=clip
            )
            for of_step in np.asarray(kl, np.float64)
        ]
    )


def step_importance(progress: np.ndarray) -> np.ndarray:
    """How much each of a video's trained steps counts in its advantage, [K, N] float32, 1 in the
    mean of its steps: proportional to max(progress, 0) + LEAST_PROGRESS. progress [K, N]: of
    `rollout.progress`; not finite counts as 0.

    The trajectory-level credit of OTCA (arXiv 2604.19234), of which only a description in words was
    at hand: adjacent latents' cosine similarities to the final one are subtracted, clipped, a small
    constant is added, and the result is normalised over time and multiplies the advantage. The
    constant's size, and that the mean is 1 and not the sum, are ours. Its allocation among several
    rewards is not part of this.
    """
    gains = np.maximum(np.nan_to_num(np.asarray(progress, np.float64)), 0.0) + LEAST_PROGRESS
    return (gains / gains.mean(0)).astype(np.float32)


def extremes(rewards: np.ndarray, groups: np.ndarray, valid: np.ndarray, count: int) -> np.ndarray:
    """The `count` best and the `count` worst valid videos of each group, bool [N]; DanceGRPO's
    selection (arXiv 2505.07818). Their advantages are still those within the whole group. Of equal
    rewards the first videos are the worst. 0 keeps all valid ones, and so does a group with no more
    than 2 count of them.
    """
    rewards, groups, valid = _checked(rewards, groups, valid)
    kept = valid.copy()
    for group in np.unique(groups) if count else ():
        members = np.flatnonzero((groups == group) & valid)
        order = members[np.argsort(rewards[members], kind="stable")]
        kept[order[count : max(count, len(order) - count)]] = False
    return kept


def largest_spread(
    rewards: np.ndarray, groups: np.ndarray, valid: np.ndarray, count: int
) -> np.ndarray:
    """All videos of the `count` groups whose valid rewards have the largest standard deviations,
    bool [N]: of groups sampled in excess, those that teach most (DAPO, arXiv 2503.14476, samples
    until groups of equal rewards are replaced). Of equal groups the first ones.
    """
    rewards, groups, valid = _checked(rewards, groups, valid)
    names = groups[np.sort(np.unique(groups, return_index=True)[1])]  # in the videos' order
    members = [np.sort(rewards[(groups == name) & valid]) for name in names]
    spread = np.array([np.std(m) if len(m) > 1 and m[0] < m[-1] else 0.0 for m in members])
    return np.isin(groups, names[np.argsort(-spread, kind="stable")[:count]])


def from_groups_with_spread(
    rewards: Sequence[np.ndarray], groups: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """The valid videos, bool [N], of groups in which one of the `rewards` [N] differs between valid
    videos. The others show nothing better or worse, so no method learns from them.
    """
    found = np.zeros(len(groups), bool)
    for values in rewards:
        values, groups, valid = _checked(values, groups, valid)
        for members in _members(groups, valid):
            found[members] |= np.ptp(values[members]) > 0
    return found


def group_statistics(rewards: np.ndarray, groups: np.ndarray, valid: np.ndarray) -> GroupStatistics:
    """Metrics of the same inputs as `group_advantages`; raises as it does."""
    rewards, groups, valid = _checked(rewards, groups, valid)
    kept = np.sort(rewards[valid])
    stds = np.array(
        [np.std(rewards[m]) if np.ptp(rewards[m]) > 0 else 0.0 for m in _members(groups, valid)]
    )
    return GroupStatistics(
        num_valid=len(kept),
        num_groups=len(stds),
        mean_reward=float(kept.mean()) if len(kept) else 0.0,
        std_reward=float(kept.std()) if len(kept) else 0.0,
        mean_group_std=float(stds.mean()) if len(stds) else 0.0,
        zero_std_fraction=float(np.mean(stds == 0)) if len(stds) else 0.0,
    )


def _members(groups, valid):
    """Index arrays, one for each group with at least 2 valid members."""
    found = (np.flatnonzero((groups == group) & valid) for group in np.unique(groups))
    return [members for members in found if len(members) >= 2]


def _checked(rewards, groups, valid):
    rewards, groups, valid = (
        np.asarray(rewards, np.float64),
        np.asarray(groups),
        np.asarray(valid, bool),
    )
    if rewards.ndim != 1 or not rewards.shape == groups.shape == valid.shape:
        raise ValueError(
            f"rewards {rewards.shape}, groups {groups.shape} and valid {valid.shape} must be "
            "one list each, of one length"
        )
    bad = np.flatnonzero(valid & ~np.isfinite(rewards))
    if len(bad):
        raise ValueError(
            f"reward {rewards[bad[0]]} of sample {bad[0]} ({len(bad)} such) is not finite; "
            "mark failed samples as invalid"
        )
    return rewards, groups, valid
