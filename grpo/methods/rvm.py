"""Reward-based velocity matching (RVM, Choi et al., arXiv 2608.23664): a signed regression on velocities.

A finished video with advantage A gives its true velocity u = e - x0 at a noise level s that is uniform
in (0, 1), and the velocity moves by the gradient c (v - u), with c = 0.1 A: to u where the video is
better than its group, away from it where it is worse. That is the gradient of c / 2 mean((v - u)^2).
The paper's optional anchor, weight (v - v_ref), is `train.kl_weight` of half that weight.

Formula and settings were taken by reading the implementation for FastVideo (hao-ai-lab/FastVideo, pull request
1806: `detached_rvm_surrogate`, `standardize_group_rewards`, rvm_faithful.py): A is the reward minus its
group's mean, divided by the standard deviation of all rewards and clipped at 5
(train.advantage_std=global), there is no anchor, and videos are sampled without guidance. There the
scalar loss is another one with the same gradient, which is never negative.
"""

import dataclasses

import jax
import numpy as np

from grpo.learning.finished_batch import level_range
from grpo.learning.flow_matching import FlowMatching
from grpo.learning.selection import Selection
from grpo.learning.velocity_loss import Rows

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RVM(FlowMatching):
    """Trains on all videos, weighted by their advantages, at uniform noise levels.

    Attributes:
        scale: factor of the advantages, as published.
    """

    scale: float = 0.1

    name = "rvm"
    reads = (*FlowMatching.reads, "train.kl_weight", "train.kl_gate")
    on_advantages = True

    def levels_at(self, spec, segment: int, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return levels that are uniform between the bounds of `level_range`."""
        low, high = level_range(spec, segment)
        sigma = (low + share * (high - low)).astype(np.float32)
        return sigma, 1000 * sigma

    def select(self, credit, group_size: int) -> Selection:
        weight = (self.scale * credit.advantages).astype(np.float32)
        return Selection(np.arange(len(weight)), None, weight, credit.spread)

    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        return rows.weight * rows.error / 2, {}


METHOD = RVM
