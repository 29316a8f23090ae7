"""From the rewards of an epoch to what training does with each video.

Host-side NumPy, the same on every process.
"""

import dataclasses

import numpy as np

from grpo.advantages import (
    GroupStatistics,
    extremes,
    from_groups_with_spread,
    group_advantages,
    group_statistics,
    largest_spread,
)
from grpo.run import RunSpec
from grpo.scoring import reward_combination
from grpo.scoring.scores import GatheredScores


@dataclasses.dataclass(frozen=True)
class Credit:
    """What the rewards of an epoch's N videos say of each of them."""

    total: np.ndarray  # float64 [N], the weighted sum of the rewards; nan where one is missing
    valid: np.ndarray  # bool [N], videos with every weighted reward
    advantages: np.ndarray  # fp32 [N], within the groups
    value: np.ndarray  # [N], what videos of a group are ranked by: total, or advantages
    spread: np.ndarray  # bool [N], valid videos of groups whose rewards differ
    counted: np.ndarray  # bool [N], valid videos that are trained on
    order: np.ndarray  # int [batches], the rollout batches with such videos first
    groups: GroupStatistics


def compute_credit(
    spec: RunSpec, scores: GatheredScores, prompt_of: np.ndarray, base: reward_combination.Base
) -> Credit:
    """Return the credit of an epoch's videos. base: the measures of the starting model, which
    measures of quality are judged by. Where not one video could be scored, none is valid.
    """
    recipe, weights = spec.recipe, spec.settings.weights
    rewards = reward_combination.terms(scores.values, scores.parts, weights, base)
    total = reward_combination.weighted_sum(rewards, weights)
    valid = scores.valid & np.isfinite(total)
    options = advantage_options(recipe)
    if recipe.reward.combine == "rewards":
        advantages = group_advantages(total, prompt_of, valid, **options)
        value, differing = total, [total]
    else:
        advantages = reward_combination.combined_advantages(
            rewards, weights, prompt_of, valid, **options
        )
        value, differing = advantages, list(rewards.values())
    kept = largest_spread(total, prompt_of, valid, recipe.train.groups or recipe.sample.groups)
    return Credit(
        total=total,
        valid=valid,
        advantages=advantages,
        value=value,
        spread=from_groups_with_spread(differing, prompt_of, valid),
        counted=kept & extremes(total, prompt_of, valid, recipe.train.best_of),
        order=np.flatnonzero(kept.reshape(spec.settings.batches, -1).any(1)),
        groups=group_statistics(total, prompt_of, valid),
    )


def advantage_options(recipe) -> dict:
    """Return the options of `group_advantages` that a recipe sets."""
    return {"std": recipe.train.advantage_std, "clip": recipe.train.advantage_clip}
