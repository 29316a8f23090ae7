"""Credit of the videos of an epoch: what training does with each of them, from its rewards.

NumPy on the host, the same on every process.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from grpo.run import RunSpec
from grpo.scoring import reward_combination
from grpo.scoring.advantages import (
    GroupStatistics,
    below_spread,
    exponential_advantages,
    extremes,
    from_groups_with_spread,
    group_advantages,
    group_statistics,
    largest_spread,
)
from grpo.scoring.box_credit import Boxes, cell_weights
from grpo.scoring.kl_gate import auxiliary_rewards, kl_gate
from grpo.scoring.scores import GatheredScores
from grpo.settings.schema import Recipe


@dataclasses.dataclass(frozen=True)
class Credit:
    """What follows from the rewards for each of the N videos of an epoch.

    Attributes:
        total: float64 [N], the weighted sum of the rewards; nan where one is missing.
        valid: bool [N], whether the video has every weighted reward.
        advantages: fp32 [N], within the groups.
        value: [N], the value by which the videos of a group are ranked: `total` or `advantages`.
        spread: bool [N], whether the video is valid and in a group with different rewards, which is
            not `weak`.
        counted: bool [N], whether the video is valid and trained on.
        order: int [at most batches], numbers of the rollout batches that hold a selected group.
        groups: statistics of the groups, for the log.
        weak: bool [N], whether the spread of the video's group is below train.min_group_std.
        kl_gate: fp32 [N], weight of the KL of each video (train.kl_gate); None: all are 1.
        boxes: of the text read in each video (`GatheredScores.boxes`), for `cell_weights`.
    """

    total: np.ndarray
    valid: np.ndarray
    advantages: np.ndarray
    value: np.ndarray
    spread: np.ndarray
    counted: np.ndarray
    order: np.ndarray
    groups: GroupStatistics
    weak: np.ndarray
    kl_gate: np.ndarray | None = None
    boxes: Sequence[Boxes] = ()

    def cell_weights(self, spec: RunSpec, frames: int) -> np.ndarray | None:
        """Return the weights of the cells of the latents of every video, float32 [N, F, H, W, 1]
        (train.box_credit); None where all count alike. frames: of each video.
        """
        strength = spec.recipe.train.box_credit
        if not strength:
            return None
        depth, height, width, _ = spec.shape_of(frames)
        return cell_weights(self.boxes, frames, (depth, height, width), strength)[..., None]


def compute_credit(
    spec: RunSpec,
    scores: GatheredScores,
    prompt_of: np.ndarray,
    base: reward_combination.Base,
    confidence: np.ndarray | None = None,
) -> Credit:
    """Return the credit of the videos of an epoch. Without any scored video, none is valid.

    prompt_of: int [N], the prompt of each video. base: statistics of the starting model, with which
    measures of quality are compared. confidence: [N], a further reward with the weight
    reward.confidence; nan where a video has none.
    """
    recipe, weights = spec.recipe, spec.settings.weights
    rewards = reward_combination.terms(scores.values, scores.parts, weights, base, scores.main)
    if confidence is not None:
        rewards["confidence"] = confidence
        weights = {**weights, "confidence": recipe.reward.confidence}
    total = reward_combination.weighted_sum(rewards, weights)
    valid = scores.valid & np.isfinite(total)
    options = advantage_options(recipe)
    if recipe.train.advantage_exp:
        options["clip"] = None
    # several rewards are combined before or after they become advantages
    if recipe.reward.combine == "rewards":
        advantages = group_advantages(total, prompt_of, valid, **options)
        value, differing = total, [total]
    else:
        advantages = reward_combination.combined_advantages(
            rewards, weights, prompt_of, valid, **options
        )
        value, differing = advantages, list(rewards.values())
    weak = below_spread(total, prompt_of, valid, recipe.train.min_group_std)
    advantages[weak] = 0
    spread = from_groups_with_spread(differing, prompt_of, valid) & ~weak
    if recipe.train.advantage_exp:
        advantages = exponential_advantages(advantages, spread, recipe.train.advantage_clip)
    gate, share = None, recipe.train.kl_gate
    if share is not None:
        others = auxiliary_rewards(scores.parts, weights, base, scores.main)
        gate = kl_gate(scores.values, others, valid, share)
    # selection of groups (train.groups), then of videos within them (train.best_of)
    selected = largest_spread(total, prompt_of, valid, recipe.train.groups or recipe.sample.groups)
    return Credit(
        total=total,
        valid=valid,
        advantages=advantages,
        value=value,
        spread=spread,
        counted=selected & extremes(total, prompt_of, valid, recipe.train.best_of),
        order=np.flatnonzero(selected.reshape(spec.settings.batches, -1).any(1)),
        groups=group_statistics(total, prompt_of, valid),
        weak=weak,
        kl_gate=gate,
        boxes=scores.boxes,
    )


def advantage_options(recipe: Recipe) -> dict:
    """Return the keyword arguments of `group_advantages` that a recipe sets."""
    return {"std": recipe.train.advantage_std, "clip": recipe.train.advantage_clip}
