"""Flow-DPO (Liu et al., arXiv 2501.13918): the best video of each group is preferred to the worst.

With data.only it trains on given pairs instead, as Diffusion-DPO does (Wallace et al., arXiv
2311.12908), with the same loss.
"""

import dataclasses

import jax
import numpy as np

from grpo.credit import Credit
from grpo.data.labels import PAIRS
from grpo.learning.flow_matching import FlowMatching, check_range
from grpo.learning.selection import Selection, best_and_worst
from grpo.learning.velocity_loss import Rows, mean_square
from grpo.settings.schema import Recipe

Array = jax.Array
REFERENCE = "old"  # the lagged copy that is the reference, as checkpoints name it


@dataclasses.dataclass(frozen=True)
class DPO(FlowMatching):
    """Trains on pairs with a preference loss. The reference is the base model, or a copy of the
    policy that is renewed every `reference_every` updates (online DPO).

    Attributes:
        beta: train.dpo_beta.
        reference_every: 0: the reference is the base model.
    """

    beta: float = 100.0
    reference_every: int = 0

    name = "dpo"
    reads = (
        *FlowMatching.reads,
        "train.dpo_beta",
        "train.reference_every",
        "train.max_velocity_distance",
    )
    distances = ("kl",)  # to the base model; with reference_every none is measured
    pairs = True
    one_per_group = True
    of_data = PAIRS
    logs = ("preferred",)  # share of the pairs with a negative margin

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "beta")
        check_range(self, "reference_every", least=0)

    @classmethod
    def settings(cls, recipe: Recipe) -> dict:
        train = recipe.train
        # the reference is part of the loss, so there is no further KL
        return {
            "beta": train.dpo_beta,
            "reference_every": train.reference_every,
            "kl_weight": 0.0,
        }

    @property
    def lagged(self) -> tuple[str, ...]:
        return (REFERENCE,) if self.reference_every else ()

    @property
    def needs_reference(self) -> bool:
        return not self.reference_every

    def share_kept(self, update: int, last: bool) -> dict[str, float]:
        every = self.reference_every
        return {REFERENCE: 1.0 if update % every else 0.0} if every else {}

    def select(self, credit: Credit, group_size: int) -> Selection:
        best, worst, differ = best_and_worst(credit.value, credit.spread, group_size)
        return Selection(best, worst, np.ones(len(best), np.float32), differ)

    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        reference = rows.v_lagged[REFERENCE] if self.reference_every else rows.v_reference
        assert reference is not None, "needs_reference"
        excess = rows.error - mean_square(reference - rows.target, rows.cells)
        margin = excess[::2] - excess[1::2]
        return dpo_loss(margin, self.beta), {"preferred": margin < 0}


def dpo_loss(margin: Array, beta: float) -> Array:
    """Return -log sigmoid(-beta / 2 margin), [B] (Flow-DPO, arXiv 2501.13918, with a constant beta).

    margin [B]: the policy's error minus the reference's on the better video, minus the same on the
    worse one.
    """
    return -jax.nn.log_sigmoid(-0.5 * beta * margin)


METHOD = DPO
