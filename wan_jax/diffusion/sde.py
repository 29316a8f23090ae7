"""The stochastic denoising step of Flow-GRPO and its log-probability: what makes a flow model a
policy.

The ODE dx = v ds has a family of SDEs with the same marginals, one for every noise coefficient g
(Flow-GRPO, Liu et al., arXiv 2505.05470; DanceGRPO, Xue et al., arXiv 2505.07818). One
Euler-Maruyama step from s to s_next, dt = s_next - s < 0:

    x_next = mean + std z,   z ~ N(0, I)
    mean   = x + v dt + g^2 / (2 s) (x + (1 - s) v) dt        x + (1 - s) v is the predicted noise
    std    = g sqrt(-dt)

Published recipes differ in g per step, see `SDEConfig`. g = 0 is the plain ODE step.
Coefficients-preserving sampling (CPS; Wang & Yu, arXiv 2509.05952) keeps std = g sqrt(-dt) and puts
less of the predicted noise into the mean instead, so that predicted and fresh noise together are
exactly what the schedule has at s_next:

    mean   = (1 - s_next) (x - s v) + sqrt(s_next^2 - std^2) (x + (1 - s) v)

The rollout, the policy update and the reference model all go through `sde_mean_std` and `log_prob`,
so there is one definition of the policy. All arithmetic is fp32. Sampled x_next must be kept in
fp32: rounding it to bf16 moves z by up to 2^-9 |x| / std.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.diffusion.schedule import Schedule
from wan_jax.diffusion.solvers import per_sample

Array = jax.Array
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

# kind: (noise_level, max_step_std) where the configuration says None
DEFAULTS = {
    "flow_grpo_wan": (1.0, math.inf),
    "flow_sde": (0.7, 1.0),
    "dance": (0.3, math.inf),
    "cps": (0.8, math.inf),
}


@dataclasses.dataclass(frozen=True)
class SDEConfig:
    """Which noise coefficient g_i the steps use; a = noise_level.

    'flow_grpo_wan'  g_i = a sigma_1 sigma_i. Flow-GRPO's published code for Wan is a = 1, the
                     default.
    'flow_sde'       g_i = a sqrt(sigma_i / (1 - sigma_i)), Flow-GRPO's paper and image recipes; a =
                     0.7.
    'dance'          g_i = a, DanceGRPO's constant eta; a = 0.3, its setting for Wan.
    'cps'            std_i = sigma_next sin(a pi / 2), CPS; 0 <= a <= 1, a = 0.8. The last step has
                     none.

    max_step_std bounds std_i = g_i sqrt(-dt) by lowering g_i, which keeps mean and std consistent.
    None means no bound for flow_grpo_wan and 1.0 for flow_sde: the whole latent has unit variance
    at s = 1, so one step that adds more noise than that drowns it. math.inf is no bound. With 10 to
    50 steps and shifts 1 to 12 the default std is at most 0.44 for flow_grpo_wan and 0.78 for
    flow_sde; with 2 steps at shift 3 flow_sde reaches the bound.
    """

    kind: str = "flow_grpo_wan"
    noise_level: float | None = None
    max_step_std: float | None = None

    def __post_init__(self):
        if self.kind not in DEFAULTS:
            raise ValueError(
                f"SDE kind={self.kind!r} is unknown; choose one of {', '.join(DEFAULTS)}"
            )
        if self.noise_level is not None and not (0 <= self.noise_level < math.inf):
            raise ValueError(
                f"noise_level={self.noise_level}: must be finite and >= 0 (0 is the ODE)"
            )
        if self.kind == "cps" and (self.noise_level or 0) > 1:
            raise ValueError(
                f"noise_level={self.noise_level}: cps takes 0 (the ODE) to 1 (all noise fresh)"
            )
        if self.max_step_std is not None and not self.max_step_std > 0:
            raise ValueError(
                f"max_step_std={self.max_step_std}: must be > 0; for no noise set noise_level=0"
            )

    @property
    def preserving(self) -> bool:
        """Whether the mean is CPS'."""
        return self.kind == "cps"


