"""The GRPO objective on (sample, timestep) rows, as pure functions.

Every row is one denoising step of one video: the policy is the Gaussian of `wan_jax.diffusion.sde`,
its action is x_next. All inputs and results are per row, [B]; a mask says which rows count, so
batches keep their shape.
"""

import dataclasses

import jax
import jax.numpy as jnp

from grpo.learning.kl import AdaptiveKL, check_kind, kl_to_reference, step_kl
from grpo.settings.choices import OBJECTIVES
from wan_jax.diffusion import sde

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Flow-GRPO's published settings for Wan. Advantages are expected to be clipped already.

    objective, with d = log-prob - old log-prob, A the advantage, std the step's, D = mean((mu - mu_old)^2) / (2 std^2):
    'clip'      GRPO's clipped ratio r = exp(d).
    'unscaled'  the same with r = exp(2 std^2 d), the density without its variance, as the code of
                CPS has it
                (arXiv 2509.05952): a step's noise does not change how far a change of the mean
                moves r.
    'guard'     GRPO-Guard (arXiv 2510.22319): r = exp(std (d + D)), whose mean stays at 1, and a
                loss divided by -dt,
                so that all steps have gradients of one size. D is each sample's own, where the
                authors' code takes one for the whole batch. Published clip range 2e-6, no KL.
    'dppo'      Flow-DPPO: no clip; a row is left out once D >= divergence and its ratio has moved
                the way A asks for.

    distill_weight: of mean((v - v_teacher)^2), where the teacher is the reference at guidance
    `distill_guidance` and v the policy's velocity without guidance: guidance distilled into the
    model (Meng et al., arXiv 2210.03142).

    reference_decay: the KL is to an average of the trained weights that keeps so much of itself in
    every update; None: to the base model.

    kl_target: kl_beta is only the first weight of the KL, and `kl.AdaptiveKL` changes it; None: it
    stays.
    """

    clip_low: float = 1e-3
    clip_high: float = 1e-3
    kl_beta: float = 0.004
    kl_kind: str = "flow_grpo"
    objective: str = "clip"
    divergence: float = 1e-5
    kl_target: float | None = None
    kl_horizon: float = 20.0
    kl_range: tuple[float, float] = (1e-4, 1.0)
    distill_weight: float = 0.0
    distill_guidance: float = 1.0
    reference_decay: float | None = None

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
        _ = self.adaptive_kl  # raises where it cannot adapt
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

    @property
    def adaptive_kl(self) -> AdaptiveKL | None:
        """How the weight of the KL adapts; None: it stays."""
        if self.kl_target is None:
            return None
        return AdaptiveKL(self.kl_beta, self.kl_target, self.kl_horizon, tuple(self.kl_range))

    @property
    def needs_old_mean(self) -> bool:
        return self.objective in ("guard", "dppo")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What the rollout left behind for the update: B steps, possibly of different videos and
    different i.
    """

    x: Array  # [B, ...] fp32, the latent the step started from
    x_next: Array  # [B, ...] fp32, the latent that was drawn
    old_log_prob: Array  # [B] fp32, at rollout
    advantages: Array  # [B] fp32
    sigma: Array  # [B] fp32
    sigma_next: Array  # [B] fp32
    g: Array  # [B] fp32, `sde.diffusion_coefficient` at the step; > 0 where mask is True
    mask: Array  # [B] bool, rows that count
    old_mean: Array | None = None  # [B, ...] fp32 at rollout, where the objective needs it
    # [B] fp32, the step's credit: of the policy loss, and its square of the KL
    weight: Array | None = None
    preserving: bool = dataclasses.field(default=False, metadata={"static": True})  # CPS' mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossMetrics:
    """Sums over the counted rows, one shared count, so micro-batches and devices can be added up
    exactly.
    """

    count: Array  # rows
    ratio: Array  # sum of policy ratios
    ratio_min: Array
    ratio_max: Array
    clipped: Array  # rows whose ratio is outside the clip range; of 'dppo' rows left out
    approx_kl: Array  # sum of (log-prob - old log-prob)^2 / 2
    policy_loss: Array  # sum
    kl: Array  # sum of the penalty before beta
    # sum of the squares before their weight, where guidance is distilled
    distillation: Array | None = None

    @classmethod
    def zero(cls, config: LossConfig) -> "LossMetrics":
        """Return the metrics of no rows."""
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
        )

    def merge(self, other: "LossMetrics") -> "LossMetrics":
        total = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(
            total,
            ratio_min=jnp.minimum(self.ratio_min, other.ratio_min),
            ratio_max=jnp.maximum(self.ratio_max, other.ratio_max),
        )

    def averages(self) -> dict[str, float]:
        """For logging, on the host. With no rows the averages are 0 and the ratio's bounds
        infinite.
        """
        n = max(float(self.count), 1.0)
        return {
            "ratio_mean": float(self.ratio) / n,
            "ratio_min": float(self.ratio_min),
            "ratio_max": float(self.ratio_max),
            "clip_fraction": float(self.clipped) / n,
            "approx_kl": float(self.approx_kl) / n,
            "policy_loss": float(self.policy_loss) / n,
            "kl": float(self.kl) / n,
        } | ({} if self.distillation is None else {"distillation": float(self.distillation) / n})


