"""DGPO (Luo et al., arXiv 2510.08425): DPO between the better and the worse videos of whole groups.

With the flow-matching error d = mean((v - (e - x0))^2), the reference's error d_ref, and the advantage
A of each video, the loss of a group of G videos at one noise and one noise level is

    mean over the group of W A d,    W = sigmoid(beta / G sum over the group of A (d - d_ref))

with W without gradient: the gradient of -log sigmoid(-beta / G sum A (d - d_ref)) divided by beta,
where the advantages of a group add up to 0. W falls once the better videos have a smaller error than
under the reference and the worse ones a larger one.

By reading, the authors' code (`compute_group_dgpo_loss_allreduce` in scripts/train_sd3_dgpo.py of
Luo-Yihong/DGPO) agrees: the sign, W and what has no gradient are as here, a group shares its noise
and level, and the levels are those of the rollout's first steps, there 5 or 7 of 10. The clip is also
from that code, and not in the paper: d of a video has no gradient once exp(d_old - d) has moved by
more than `clip` in the direction of A. "old" is a copy of the weights that follows the policy in every
update. There it also samples after some hundred updates; here the policy always samples.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.finished_batch import FinishedBatch, Levels
from grpo.learning.flow_matching import FlowMatching
from grpo.learning.selection import Selection
from grpo.learning.velocity_loss import Rows, mean_square
from grpo.settings.schema import Recipe
from wan_jax.errors import UserError

Array = jax.Array
FOLLOWER = "old"  # the lagged copy that the clip compares with


@dataclasses.dataclass(frozen=True)
class DGPO(FlowMatching):
    """Trains on all videos, in micro-batches of whole groups. The reference is the base model. The copy
    of the clip keeps min(0.001 n, 0.3) of itself in update n, as in the authors' code.

    Attributes:
        beta: train.dgpo_beta.
        clip: train.dgpo_clip; inf: no clip, and no copy.
    """

    beta: float = 100.0
    clip: float = 1e-3

    name = "dgpo"
    default_kl_weight = 1e-3
    reads = (
        *FlowMatching.reads,
        "train.kl_weight",
        "train.kl_gate",
        "train.dgpo_beta",
        "train.dgpo_clip",
    )
    on_advantages = True
    has_ratio = True
    rollout_levels = True
    levels_part = 0.6
    logs = ("group_weight", "clip_fraction")

    @classmethod
    def settings(cls, recipe: Recipe) -> dict:
        return {"beta": recipe.train.dgpo_beta, "clip": recipe.train.dgpo_clip}

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """Also check that no group is divided between updates or micro-batches."""
        super().check(recipe)
        sample, updates = recipe.sample, recipe.train.updates_per_epoch
        size, batch = sample.group_size, sample.batch_size
        videos = sample.groups * size // updates
        if sample.groups % updates:
            raise UserError(
                f"config.train.updates_per_epoch={updates} does not divide "
                f"sample.groups={sample.groups}: train.method={cls.name} trains on whole groups"
            )
        if videos > batch and (batch % size or videos % batch):
            raise UserError(
                f"config.sample.batch_size={batch} would divide a group of "
                f"sample.group_size={size}: train.method={cls.name} weights whole groups; choose a "
                f"multiple of {size} that divides the {videos} videos of an update, or sample smaller "
                "groups"
            )

    # ---- weights -----------------------------------------------------------------------------
    @property
    def lagged(self) -> tuple[str, ...]:
        return (FOLLOWER,) if self.clip < float("inf") else ()

    def share_kept(self, update: int, last: bool) -> dict[str, float]:
        return dict.fromkeys(self.lagged, min(1e-3 * update, 0.3))

    @property
    def needs_reference(self) -> bool:
        return True

    # ---- an epoch's updates ------------------------------------------------------------------
    def select(self, credit, group_size: int) -> Selection:
        weight = credit.advantages.astype(np.float32)
        return Selection(np.arange(len(weight)), None, weight, credit.spread)

    def noise_levels(self, spec, epoch: int, segment: int) -> Levels:
        """Return the same noise levels for all videos of a group: those drawn for its first."""
        size, levels = spec.recipe.sample.group_size, super().noise_levels(spec, epoch, segment)
        sigma, timestep = (x[::size].repeat(size, 0) for x in (levels.sigma, levels.timestep))
        return Levels(sigma, timestep, levels.draw)

    def batches(
        self, spec, epoch: int, segment: int, rollout, credit, update: int
    ) -> Iterator[tuple[np.ndarray, FinishedBatch, dict[str, float]]]:
        """Yield the batches, in which `video` is the number of the group: its noise is shared."""
        size = spec.recipe.sample.group_size
        for videos, batch, kept in super().batches(spec, epoch, segment, rollout, credit, update):
            yield videos, dataclasses.replace(batch, video=batch.video // size), kept

    # ---- the loss ----------------------------------------------------------------------------
    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        assert rows.v_reference is not None and rows.video is not None and rows.valid is not None
        error, clipped = rows.error, jnp.zeros(rows.error.shape, bool)
        for copy in self.lagged:
            ratio = jnp.exp(mean_square(rows.v_lagged[copy] - rows.target, rows.cells) - error)
            moved = jnp.where(rows.weight > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
            clipped = moved & (rows.weight != 0)
            error = jnp.where(clipped, jax.lax.stop_gradient(error), error)
        excess = rows.error - mean_square(rows.v_reference - rows.target, rows.cells)
        weight = group_weight(rows.weight, excess, rows.video, rows.valid, self.beta)
        return weight * rows.weight * error, {"group_weight": weight, "clip_fraction": clipped}


def group_weight(
    advantages: Array, excess: Array, group: Array, valid: Array, beta: float
) -> Array:
    """Return W of DGPO for each row, [B] fp32, without gradient; 1/2 where a group has no valid row.

    advantages A and excess d - d_ref: [B] fp32. group: int32 [B], the number of each row's group,
    all of whose valid rows are here. valid: bool [B], rows that count. beta: see the module.
    """
    members = (group[:, None] == group[None, :]) & valid[None, :]  # [B, B]
    terms = jnp.where(members, (advantages * excess)[None, :], 0.0)
    mean = terms.sum(1) / jnp.maximum(members.sum(1), 1)
    return jax.lax.stop_gradient(jax.nn.sigmoid(beta * mean))


METHOD = DGPO
