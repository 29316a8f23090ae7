"""Flow-GRPO (Liu et al., arXiv 2505.05470) and its variants: policy gradients of stochastic steps.

A row of the update is one stochastic step of one video: the policy is the Gaussian of
`wan_jax.diffusion.sde`, its action is the latent that was drawn. A micro-batch is a rollout batch:
the same forward on the same batch layout as when its samples were drawn, so the first update's ratio
is 1 to float precision. Videos that failed to score are masked, never removed.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo.advantages import step_advantages
from grpo.credit import Credit, advantage_options
from grpo.learning.kl import AdaptiveKL
from grpo.learning.method import Method, kl_weight
from grpo.learning.optimiser import Held
from grpo.learning.policy import Flat, Policy
from grpo.learning.policy_loss import LossConfig, LossMetrics, Rows, policy_gradient_terms
from grpo.rollout import StepTable, Trajectory
from grpo.sde_windows import ONE_PER_GROUP
from wan_jax.diffusion.experts import guidances
from wan_jax.diffusion.guidance import velocity
from wan_jax.errors import UserError

AVERAGE = "old"  # the average that the KL is to with train.kl_reference=average
# |ratio - 1| on policy where train.ratio_tolerance is None. In bfloat16 the two programs may round
# in other places: 1e-7 to 6e-6 seen on an H200 at full size, 6e-4 where XLA had merged products. A
# wrong step or text is far above.
RATIO_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-3}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """M micro-batches of one optimiser step."""

    # its arrays with a leading axis M (text embeddings [M, B, St, text_dim], negative [M, ...])
    trajectory: Trajectory
    advantages: jax.Array  # [M, B] fp32, or [M, K, B]: each step's own
    valid: jax.Array  # [M, B] bool: False leaves a sample out of the mean


@dataclasses.dataclass(frozen=True)
class GRPO(Method):
    """Flow-GRPO: see `LossConfig` for the objectives."""

    policy_loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    kl_in_reward: float = 0.0  # what the KL of a step takes off its reward, a multiple of it
    importance: bool = False  # train.credit=otca: each step counts by what it brought the video
    ratio_tolerance: float = 1e-4

    name = "grpo"
    default_kl_weight = 0.004
    keeps_steps = True
    on_advantages = True
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
    )
    reads = (
        "sample.sde_steps",
        "sample.sde_range",
        "sample.sde_window_epochs",
        "sample.noise_level",
        "sample.max_step_std",
        "train.clip_low",
        "train.clip_high",
        "train.divergence",
        "train.kl_weight",
        "train.kl_kind",
        "train.kl_horizon",
        "train.kl_weight_range",
        "train.kl_reference_decay",
        "train.cfg_distill_guidance",
        "train.cfg_distill_guidance_2",
        "train.ratio_tolerance",
    )

    @classmethod
    def check(cls, recipe) -> None:
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
    def from_recipe(cls, recipe) -> "GRPO":
        train, weight = recipe.train, kl_weight(cls, recipe)
        in_reward, averaged = train.kl_as == "reward", train.kl_reference == "average"
        tolerance = train.ratio_tolerance
        return cls(
            policy_loss=LossConfig(
                clip_low=train.clip_low,
                clip_high=train.clip_high,
                kl_beta=0.0 if in_reward else weight,
                kl_kind=train.kl_kind,
                objective=train.objective,
                divergence=train.divergence,
                kl_target=train.kl_target,
                kl_horizon=train.kl_horizon,
                kl_range=tuple(train.kl_weight_range),
                distill_weight=train.cfg_distill_weight,
                reference_decay=train.kl_reference_decay if averaged else None,
            ),
            kl_in_reward=weight if in_reward else 0.0,
            importance=train.credit == "otca",
            ratio_tolerance=RATIO_TOLERANCE[recipe.model.dtype] if tolerance is None else tolerance,
        )

    # ---- weights -----------------------------------------------------------------------------
    @property
    def lagged(self) -> tuple[str, ...]:
        return () if self.policy_loss.reference_decay is None else (AVERAGE,)

    def share_kept(self, update: int, last: bool) -> dict[str, float]:
        return dict.fromkeys(self.lagged, self.policy_loss.reference_decay)

    @property
    def needs_reference(self) -> bool:
        loss = self.policy_loss
        base = loss.kl_beta > 0 and not self.lagged
        return base or loss.distill_weight > 0 or self.kl_in_reward > 0

    @property
    def adaptive_kl(self) -> AdaptiveKL | None:
        return self.policy_loss.adaptive_kl

    # ---- the rollout -------------------------------------------------------------------------
    @property
    def keeps_mean(self) -> bool:
        return self.policy_loss.needs_old_mean

    @property
    def keeps_latents(self) -> bool:
        return self.importance

    @property
    def sampling_kl(self) -> str | None:
        return self.policy_loss.kl_kind if self.kl_in_reward else None

    # ---- the update --------------------------------------------------------------------------
    @property
    def passes(self) -> int:
        """A teacher has guidance, for two; so is the reference that is run while sampling."""
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
        """key: (guidance of the policy's velocity, LossConfig)."""
        return make_gradient(policy, table, *key)

    # ---- abstract arrays ---------------------------------------------------------------------
    def batch_shapes(self, functions, expert: int) -> PolicyBatch:
        spec = functions.spec
        m, b = spec.update_batches(expert).shape[1], spec.recipe.sample.batch_size
        by_step = self.kl_in_reward > 0 or self.importance
        steps = (spec.trained_steps(expert),) if by_step else ()
        return PolicyBatch(
            trajectory=functions.trajectory(expert, m),
            advantages=jax.ShapeDtypeStruct((m, *steps, b), jnp.float32),
            valid=jax.ShapeDtypeStruct((m, b), bool),
        )

    def epoch_shapes(self, functions) -> tuple:
        spec, batches = functions.spec, functions.spec.settings.batches
        finished = (functions.latents(),) * batches if self.importance else ()
        kept = [functions.trajectory(i) for i in spec.trained_experts for _ in range(batches)]
        return (*kept, *finished)

    def step_shapes(self, functions) -> list:
        """What the batch under way keeps of its steps before they are stacked; the host dispatches
        one batch ahead, so it may be there while another is decoded.
        """
        spec = functions.spec
        most = max(map(spec.trained_steps, range(len(spec.preset.experts))))
        return [functions.latents()] * most * (3 if self.keeps_mean else 2)

    def rollout_passes(self, spec, expert: int) -> float:
        return spec.update_batches(expert).size

    # ---- an epoch's updates ------------------------------------------------------------------
    def batches(
        self, spec, epoch: int, segment: int, rollout, credit: Credit, update: int
    ) -> Iterator[tuple[np.ndarray, PolicyBatch, dict[str, float]]]:
        """An update whose videos are all from groups without spread is left out, though its KL
        would have a gradient.
        """
        settings, expert = spec.settings, spec.segments[segment].expert
        name, numbers = spec.preset.experts[expert], np.arange(settings.videos)
        in_segment = np.isin(numbers, spec.windows.videos(segment))
        advantages = credit.advantages
        if self.kl_in_reward:
            advantages = step_advantages(
                credit.total,
                rollout.kl[name],
                self.kl_in_reward,
                rollout.prompt_of,
                in_segment & credit.valid,
                **advantage_options(spec.recipe),
            )
        if self.importance:
            advantages = advantages * rollout.importance[name]
        batches = settings.batches
        # [batches, (K,) B]
        advantages = np.moveaxis(advantages.reshape(*advantages.shape[:-1], batches, -1), -2, 0)
        counted = (in_segment & credit.counted).reshape(batches, -1)
        spread, numbers = credit.spread.reshape(batches, -1), numbers.reshape(batches, -1)
        trajectories = rollout.trajectories[name]
        for chosen in credit.order[spec.update_batches(expert)]:
            if (counted & spread)[chosen].any():
                update += 1
                batch = stack_batches(
                    [trajectories[b] for b in chosen], advantages[chosen], counted[chosen]
                )
                yield numbers[chosen][counted[chosen]], batch, self.share_kept(update, False)

    def check_first(self, values: dict[str, float], epoch: int) -> dict[str, float]:
        error = max(values["ratio_max"] - 1, 1 - values["ratio_min"])
        if error > self.ratio_tolerance:
            raise UserError(
                f"epoch {epoch}: the first update's ratio differs from 1 by {error:.2e}, more than "
                f"train.ratio_tolerance={self.ratio_tolerance:g}: rollout and update disagree, "
                "gradients would be wrong"
            )
        return {"ratio_max_error": error}

    def log_sampled(self, rollout, expert: str, videos: range) -> dict[str, float]:
        if not self.kl_in_reward:
            return {}
        return {"kl": float(np.nanmean(rollout.kl[expert][:, list(videos)]))}

    def warning(self, record: dict) -> str | None:
        """Where rounding alone moves the ratio as far as the clip range."""
        loss, error = self.policy_loss, record.get("ratio_max_error", 0.0)
        clip = min(loss.clip_low, loss.clip_high)
        if loss.objective == "dppo" or error < clip:
            return None
        return (
            f"warning: the first update's ratio differs from 1 by {error:.1e}, the clip range is "
            f"{clip:g}: rounding alone is clipped, and learning is slower for it. Raise "
            "--config.train.clip_low and clip_high, or set --config.model.dtype=float32"
        )


METHOD = GRPO


# ---- checks of a recipe --------------------------------------------------------------------------
def check_steps(recipe) -> None:
    """Raise `UserError` where the stochastic steps do not fit in the schedule, or are too few."""
    sample = recipe.sample
    low, high = sample.sde_range
    if not (0 <= low < high <= sample.steps and 1 <= sample.sde_steps <= high - low):
        raise UserError(
            f"config.sample: sde_steps={sample.sde_steps} steps do not fit in "
            f"sde_range=({low}, {high}) of {sample.steps} steps"
        )
    if sample.sde_window == ONE_PER_GROUP and sample.sde_steps != 1:
        raise UserError(
            f"config.sample.sde_steps={sample.sde_steps} must be 1 with "
            f"sample.sde_window={ONE_PER_GROUP}"
        )
    if recipe.train.credit == "otca" and sample.sde_steps < 2:
        raise UserError(
            "config.train.credit=otca shares a video's advantage among its trained steps, and "
            f"sample.sde_steps={sample.sde_steps} leaves one: raise it, or choose another credit"
        )


def check_kl(recipe, weight: float) -> None:
    """Raise `UserError` where the place of the KL and its reference do not go with the rest."""
    train = recipe.train
    if train.kl_as != "reward":
        return
    if not (weight > 0 and train.kl_target is None and recipe.reward.combine == "rewards"):
        raise UserError(
            "config.train.kl_as=reward takes kl_weight times the KL off a fixed sum of rewards: it "
            f"needs train.kl_weight={weight} above 0, train.kl_target={train.kl_target} None and "
            f"reward.combine={recipe.reward.combine} to be rewards"
        )
    if train.kl_reference == "average":
        raise UserError(
            "config.train.kl_reference=average is of the KL in the loss: set train.kl_as=loss, or "
            "train.kl_reference=base"
        )


def check_selection(recipe) -> None:
    """Raise `UserError` where groups or videos cannot be chosen by their rewards as asked."""
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
            "groups left out would be missing at their steps; use another window, or "
            "train.groups=0"
        )


