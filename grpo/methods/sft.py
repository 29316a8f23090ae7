"""Supervised fine-tuning: flow matching on the best video of each group, or with data.only on data
(`grpo.learning.data_loss`).
"""

import dataclasses

import jax
import numpy as np

from grpo.credit import Credit
from grpo.data.labels import ITEMS
from grpo.learning.flow_matching import FlowMatching
from grpo.learning.selection import Selection, best_and_worst
from grpo.learning.velocity_loss import Rows, flow_error

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SFT(FlowMatching):
    """Trains on the best video of each group. Groups in which all valid rewards are equal are left
    out.
    """

    name = "sft"
    reads = (*FlowMatching.reads, "train.kl_weight", "train.kl_gate")
    one_per_group = True
    of_data = ITEMS

    def select(self, credit: Credit, group_size: int) -> Selection:
        best, _, differ = best_and_worst(credit.value, credit.spread, group_size)
        return Selection(best, None, np.ones(len(best), np.float32), differ)

    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        return flow_error(rows), {}


METHOD = SFT
