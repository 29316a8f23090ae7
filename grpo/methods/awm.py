"""Advantage-weighted matching (AWM, Xue et al., arXiv 2509.25050): a policy gradient without the SDE.

The flow-matching error of a finished video stands for its log-prob: lp = -mean((v - (e - x0))^2),
at the same noise and noise level for the present and the behaviour policy. The ratio exp(lp - lp_b)
enters GRPO's clipped loss.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.flow_matching import FlowMatching
from grpo.learning.policy_loss import clipped_loss
from grpo.learning.selection import Selection
from grpo.learning.velocity_loss import Rows, mean_square

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AWM(FlowMatching):
    """Trains on all videos, at the rollout's noise levels.

    Two copies of the weights are kept: the behaviour policy, which sampled the epoch, and an
    average. The KL is mean((v - v_average)^2).

    Attributes:
        clip: range of the ratio around 1, as published.
        average_decay: share of itself that the average keeps in an update.
    """

    clip: float = 1e-5
    average_decay: float = 0.9

    name = "awm"
    default_kl_weight = 0.1
    reads = (
        *FlowMatching.reads,
        "train.kl_weight",
        "train.kl_gate",
        "train.max_velocity_distance",
    )
    on_advantages = True
    has_ratio = True
    rollout_levels = True
    logs = ("ratio_mean", "clip_fraction", "log_ratio", "old_distance")
    distances = ("old_distance", "kl")

    @property
    def lagged(self) -> tuple[str, ...]:
        return ("behaviour", "average")

    @property
    def kl_copy(self) -> str | None:
        return "average"

    def share_kept(self, update: int, last: bool) -> dict[str, float]:
        return {"behaviour": 0.0 if last else 1.0, "average": self.average_decay}

    def select(self, credit, group_size: int) -> Selection:
        weight = credit.advantages.astype(np.float32)
        return Selection(np.arange(len(weight)), None, weight, credit.spread)

    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        behaviour_error = mean_square(rows.v_lagged["behaviour"] - rows.target, rows.cells)
        log_ratio = behaviour_error - rows.error  # lp - lp_b
        loss, ratio = clipped_loss(log_ratio, rows.weight, self.clip, self.clip)
        return loss, {
            "ratio_mean": ratio,
            "clip_fraction": jnp.abs(ratio - 1) > self.clip,
            "log_ratio": jnp.abs(log_ratio),
            "old_distance": mean_square(rows.v - rows.v_lagged["behaviour"]),
        }


METHOD = AWM
