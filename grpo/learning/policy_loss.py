"""The GRPO objective on rows, as pure functions.

A row is one denoising step of one video. The policy is the Gaussian of `wan_jax.diffusion.sde`, its
action is x_next. All inputs and results have one value or array a row, [B] or [B, ...]. A mask marks
the rows that count, so that batches have one shape.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.kl import AdaptiveKL, check_kind, kl_to_reference, outside, step_kl
from grpo.settings.choices import OBJECTIVES
from wan_jax.diffusion import sde

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The configuration of the loss; the defaults are Flow-GRPO's published settings for Wan.

    The objectives, with log-ratio d = log-prob - log-prob at rollout, advantage A (clipped before),
    standard deviation std of the step, and D = mean((mu - mu at rollout)^2) / (2 std^2):

    'clip'      GRPO's clipped ratio r = exp(d).
    'unscaled'  the same with r = exp(2 std^2 d), the density without its variance (as in the code
                of CPS, arXiv 2509.05952): the effect of a change of the mean on r does not depend
                on the step's noise.
    'guard'     GRPO-Guard (arXiv 2510.22319): r = exp(std (d + D)), which has a mean of 1, and a
                loss divided by -dt, so that the gradients of all steps have one scale. D is
                computed for each sample; the authors' code has one D for the batch. Published with
                a clip range of 2e-6 and without KL.
    'dppo'      Flow-DPPO: no clip. A row is left out where D >= divergence and its ratio has moved
                in the direction of A.

    Raises ValueError, with the name and the value, on values that cannot train.

    Attributes:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl_beta: weight of the KL; the largest one where it changes.
        kl_kind: measure of the KL (`kl.kl_to_reference`).
        kl_weighted: whether the KL of a step is multiplied by the square of the step's weight.
        objective: one of those above.
        divergence: bound of D, for 'dppo'.
        kl_target: the KL that its weight is adapted to, from kl_beta on (`kl.AdaptiveKL`); None:
            the weight is constant.
        kl_horizon, kl_range: horizon and bounds of `kl.AdaptiveKL`.
        distill_weight: weight of mean((v - v_teacher)^2), with v the policy's velocity without
            guidance. It distils guidance into the model (Meng et al., arXiv 2210.03142).
        distill_guidance: guidance of the teacher, which is the base model.
        reference_decay: the share of itself that the reference of the KL, an average of the
            trained weights, keeps in every update; None: the reference is the base model.
        kl_outside: whether the KL is that of the cells without text alone, where `Rows.cells` are
            given (train.box_kl).
    """

    clip_low: float = 1e-3
    clip_high: float = 1e-3
    kl_beta: float = 0.004
    kl_kind: str = "flow_grpo"
    kl_weighted: bool = True
    objective: str = "clip"
    divergence: float = 1e-5
    kl_target: float | None = None
    kl_horizon: float = 20.0
    kl_range: tuple[float, float] = (1e-4, 1.0)
    distill_weight: float = 0.0
    distill_guidance: float = 1.0
    reference_decay: float | None = None
    kl_outside: bool = False

    def __post_init__(self):
        if not (0 < self.clip_low <= 1 and 0 < self.clip_high):
            raise ValueError(
                f"clip_low={self.clip_low}, clip_high={self.clip_high}: need 0 < clip_low <= 1 "
                "and 0 < clip_high; usual values are 1e-5 to 1e-3, because log-probs are means"
            )
        if not 0 <= self.kl_beta < float("inf"):
            raise ValueError(
                f"kl_beta={self.kl_beta}: must be finite and >= 0; 0 switches the reference off"
            )
        check_kind(self.kl_kind)
        self.make_adaptive_kl()  # raises where the weight cannot adapt
        if not 0 <= self.distill_weight < float("inf"):
            raise ValueError(
                f"distill_weight={self.distill_weight}: must be finite and >= 0; 0 switches it off"
            )
        if self.reference_decay is not None and not (
            0 <= self.reference_decay < 1 and self.kl_beta > 0
        ):
            raise ValueError(
                f"reference_decay={self.reference_decay}, kl_beta={self.kl_beta}: an average as "
                "reference needs a decay in [0, 1), 0.99 is usual, and a weight of the KL above 0"
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective={self.objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}"
            )
        if not self.divergence > 0:
            raise ValueError(f"divergence={self.divergence}: must be > 0; 1e-5 is usual")

    def make_adaptive_kl(self) -> AdaptiveKL | None:
        """Return the rule by which the weight of the KL adapts; None: it is constant."""
        if self.kl_target is None:
            return None
        return AdaptiveKL(self.kl_beta, self.kl_target, self.kl_horizon, self.kl_range)

    @property
    def needs_old_mean(self) -> bool:
        """Whether the objective needs the means of the steps at rollout."""
        return self.objective in ("guard", "dppo")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """B denoising steps as the rollout made them, which may be of different videos and different
    steps of the schedule.

    Attributes:
        x: [B, ...] fp32, the latents before the step.
        x_next: [B, ...] fp32, the latents that were drawn.
        old_log_prob: [B] fp32, of x_next at rollout.
        advantages: [B] fp32.
        sigma, sigma_next: [B] fp32, noise levels before and after the step.
        g: [B] fp32, `sde.diffusion_coefficient` of the step; above 0 where mask is True.
        mask: [B] bool, rows that count.
        old_mean: [B, ...] fp32, the mean of the step at rollout, where the objective needs it.
        weight: [B] fp32, weight of the step. The policy loss is multiplied by it, the KL by its
            square (`LossConfig.kl_weighted`). None: 1.
        cells: fp32, broadcasts against x: weights of the values of each video, with a mean of 1.
            Log-probs and D of `LossConfig` are then means with these weights, and the log-prob at
            rollout follows from old_mean, which is needed. The KL to the reference has no such
            weights, but see `LossConfig.kl_outside`. None: all are 1.
        kl_gate: [B] fp32, weight of the KL to the reference of each row (train.kl_gate). None: 1.
        preserving: whether the mean of the step is that of CPS.
        index: int32 [B], number of the step in the schedule, for the metrics by step; None: without.
        steps: T, the number of steps of the schedule.
    """

    x: Array
    x_next: Array
    old_log_prob: Array
    advantages: Array
    sigma: Array
    sigma_next: Array
    g: Array
    mask: Array
    old_mean: Array | None = None
    weight: Array | None = None
    cells: Array | None = None
    kl_gate: Array | None = None
    preserving: bool = dataclasses.field(default=False, metadata={"static": True})
    index: Array | None = None
    steps: int = dataclasses.field(default=0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossMetrics:
    """Sums over the rows that count, with their number, so that micro-batches and devices can be
    added exactly. fp32 [] each.

    Attributes:
        count: number of rows.
        ratio: sum of the ratios.
        ratio_min, ratio_max: bounds of the ratios.
        clipped: number of rows with a ratio outside the clip range; for 'dppo' of rows left out.
        approx_kl: sum of (log-prob - log-prob at rollout)^2 / 2.
        policy_loss: its sum.
        kl: sum of the KL without its weight.
        distillation: sum of mean((v - v_teacher)^2), where guidance is distilled.
        log_ratio: [T], sums of |log-prob - log-prob at rollout| by step of the schedule.
        step_count: [T], number of rows by step.
    """

    count: Array
    ratio: Array
    ratio_min: Array
    ratio_max: Array
    clipped: Array
    approx_kl: Array
    policy_loss: Array
    kl: Array
    distillation: Array | None = None
    log_ratio: Array | None = None
    step_count: Array | None = None

    @classmethod
    def zero(cls, config: LossConfig, steps: int = 0) -> "LossMetrics":
        """Return the metrics of no rows. steps: T; 0: without metrics by step."""
        zero, infinity = jnp.zeros((), jnp.float32), jnp.full((), jnp.inf, jnp.float32)
        return cls(
            count=zero,
            ratio=zero,
            ratio_min=infinity,
            ratio_max=-infinity,
            clipped=zero,
            approx_kl=zero,
            policy_loss=zero,
            kl=zero,
            distillation=zero if config.distill_weight > 0 else None,
            log_ratio=jnp.zeros(steps, jnp.float32) if steps else None,
            step_count=jnp.zeros(steps, jnp.float32) if steps else None,
        )

    def merge(self, other: "LossMetrics") -> "LossMetrics":
        """Return the metrics of the rows of both."""
        total = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(
            total,
            ratio_min=jnp.minimum(self.ratio_min, other.ratio_min),
            ratio_max=jnp.maximum(self.ratio_max, other.ratio_max),
        )

    def averages(self) -> dict[str, Any]:
        """Return the means for the log, on the host. Without rows the means are 0 and the bounds of
        the ratio infinite. `log_ratio_by_step` has the means of the steps with rows, by their number.
        """
        rows = max(float(self.count), 1.0)
        means: dict[str, Any] = {
            "ratio_mean": float(self.ratio) / rows,
            "ratio_min": float(self.ratio_min),
            "ratio_max": float(self.ratio_max),
            "clip_fraction": float(self.clipped) / rows,
            "approx_kl": float(self.approx_kl) / rows,
            "policy_loss": float(self.policy_loss) / rows,
            "kl": float(self.kl) / rows,
        }
        if self.distillation is not None:
            means["distillation"] = float(self.distillation) / rows
        if self.log_ratio is not None and self.step_count is not None:
            sums, counts = np.asarray(self.log_ratio), np.asarray(self.step_count)
            means["log_ratio"] = float(sums.sum()) / rows
            means["log_ratio_by_step"] = {
                str(step): float(sums[step] / counts[step]) for step in np.flatnonzero(counts)
            }
        return means


def clipped_loss(
    log_ratio: Array, advantages: Array, clip_low: float, clip_high: float
) -> tuple[Array, Array]:
    """Return (max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r) with r = exp(log_ratio), [B]
    each: GRPO's objective (arXiv 2402.03300, eq. 3) for each row, as a loss to minimise.

    log_ratio [B], advantages A [B]. The gradient is 0 where the clipped term is the maximum.
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return jnp.maximum(-advantages * ratio, -advantages * clipped), ratio


def policy_gradient_terms(
    rows: Rows,
    velocity: Array,
    velocity_ref: Array | None,
    config: LossConfig,
    kl_beta: Array | None = None,
    teacher: Array | None = None,
) -> tuple[Array, LossMetrics]:
    """Return (policy loss + kl_beta * KL of each row, [B]; metrics of the rows that count).

    Sum the loss over the counted rows, and divide by a count that spans micro-batches. Raises
    ValueError where config.kl_beta > 0 and velocity_ref is None.

    Args:
        rows: the steps.
        velocity: [B, ...], the policy's, to be differentiated.
        velocity_ref: [B, ...], the reference model's; None without a KL.
        config: the configuration.
        kl_beta: fp32 [], weight of the KL; None: the configuration's.
        teacher: [B, ...], the velocity that is distilled; None without distillation.
    """
    if config.kl_beta > 0 and velocity_ref is None:
        raise ValueError(
            f"kl_beta={config.kl_beta} needs the reference's velocity; pass it or set kl_beta=0"
        )
    step = rows.sigma, rows.sigma_next, rows.g, rows.preserving
    mean, std = sde.sde_mean_std(rows.x, velocity, *step)
    log_prob = sde.log_prob(rows.x_next, mean, std, rows.cells)  # [B]
    if rows.cells is not None:
        assert rows.old_mean is not None, "weights of cells need rows.old_mean"
        before = sde.log_prob(rows.x_next, rows.old_mean, std, rows.cells)
        rows = dataclasses.replace(rows, old_log_prob=before)
    # the policy loss, and the KL
    policy_loss, ratio, clipped = policy_term(rows, log_prob, mean, std, config)
    kl = jnp.zeros_like(policy_loss)
    if velocity_ref is not None:
        reference = jax.lax.stop_gradient(velocity_ref)
        held = outside(rows.cells) if config.kl_outside and rows.cells is not None else None
        kl = step_kl(rows.x, velocity, reference, step, config.kl_kind, held)
    if rows.weight is not None:
        policy_loss = rows.weight * policy_loss
        kl = rows.weight**2 * kl if config.kl_weighted else kl
    if rows.kl_gate is not None:
        kl = rows.kl_gate * kl
    metrics = _metrics(rows, log_prob, ratio, clipped, policy_loss, kl)
    loss = policy_loss + (config.kl_beta if kl_beta is None else kl_beta) * kl
    # distillation of guidance
    if teacher is not None:
        error = kl_to_reference(velocity, jax.lax.stop_gradient(teacher), None, kind="velocity")
        loss += config.distill_weight * error
        metrics = dataclasses.replace(
            metrics, distillation=jnp.sum(jnp.where(rows.mask, error, 0.0))
        )
    return loss, jax.lax.stop_gradient(metrics)


def policy_term(
    rows: Rows, log_prob: Array, mean: Array, std: Array, config: LossConfig
) -> tuple[Array, Array, Array]:
    """Return (policy loss, ratio, whether the ratio is outside the clip range) of each row, [B] each,
    with the formulas of `LossConfig`. For 'dppo' the third is whether the row is left out.

    log_prob [B], mean [B, ...] and std [B] are the current policy's at rows.x.
    """
    log_ratio = log_prob - rows.old_log_prob
    if config.objective == "dppo":
        ratio = jnp.exp(log_ratio)
        moved = ((ratio > 1) & (rows.advantages > 0)) | ((ratio < 1) & (rows.advantages < 0))
        left_out = moved & (_divergence(rows, mean, std) >= config.divergence)
        return jnp.where(left_out, 0.0, -rows.advantages * ratio), ratio, left_out
    if config.objective == "unscaled":
        log_ratio = 2.0 * std * std * log_ratio
    elif config.objective == "guard":
        log_ratio = std * (log_ratio + _divergence(rows, mean, std))
    loss, ratio = clipped_loss(log_ratio, rows.advantages, config.clip_low, config.clip_high)
    if config.objective == "guard":
        loss = loss / (rows.sigma - rows.sigma_next)
    return loss, ratio, (ratio < 1.0 - config.clip_low) | (ratio > 1.0 + config.clip_high)


def _divergence(rows: Rows, mean: Array, std: Array) -> Array:
    """Return D of `LossConfig`, the KL between the Gaussians of the step now and at rollout, [B]."""
    assert rows.old_mean is not None, "the objective needs rows.old_mean"
    return kl_to_reference(mean, rows.old_mean, std, kind="flow_grpo", cells=rows.cells)


def _metrics(
    rows: Rows, log_prob: Array, ratio: Array, clipped: Array, policy_loss: Array, kl: Array
) -> LossMetrics:
    def total(values):
        return jnp.sum(jnp.where(rows.mask, values, 0.0))

    log_ratio = counts = None
    if rows.index is not None:
        at_step = rows.mask[:, None] & (rows.index[:, None] == jnp.arange(rows.steps))
        change = jnp.abs(log_prob - rows.old_log_prob)[:, None]
        log_ratio = jnp.sum(jnp.where(at_step, change, 0.0), axis=0)
        counts = jnp.sum(at_step, axis=0, dtype=jnp.float32)
    return LossMetrics(
        count=total(1.0),
        ratio=total(ratio),
        ratio_min=jnp.min(jnp.where(rows.mask, ratio, jnp.inf)),
        ratio_max=jnp.max(jnp.where(rows.mask, ratio, -jnp.inf)),
        clipped=total(clipped),
        approx_kl=total(0.5 * (log_prob - rows.old_log_prob) ** 2),
        policy_loss=total(policy_loss),
        kl=total(kl),
        log_ratio=log_ratio,
        step_count=counts,
    )
