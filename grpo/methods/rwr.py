"""Flow-RWR (Liu et al., arXiv 2501.13918): flow matching on all videos, weighted by their rewards."""

import dataclasses

import jax
import numpy as np

from grpo.credit import Credit
from grpo.learning.flow_matching import FlowMatching, check_range
from grpo.learning.selection import Selection
from grpo.learning.velocity_loss import Rows
from grpo.settings.schema import Recipe

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RWR(FlowMatching):
    """Trains on all videos, weighted by exp(reward / temperature) relative to their group
    (`regression_weights`).
    """

    temperature: float = 1.0

    name = "rwr"
    reads = (*FlowMatching.reads, "train.kl_weight", "train.kl_gate", "train.temperature")

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "temperature")

    @classmethod
    def settings(cls, recipe: Recipe) -> dict:
        return {"temperature": recipe.train.temperature}

    def select(self, credit: Credit, group_size: int) -> Selection:
        weight = regression_weights(credit.value, credit.spread, group_size, self.temperature)
        return Selection(np.arange(len(weight)), None, weight, credit.spread)

    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        return rows.weight * rows.error, {}


def regression_weights(
    rewards: np.ndarray, valid: np.ndarray, size: int, temperature: float
) -> np.ndarray:
    """Return exp(r / temperature) divided by its mean in the group, [N] float32; 0 where not valid.

    rewards r [N], valid [N] bool: of groups of `size` videos, one after the other.

    Flow-RWR (arXiv 2501.13918) weights by exp(r), the solution exp(r / beta) / Z(prompt) of its
    KL-regularised objective without Z. The group's mean is an estimate of Z, with which the rate of
    learning does not depend on the level of the rewards. Weighting by the plain reward, as some
    code does, is another method.
    """
    masked = np.where(valid, rewards, -np.inf).reshape(-1, size).astype(np.float64)  # [G, size]
    highest = masked.max(axis=1, keepdims=True)
    weights = np.exp((masked - np.where(np.isfinite(highest), highest, 0.0)) / temperature)
    count = np.maximum(np.isfinite(masked).sum(axis=1, keepdims=True), 1)
    total = weights.sum(axis=1, keepdims=True)
    return (weights * count / np.where(total > 0, total, 1.0)).reshape(-1).astype(np.float32)


METHOD = RWR