def diffusion_coefficient(sde: SDEConfig, schedule: Schedule) -> np.ndarray:
    """g_i of every step, [T] float32, computed in float64. Callers put 0 where a step shall be
    deterministic.

    The first sigma is 1, or 1 - 1e-6, or 0.9997, depending on the schedule, and flow_sde diverges
    there: its first std on UniPC's 20-step list with shift 3 would be 92 (5 on the legacy list)
    instead of 0.7. So the divisor of step 0 takes sigma_1 for sigma_0. The guard is the step's
    index; no threshold on sigma can serve, because with shift 12 and 50 steps the second sigma is
    already 0.998.
    """
    sigmas = schedule.sigmas.astype(np.float64)
    s = sigmas[:-1]  # [T]
    noise_level, max_step_std = DEFAULTS[sde.kind]
    noise_level = noise_level if sde.noise_level is None else sde.noise_level
    max_step_std = max_step_std if sde.max_step_std is None else sde.max_step_std
    if sde.kind == "flow_grpo_wan":
        g = noise_level * sigmas[1] * s
    elif sde.kind == "dance":
        g = np.full_like(s, noise_level)
    elif sde.kind == "cps":
        g = sigmas[1:] * np.sin(noise_level * np.pi / 2) / np.sqrt(-np.diff(sigmas))
    else:
        g = noise_level * np.sqrt(s / (1.0 - np.append(sigmas[1], s[1:])))
    return np.minimum(g, max_step_std / np.sqrt(-np.diff(sigmas))).astype(np.float32)


def sde_mean_std(
    x: Array, velocity: Array, sigma, sigma_next, g, preserving: bool = False
) -> tuple[Array, Array]:
    """Mean [B, ...] and std (scalar or [B]) of one step; x, velocity [B, ...], the others scalars
    or [B].

    preserving: the mean of CPS. g = 0 gives mean = x + v dt, the Euler step, bit for bit without
    `preserving`, and std = 0. Every real step starts at sigma > 0; a padding row with sigma = 0
    gives finite values and gradients too.
    """
    x, velocity = x.astype(jnp.float32), velocity.astype(jnp.float32)
    sigma, sigma_next, g = (jnp.asarray(value, jnp.float32) for value in (sigma, sigma_next, g))
    dt = sigma_next - sigma
    std = g * jnp.sqrt(-dt)
    predicted_noise = x + per_sample(1.0 - sigma, x) * velocity  # [B, ...]
    if preserving:
        kept = jnp.sqrt(jnp.maximum(sigma_next * sigma_next - std * std, 0.0))
        clean = x - per_sample(sigma, x) * velocity
        return per_sample(1.0 - sigma_next, x) * clean + per_sample(kept, x) * predicted_noise, std
    drift = g * g / (2.0 * jnp.where(sigma > 0, sigma, 1.0)) * dt
    return x + velocity * per_sample(dt, x) + per_sample(drift, x) * predicted_noise, std


def mean_slope(config: SDEConfig, schedule: Schedule) -> np.ndarray:
    """|d mean / d v| of every stochastic step, [T] float64: (1 + g^2 (1 - s) / (2 s)) (-dt), or
    with CPS' mean |s (1 - s_next) - (1 - s) sqrt(s_next^2 - std^2)|.
    """
    sigmas, g = (
        schedule.sigmas.astype(np.float64),
        diffusion_coefficient(config, schedule).astype(np.float64),
    )
    s, s_next = sigmas[:-1], sigmas[1:]
    if config.preserving:
        kept = np.sqrt(np.maximum(s_next**2 - g**2 * (s - s_next), 0.0))
        return np.abs(s * (1 - s_next) - (1 - s) * kept)
    return (1 + g**2 * (1 - s) / (2 * s)) * (s - s_next)


def log_prob(x_next: Array, mean: Array, std) -> Array:
    """log N(x_next; mean, std^2 I) per sample, [B] fp32, as the MEAN over all other dimensions.

    The mean instead of the sum keeps policy ratios within about 1e-3 of 1 whatever the size of the
    video, which is why clip ranges are so small; one unit in the last place of it is about 2e-7.
    std is a scalar or [B]. A deterministic step (std = 0) has no density: its log-prob is 0 by
    definition, and so are its gradients.
    """
    std = jnp.broadcast_to(jnp.asarray(std, jnp.float32), x_next.shape[:1])  # [B]
    safe = jnp.where(std > 0, std, 1.0)
    z = (x_next.astype(jnp.float32) - mean.astype(jnp.float32)) / per_sample(safe, x_next)
    value = -0.5 * jnp.mean(z * z, axis=tuple(range(1, z.ndim))) - jnp.log(safe) - HALF_LOG_2PI
    return jnp.where(std > 0, value, 0.0)


def sde_step(
    x: Array, velocity: Array, sigma, sigma_next, g, noise: Array, preserving: bool = False
) -> tuple[Array, Array, Array, Array]:
    """x_next = mean + std noise with noise [B, ...] ~ N(0, I). Returns (x_next, log_prob [B], mean,
    std).
    """
    mean, std = sde_mean_std(x, velocity, sigma, sigma_next, g, preserving)
    x_next = mean + per_sample(std, mean) * noise.astype(jnp.float32)
    return x_next, log_prob(x_next, mean, std), mean, std
