"""DiffusionNFT (Zheng et al., arXiv 2509.16117): a positive and a negative policy, no log-probs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.flow_matching import FlowMatching, Rows, check_range, mean_square
from grpo.learning.selection import Selection
from wan_jax.diffusion.solvers import per_sample

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class NFT(FlowMatching):
    """Trains on all videos, weighted by `optimality`, at the rollout's noise levels.

    Videos are sampled by the old policy, which after an epoch, and n updates in all, becomes
    d old + (1 - d) new with d = min(old_rate n, old_most).
    """

    beta: float = 0.1  # train.nft_beta
    advantage_clip: float = 5.0  # of a surely good video; scales the loss too, as published
    old_rate: float = 1e-3
    old_most: float = 0.5

    name = "nft"
    default_kl_weight = 1e-4
    reads = (
        *FlowMatching.reads,
        "train.kl_weight",
        "train.nft_beta",
        "train.old_rate",
        "train.old_most",
    )
    on_advantages = True
    rollout_levels = True
    lagged = ("old",)
    sampler = "old"

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "beta", "advantage_clip")
        if not (0 <= self.old_rate and 0 <= self.old_most < 1):
            raise ValueError(
                f"train.old_rate={self.old_rate}, train.old_most={self.old_most}: need 0 <= "
                "old_rate and 0 <= old_most < 1; 0.001 and 0.5 are usual, and at 1 the old policy "
                "would never move"
            )

    @classmethod
    def settings(cls, recipe) -> dict:
        train = recipe.train
        return {
            "beta": train.nft_beta,
            "advantage_clip": train.advantage_clip,
            "old_rate": train.old_rate,
            "old_most": train.old_most,
        }

    def share_kept(self, update: int, last: bool) -> dict[str, float]:
        return {"old": float(min(self.old_rate * update, self.old_most)) if last else 1.0}

    def select(self, credit, group_size: int) -> Selection:
        weight = optimality(credit.advantages, self.advantage_clip)
        return Selection(np.arange(len(weight)), None, weight, credit.spread)

    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        old = rows.v_lagged["old"]
        loss = nft_loss(rows.x, rows.x0, rows.sigma, rows.v, old, rows.weight, self.beta)
        return self.advantage_clip * loss, {}


def optimality(advantages: np.ndarray, clip: float) -> np.ndarray:
    """Return r = clip(A / clip, -1, 1) / 2 + 1/2, float32: how surely a video is a good one."""
    return (np.clip(advantages / clip, -1.0, 1.0) / 2 + 0.5).astype(np.float32)


def nft_loss(
    x: Array, x0: Array, sigma: Array, v: Array, v_old: Array, optimality: Array, beta: float
) -> Array:
    """DiffusionNFT (arXiv 2509.16117) with its adaptive weighting, [B]: with r the optimality,

        r l(v+) / beta + (1 - r) l(v-) / beta,   v+ = (1 - beta) v_old + beta v,   v- = (1 + beta)
                                                 v_old - beta v,
        l(v) = mean((x - s v - x0)^2) / w,       w = max(mean |x - s v - x0|, 1e-5), a constant to
                                                 the gradient.

    x, x0, v, v_old [B, ...]; sigma, optimality [B]. At v = v_old the gradient is that of (2 r - 1)
    l(v): a video of r = 1/2 leaves the policy where it is.
    """
    s = per_sample(sigma, x)

    def error(v):  # of the predicted clean sample
        difference = x - s * v - x0
        size = jnp.mean(jnp.abs(difference), axis=tuple(range(1, x.ndim)))
        return mean_square(difference) / jax.lax.stop_gradient(jnp.maximum(size, 1e-5))

    better, worse = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
    return (optimality * error(better) + (1 - optimality) * error(worse)) / beta


METHOD = NFT