def clipped_loss(
    log_ratio: Array, advantages: Array, clip_low: float, clip_high: float
) -> tuple[Array, Array]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), [B], and r = exp(log_ratio), [B].

    GRPO (arXiv 2402.03300, eq. 3), per row and as a loss to minimise. Where the clip binds the
    gradient is 0.
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return jnp.maximum(-advantages * ratio, -advantages * clipped), ratio


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of values [B] where mask [B] is True; 0 when nothing is counted. Other values may be
    NaN.
    """
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def policy_gradient_terms(
    rows: Rows,
    velocity: Array,
    velocity_ref: Array | None,
    config: LossConfig,
    kl_beta: Array | None = None,
    teacher: Array | None = None,
) -> tuple[Array, LossMetrics]:
    """The loss of each row, clipped policy loss + kl_beta * KL, [B], and the metrics of the counted
    rows.

    kl_beta fp32 []: in place of the configuration's. teacher [B, ...]: the velocity that is
    distilled. velocity [B, ...] is the policy's, the one to differentiate; velocity_ref the
    reference model's, None without a KL term. Reduce with `masked_mean(loss, rows.mask)`, or sum
    and divide by a count that spans micro-batches. Raises ValueError when kl_beta > 0 and
    velocity_ref is None.
    """
    if config.kl_beta > 0 and velocity_ref is None:
        raise ValueError(
            f"kl_beta={config.kl_beta} needs the reference's velocity; pass it or set kl_beta=0"
        )
    step = rows.sigma, rows.sigma_next, rows.g, rows.preserving
    mean, std = sde.sde_mean_std(rows.x, velocity, *step)
    log_prob = sde.log_prob(rows.x_next, mean, std)  # [B]
    policy_loss, ratio, bounded = policy_term(rows, log_prob, mean, std, config)
    kl = jnp.zeros_like(policy_loss)
    if velocity_ref is not None:
        kl = step_kl(rows.x, velocity, jax.lax.stop_gradient(velocity_ref), step, config.kl_kind)
    if rows.weight is not None:
        policy_loss, kl = rows.weight * policy_loss, rows.weight**2 * kl
    metrics = _metrics(rows, log_prob, ratio, bounded, policy_loss, kl)
    loss = policy_loss + (config.kl_beta if kl_beta is None else kl_beta) * kl
    if teacher is not None:
        apart = kl_to_reference(velocity, jax.lax.stop_gradient(teacher), None, kind="velocity")
        loss += config.distill_weight * apart
        metrics = dataclasses.replace(
            metrics, distillation=jnp.sum(jnp.where(rows.mask, apart, 0.0))
        )
    return loss, jax.lax.stop_gradient(metrics)


def policy_term(
    rows: Rows, log_prob: Array, mean: Array, std: Array, config: LossConfig
) -> tuple[Array, Array, Array]:
    """The objective's policy loss of each row, its ratio, and whether the ratio is outside the clip
    range (of 'dppo': whether the row is left out), [B] each: `LossConfig` has the formulas.

    log_prob [B], mean [B, ...] and std [B] are the current policy's at rows.x.
    """
    log_ratio = log_prob - rows.old_log_prob
    divergence = None
    if config.needs_old_mean:
        # [B], of the two Gaussians
        divergence = kl_to_reference(mean, rows.old_mean, std, kind="flow_grpo")
    if config.objective == "dppo":
        ratio = jnp.exp(log_ratio)
        moved = ((ratio > 1) & (rows.advantages > 0)) | ((ratio < 1) & (rows.advantages < 0))
        left_out = moved & (divergence >= config.divergence)
        return jnp.where(left_out, 0.0, -rows.advantages * ratio), ratio, left_out
    if config.objective == "unscaled":
        log_ratio = 2.0 * std * std * log_ratio
    elif config.objective == "guard":
        log_ratio = std * (log_ratio + divergence)
    loss, ratio = clipped_loss(log_ratio, rows.advantages, config.clip_low, config.clip_high)
    if config.objective == "guard":
        loss = loss / (rows.sigma - rows.sigma_next)
    return loss, ratio, (ratio < 1.0 - config.clip_low) | (ratio > 1.0 + config.clip_high)


def _metrics(rows, log_prob, ratio, bounded, policy_loss, kl) -> LossMetrics:
    def total(values):
        return jnp.sum(jnp.where(rows.mask, values, 0.0))

    return LossMetrics(
        count=total(1.0),
        ratio=total(ratio),
        ratio_min=jnp.min(jnp.where(rows.mask, ratio, jnp.inf)),
        ratio_max=jnp.max(jnp.where(rows.mask, ratio, -jnp.inf)),
        clipped=total(bounded),
        approx_kl=total(0.5 * (log_prob - rows.old_log_prob) ** 2),
        policy_loss=total(policy_loss),
        kl=total(kl),
    )