# ---- the gradient --------------------------------------------------------------------------------
def objective(
    policy: Policy,
    table: StepTable,
    guidance: float,
    config: LossConfig,
    trainable: Flat,
    frozen,
    x,
    x_next,
    old_log_prob,
    i,
    old_mean,
    text,
    advantages,
    valid,
    held: Held,
) -> tuple[jax.Array, LossMetrics]:
    """Return the sum of the loss over the valid rows of one micro-batch at step i, and its metrics.

    The KL is to the average of the trained weights where the state has one.
    """
    t, *step = table.at(i)
    shape, weight = advantages.shape, None
    if table.weight is not None:
        weight = jnp.broadcast_to(jnp.asarray(table.weight)[i], shape)
    rows = Rows(
        x,
        x_next,
        old_log_prob,
        advantages,
        *(jnp.broadcast_to(s, shape) for s in step),
        mask=valid,
        old_mean=old_mean,
        weight=weight,
        preserving=table.preserving,
    )
    v = velocity(policy.module(trainable, frozen), x, t, text, guidance)
    v_reference = teacher = None
    if config.kl_beta > 0:
        average = held.lagged.get(AVERAGE)
        model = policy.reference(frozen) if average is None else policy.module(average, frozen)
        v_reference = velocity(model, x, t, text, guidance)
    if config.distill_weight > 0:
        teacher = velocity(policy.reference(frozen), x, t, text, config.distill_guidance)
    loss, metrics = policy_gradient_terms(rows, v, v_reference, config, held.kl_weight, teacher)
    return jnp.sum(jnp.where(valid, loss, 0.0)), metrics


