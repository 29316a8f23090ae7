"""Flow-GRPO (Liu et al., arXiv 2505.05470) and its variants: policy gradients of stochastic steps.

A row of the update is one stochastic step of one video. The policy is the Gaussian of
`wan_jax.diffusion.sde`, its action is the latent that was drawn. A micro-batch is a rollout batch:
the update computes the same forward pass on the same batch layout as the rollout, so in the first
update the importance ratio is 1 up to rounding. Videos that failed to score are masked, never
removed.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from grpo.credit import Credit, advantage_options
from grpo.learning import abstract
from grpo.learning.kl import AdaptiveKL
from grpo.learning.method import Method, kl_weight, largest_kl_weight
from grpo.learning.policy import Policy
from grpo.learning.policy_gradient import AVERAGE, PolicyBatch, make_gradient, stack_batches
from grpo.learning.policy_loss import LossConfig
from grpo.learning.sde_windows import check_steps
from grpo.learning.step_table import StepTable
from grpo.scoring.advantages import step_advantages
from grpo.settings.choices import ONE_PER_GROUP
from grpo.settings.schema import Recipe
from wan_jax.diffusion.experts import guidances
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.errors import UserError
from wan_jax.models import precision

if TYPE_CHECKING:
    from grpo.compiled.run_arrays import RunArrays

# Bounds of the deviation of the importance ratio from 1 in the first update, where
# train.ratio_tolerance is None: with exact products, and with those of bfloat16 or TF32, which rollout
# and update may round differently. On an H200 1e-7 to 6e-6 was measured at full size in bfloat16, 6e-4
# where XLA had merged products, and 1.1e-4 on tiny-wan in TF32. A wrong step or text gives far more.
EXACT_RATIO, ROUNDED_RATIO = 1e-4, 2e-3


@dataclasses.dataclass(frozen=True)
class GRPO(Method):
    """Flow-GRPO and its variants.

    Attributes:
        policy_loss: the loss, with its objectives.
        kl_in_reward: weight of the KL that is subtracted from the reward of each step; 0: the KL is
            part of the loss.
        step_importance: whether each step is weighted by the progress of the video in it
            (train.credit=otca).
        drop_zero_advantages: whether videos whose advantages are all 0 do not count.
        ratio_tolerance: train.ratio_tolerance.
        dtype: of the model's weights and products.
        by_cell: whether log-probs are weighted by cell (train.box_credit).
    """

    policy_loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    kl_in_reward: float = 0.0
    step_importance: bool = False
    drop_zero_advantages: bool = False
    ratio_tolerance: float | None = None
    dtype: str = "float32"
    by_cell: bool = False

    name = "grpo"
    default_kl_weight = 0.004
    keeps_steps = True
    on_advantages = True
    has_ratio = True
    variants = (
        "sample.sde",
        "sample.sde_window",
        "train.groups",
        "train.best_of",
        "train.objective",
        "train.credit",
        "train.kl_as",
        "train.kl_target",
        "train.kl_reference",
        "train.cfg_distill_weight",
        "train.advantage_exp",
        "data.noise",
    )
    reads = (
        "sample.sde_steps",
        "sample.sde_range",
        "sample.sde_window_epochs",
        "sample.noise_level",
        "sample.max_step_std",
        "sample.untrained_noise",
        "train.clip_low",
        "train.clip_high",
        "train.divergence",
        "train.kl_weight",
        "train.kl_kind",
        "train.kl_gate",
        "train.kl_horizon",
        "train.kl_weight_range",
        "train.kl_reference_decay",
        "train.cfg_distill_guidance",
        "train.cfg_distill_guidance_2",
        "train.zero_advantages",
        "train.ratio_tolerance",
    )

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        check_steps(recipe)
        check_selection(recipe)
        check_kl(recipe, kl_weight(cls, recipe))
        guidance, train = recipe.sample.guidance, recipe.train
        if train.cfg_distill_weight and not guidance <= 1 < train.cfg_distill_guidance:
            raise UserError(
                f"config.train.cfg_distill_weight={train.cfg_distill_weight} trains the model "
                "without guidance to follow the guided one: set "
                f"sample.guidance={guidance} to 1 and "
                f"train.cfg_distill_guidance={train.cfg_distill_guidance} above 1"
            )

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "GRPO":
        train, weight = recipe.train, largest_kl_weight(cls, recipe)
        in_reward = train.kl_as == "reward"
        averaged = train.kl_reference == "average"
        return cls(
            policy_loss=LossConfig(
                clip_low=train.clip_low,
                clip_high=train.clip_high,
                kl_beta=0.0 if in_reward else weight,
                kl_kind=train.kl_kind,
                kl_weighted=train.credit != "noise_over_step",
                objective=train.objective,
                divergence=train.divergence,
                kl_target=train.kl_target,
                kl_horizon=train.kl_horizon,
                kl_range=train.kl_weight_range,
                distill_weight=train.cfg_distill_weight,
                reference_decay=train.kl_reference_decay if averaged else None,
                kl_outside=train.box_kl,
            ),
            kl_in_reward=weight if in_reward else 0.0,
            step_importance=train.credit == "otca",
            drop_zero_advantages=train.zero_advantages == "drop",
            ratio_tolerance=train.ratio_tolerance,
            dtype=recipe.model.dtype,
            by_cell=train.box_credit > 0,
        )

    @property
    def ratio_bound(self) -> float:
        """The bound of the deviation of the importance ratio from 1 in the first update."""
        if self.ratio_tolerance is not None:
            return self.ratio_tolerance
        exact = self.dtype == "float32" and precision.is_exact()
        return EXACT_RATIO if exact else ROUNDED_RATIO

    # ---- weights -----------------------------------------------------------------------------
    @property
    def lagged(self) -> tuple[str, ...]:
        return () if self.policy_loss.reference_decay is None else (AVERAGE,)

    def share_kept(self, update: int, last: bool) -> dict[str, float]:
        decay = self.policy_loss.reference_decay
        return {} if decay is None else {AVERAGE: decay}

    @property
    def needs_reference(self) -> bool:
        loss = self.policy_loss
        base = loss.kl_beta > 0 and not self.lagged
        return base or loss.distill_weight > 0 or self.kl_in_reward > 0

    @property
    def adaptive_kl(self) -> AdaptiveKL | None:
        return self.policy_loss.make_adaptive_kl()

    # ---- the rollout -------------------------------------------------------------------------
    @property
    def keeps_mean(self) -> bool:
        return self.policy_loss.needs_old_mean or self.by_cell

    @property
    def keeps_latents(self) -> bool:
        return self.importance

    @property
    def importance(self) -> bool:
        return self.step_importance

    @property
    def sampling_kl(self) -> str | None:
        return self.policy_loss.kl_kind if self.kl_in_reward else None

    # ---- the update --------------------------------------------------------------------------
    @property
    def passes(self) -> int:
        """The cost of one row. The teacher has guidance, which makes two forward passes."""
        loss = self.policy_loss
        with_kl = loss.kl_beta > 0 or self.kl_in_reward > 0
        return 3 + with_kl + 2 * (loss.distill_weight > 0)

    def gradient_keys(self, spec) -> tuple[tuple[float, LossConfig], ...]:
        train, experts = spec.recipe.train, len(spec.preset.experts)
        teachers = guidances(train.cfg_distill_guidance, train.cfg_distill_guidance_2, experts)
        distilled = self.policy_loss.distill_weight > 0
        losses = [
            dataclasses.replace(self.policy_loss, distill_guidance=guidance if distilled else 1.0)
            for guidance in teachers
        ]
        return tuple(zip(spec.sampling_guidance, losses))

    def make_gradient(self, policy: Policy, table: StepTable, key: Any) -> Callable:
        """Return the gradient. key: (guidance of the policy's velocity, LossConfig)."""
        return make_gradient(policy, table, *key)

    # ---- abstract arrays ---------------------------------------------------------------------
    def batch_shapes(self, arrays: "RunArrays", expert: int) -> PolicyBatch:
        spec = arrays.spec
        m, b = spec.update_batches(expert).shape[1], spec.recipe.sample.batch_size
        by_step = self.kl_in_reward > 0 or self.importance
        steps = (spec.trained_steps(expert),) if by_step else ()
        k = spec.trained_steps(expert)
        by_video = arrays.step_per_video
        return PolicyBatch(
            latents=arrays.latents(m, spec.kept_latents(expert)),
            log_prob=arrays.rows(jnp.float32, m, k),
            step=arrays.rows(jnp.int32, m, k) if by_video else abstract.array((m, k), jnp.int32),
            mean=arrays.latents(m, k) if self.keeps_mean else None,
            text=arrays.text(m),
            advantages=abstract.array((m, *steps, b), jnp.float32),
            valid=abstract.array((m, b), bool),
            cells=arrays.rows(jnp.float32, m, shape=(*spec.shape[:-1], 1))
            if self.by_cell
            else None,
            kl_gate=None
            if spec.recipe.train.kl_gate is None
            else abstract.array((m, b), jnp.float32),
        )

    def epoch_shapes(self, arrays: "RunArrays") -> tuple:
        spec, batches = arrays.spec, arrays.spec.settings.batches
        final = batches if self.importance else 0
        kept = sum(self._kept(spec, expert) for expert in spec.trained_experts)
        return (arrays.latents(),) * (batches * kept + final)

    def waiting_shapes(self, arrays: "RunArrays", expert: int) -> tuple:
        stacked = arrays.spec.update_batches(expert).shape[1] * self._kept(arrays.spec, expert)
        return arrays.trajectories[stacked:]

    def _kept(self, spec, expert: int) -> int:
        """Return the number of arrays of latents that an expert's trajectory keeps."""
        return spec.kept_latents(expert) + self.keeps_mean * spec.trained_steps(expert)

    def rollout_passes(self, spec, expert: int) -> float:
        return spec.update_batches(expert).size

    # ---- an epoch's updates ------------------------------------------------------------------
    def batches(
        self, spec, epoch: int, segment: int, rollout, credit: Credit, update: int
    ) -> Iterator[tuple[np.ndarray, PolicyBatch, dict[str, float]]]:
        """Yield the batches. An update in which all videos are from groups with equal rewards is
        left out, although its KL would have a gradient.
        """
        settings, expert = spec.settings, spec.segments[segment].expert
        name = spec.preset.experts[expert]
        numbers = np.arange(settings.videos)
        in_segment = np.isin(numbers, spec.windows.videos(segment))
        # advantages of videos, or of their steps
        advantages = credit.advantages
        if self.kl_in_reward:
            advantages = step_advantages(
                credit.total,
                rollout.kl[name],
                self.kl_in_reward,
                rollout.prompt_of,
                in_segment & credit.valid & ~credit.weak,
                **advantage_options(spec.recipe),
            )
        if self.importance:
            advantages = advantages * rollout.importance[name]
        counted = in_segment & credit.counted
        if self.drop_zero_advantages:
            counted &= (np.atleast_2d(advantages) != 0).any(0)
        # by rollout batch: advantages [batches, (K,) B], the others [batches, B]
        batches = settings.batches
        advantages = np.moveaxis(advantages.reshape(*advantages.shape[:-1], batches, -1), -2, 0)
        counted = counted.reshape(batches, -1)
        spread = credit.spread.reshape(batches, -1)
        numbers = numbers.reshape(batches, -1)
        # an optimiser step has the only copy of its trajectories
        trajectories = dict(enumerate(rollout.trajectories.pop(name)))
        neighbours = spec.windows.neighbours(segment)
        cells = credit.cell_weights(spec, rollout.frames)
        sharding = sharding_lib.batch_sharding(spec.mesh)
        # the rollout batches of each optimiser step
        for chosen in credit.order[spec.update_batches(expert)]:
            if (counted & spread)[chosen].any():
                update += 1
                batch = stack_batches(
                    [trajectories.pop(b) for b in chosen],
                    advantages[chosen],
                    counted[chosen],
                    neighbours,
                )
                if cells is not None:
                    rows = [sharding_lib.place(cells[numbers[b]], sharding) for b in chosen]
                    batch = dataclasses.replace(batch, cells=jnp.stack(rows))
                if credit.kl_gate is not None:
                    gate = jnp.asarray(credit.kl_gate[numbers[chosen]])
                    batch = dataclasses.replace(batch, kl_gate=gate)
                yield numbers[chosen][counted[chosen]], batch, self.share_kept(update, False)

    def check_first(self, values: dict[str, float], epoch: int) -> dict[str, float]:
        error = max(values["ratio_max"] - 1, 1 - values["ratio_min"])
        if error > self.ratio_bound:
            raise UserError(
                f"epoch {epoch}: the importance ratio deviates from 1 by {error:.2e} in the first "
                f"update, more than train.ratio_tolerance={self.ratio_bound:g}: rollout and "
                "update disagree, gradients would be wrong"
            )
        return {"ratio_max_error": error}

    def log_sampled(self, rollout, expert: str, videos: range) -> dict[str, float]:
        if not self.kl_in_reward:
            return {}
        return {"kl": float(np.nanmean(rollout.kl[expert][:, list(videos)]))}

    def warning(self, record: dict) -> str | None:
        """Return a warning where rounding alone moves the ratio out of the clip range."""
        loss, error = self.policy_loss, record.get("ratio_max_error", 0.0)
        clip = min(loss.clip_low, loss.clip_high)
        if loss.objective == "dppo" or error < clip:
            return None
        return (
            f"warning: the importance ratio deviates from 1 by {error:.1e} in the first update, and "
            f"the clip range is {clip:g}: ratios are clipped because of rounding, which slows "
            "learning. Raise --config.train.clip_low and clip_high, or set "
            "--config.model.dtype=float32"
        )


METHOD = GRPO


# ---- checks of a recipe --------------------------------------------------------------------------
def check_kl(recipe: Recipe, weight: float) -> None:
    """Raise `UserError` where train.kl_as contradicts the other settings. weight: of the KL."""
    train = recipe.train
    if train.kl_as != "reward":
        return
    if train.advantage_exp:
        raise UserError(
            "config.train.advantage_exp=True needs one advantage a video, and config.train.kl_as=reward "
            "gives one to each step: set train.kl_as=loss, or advantage_exp=False"
        )
    if not (weight > 0 and train.kl_target is None and recipe.reward.combine == "rewards"):
        raise UserError(
            "config.train.kl_as=reward subtracts kl_weight times the KL from a fixed sum of rewards: "
            f"it needs train.kl_weight={weight} above 0, train.kl_target={train.kl_target} None and "
            f"reward.combine={recipe.reward.combine} to be rewards"
        )
    if train.kl_reference == "average":
        raise UserError(
            "config.train.kl_reference=average is the reference of the KL in the loss: set "
            "train.kl_as=loss, or train.kl_reference=base"
        )


def check_selection(recipe: Recipe) -> None:
    """Raise `UserError` where train.groups or train.best_of contradict the other settings."""
    sample, groups, best_of = recipe.sample, recipe.train.groups, recipe.train.best_of
    size, batch = sample.group_size, sample.batch_size
    if 2 * best_of > size:
        raise UserError(
            f"config.train.best_of={best_of} best and as many worst are more than "
            f"sample.group_size={size}; take at most {size // 2}, or 0 for all"
        )
    if groups in (0, sample.groups):
        return
    if groups > sample.groups:
        raise UserError(
            f"config.train.groups={groups}: only sample.groups={sample.groups} are sampled"
        )
    if size % batch:
        raise UserError(
            f"config.train.groups={groups} chooses whole batches: sample.batch_size={batch} must "
            f"divide sample.group_size={size}"
        )
    if sample.sde_window == ONE_PER_GROUP:
        raise UserError(
            f"config.train.groups={groups} does not go with sample.sde_window={ONE_PER_GROUP}: the "
            "steps of the groups that are left out would not be trained; use another window, or "
            "train.groups=0"
        )
