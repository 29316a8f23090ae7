"""DiffusionNFT (Zheng et al., arXiv 2509.16117): a positive and a negative policy, without log-probs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from grpo.credit import Credit
from grpo.learning.flow_matching import FlowMatching, check_range
from grpo.learning.selection import Selection
from grpo.learning.velocity_loss import Rows, mean_square, video_mean
from grpo.settings.schema import Recipe
from wan_jax.diffusion.solvers import per_sample

Array = jax.Array
BEHAVIOUR = "old"  # the lagged copy that is the behaviour policy, as checkpoints name it


@dataclasses.dataclass(frozen=True)
class NFT(FlowMatching):
    """Trains on all videos, weighted by `optimality`, at the rollout's noise levels.

    The behaviour policy samples the videos. At the end of an epoch, after n updates in all, it
    becomes d behaviour + (1 - d) policy with d = min(old_rate n, old_most).

    Attributes:
        beta: train.nft_beta.
        advantage_clip: the advantage at which `optimality` is 1. It also scales the loss, as
            published.
        old_rate, old_most: see above.
        measures_distance: whether mean((v - v_behaviour)^2) is computed and logged, with
            train.max_velocity_distance. The compiled function then rounds differently.
    """

    beta: float = 0.1
    advantage_clip: float = 5.0
    old_rate: float = 1e-3
    old_most: float = 0.5
    measures_distance: bool = False

    name = "nft"
    default_kl_weight = 1e-4
    reads = (
        *FlowMatching.reads,
        "train.kl_weight",
        "train.kl_gate",
        "train.nft_beta",
        "train.old_rate",
        "train.old_most",
        "train.max_velocity_distance",
    )
    distances = ("old_distance", "kl")
    on_advantages = True
    rollout_levels = True

    @property
    def logs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("old_distance",) if self.measures_distance else ()

    @property
    def lagged(self) -> tuple[str, ...]:
        return (BEHAVIOUR,)

    @property
    def sampler(self) -> str | None:
        return BEHAVIOUR

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "beta", "advantage_clip")
        if not (0 <= self.old_rate and 0 <= self.old_most < 1):
            raise ValueError(
                f"train.old_rate={self.old_rate}, train.old_most={self.old_most}: need 0 <= "
                "old_rate and 0 <= old_most < 1; 0.001 and 0.5 are usual, and at 1 the behaviour "
                "policy would never change"
            )

    @classmethod
    def settings(cls, recipe: Recipe) -> dict:
        train = recipe.train
        return {
            "beta": train.nft_beta,
            "advantage_clip": train.advantage_clip,
            "old_rate": train.old_rate,
            "old_most": train.old_most,
            "measures_distance": train.max_velocity_distance < math.inf,
        }

    def share_kept(self, update: int, last: bool) -> dict[str, float]:
        return {BEHAVIOUR: float(min(self.old_rate * update, self.old_most)) if last else 1.0}

    def select(self, credit: Credit, group_size: int) -> Selection:
        weight = optimality(credit.advantages, self.advantage_clip)
        return Selection(np.arange(len(weight)), None, weight, credit.spread)

    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        v_behaviour = rows.v_lagged[BEHAVIOUR]
        optimality, cells = rows.weight, rows.cells
        loss = nft_loss(
            rows.x, rows.x0, rows.sigma, rows.v, v_behaviour, optimality, self.beta, cells=cells
        )
        return self.advantage_clip * loss, {"old_distance": mean_square(rows.v - v_behaviour)}


def optimality(advantages: np.ndarray, clip: float) -> np.ndarray:
    """Return r = clip(A / clip, -1, 1) / 2 + 1/2, float32 [N]: the probability that a video is a good
    one, from the advantages A [N].
    """
    return (np.clip(advantages / clip, -1.0, 1.0) / 2 + 0.5).astype(np.float32)


def nft_loss(
    x: Array,
    x0: Array,
    sigma: Array,
    v: Array,
    v_old: Array,
    optimality: Array,
    beta: float,
    *,
    cells: Array | None = None,
) -> Array:
    """Return the loss of DiffusionNFT (arXiv 2509.16117) with its adaptive weighting, [B]:

        r l(v+) / beta + (1 - r) l(v-) / beta    with r the optimality,
        v+ = (1 - beta) v_old + beta v,          v- = (1 + beta) v_old - beta v,
        l(v) = mean((x - s v - x0)^2) / w,       w = max(mean |x - s v - x0|, 1e-5) without gradient.

    x, x0, v and v_old (the behaviour policy's velocity) are [B, ...]; sigma and optimality are [B].
    cells: weights of the values in both means, as in `video_mean`.
    At v = v_old the gradient is that of (2 r - 1) l(v), so that a video with r = 1/2 does not
    change the policy.
    """
    s = per_sample(sigma, x)

    def error(v):
        """Return l(v), from the error of the predicted clean sample."""
        difference = x - s * v - x0
        size = video_mean(jnp.abs(difference), cells)
        return mean_square(difference, cells) / jax.lax.stop_gradient(jnp.maximum(size, 1e-5))

    positive = (1 - beta) * v_old + beta * v
    negative = (1 + beta) * v_old - beta * v
    return (optimality * error(positive) + (1 - optimality) * error(negative)) / beta


METHOD = NFT