def make_gradient(
    policy: Policy, table: StepTable, guidance: float, config: LossConfig
) -> Callable:
    """Return (trainable, Held, frozen, PolicyBatch) -> (mean gradient of the objective over the
    valid rows, LossMetrics).
    """
    grad_fn = jax.grad(partial(objective, policy, table, guidance, config), has_aux=True)

    def gradient(trainable: Flat, held: Held, frozen, batch: PolicyBatch):
        def one_step(carry, row, text, valid):
            *row, advantages = row
            grads, metrics = grad_fn(trainable, frozen, *row, text, advantages, valid, held)
            return (jax.tree.map(jnp.add, carry[0], grads), carry[1].merge(metrics)), None

        def one_micro_batch(carry, micro):
            t, advantages, valid = micro
            advantages = jnp.broadcast_to(advantages, t.log_prob.shape)
            rows = (t.x, t.x_next, t.log_prob, t.step, t.mean, advantages)  # each [K, ...]
            body = partial(one_step, text=t.text, valid=valid)
            return jax.lax.scan(body, carry, rows)[0], None

        carry = (jax.tree.map(jnp.zeros_like, trainable), LossMetrics.zero(config))
        micro_batches = (batch.trajectory, batch.advantages, batch.valid)
        (grads, metrics), _ = jax.lax.scan(one_micro_batch, carry, micro_batches)
        return jax.tree.map(lambda g: g / jnp.maximum(metrics.count, 1.0), grads), metrics

    return gradient


def stack_batches(
    trajectories: Sequence[Trajectory], advantages: np.ndarray, valid: np.ndarray
) -> PolicyBatch:
    """Return rollout batches [K, B, ...] as one `PolicyBatch`, without the KL, which is in the
    advantages. advantages [M, B] or [M, K, B], valid [M, B].
    """
    trajectories = [dataclasses.replace(t, kl=None) for t in trajectories]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trajectories)
    return PolicyBatch(stacked, jnp.asarray(advantages, jnp.float32), jnp.asarray(valid, bool))
