"""The stochastic denoising step of Flow-GRPO and its log-probability, which make a flow model a
policy.

The ODE dx = v ds has a family of SDEs with the same marginals, one for every noise coefficient g
(Flow-GRPO, Liu et al., arXiv 2505.05470; DanceGRPO, Xue et al., arXiv 2505.07818). One
Euler-Maruyama step from s to s_next, dt = s_next - s < 0:

    x_next = mean + std z,   z ~ N(0, I)
    mean   = x + v dt + g^2 / (2 s) (x + (1 - s) v) dt        x + (1 - s) v is the predicted noise
    std    = g sqrt(-dt)

Published recipes differ in g per step, see `SDEConfig`. g = 0 is the plain ODE step.
Coefficients-preserving sampling (CPS; Wang & Yu, arXiv 2509.05952) has the same std = g sqrt(-dt),
but less of the predicted noise in the mean, so that predicted and fresh noise together are exactly
what the schedule has at s_next:

    mean   = (1 - s_next) (x - s v) + sqrt(s_next^2 - std^2) (x + (1 - s) v)

The rollout, the policy update and the reference model all use `sde_mean_std` and `log_prob`, so
there is one definition of the policy. All arithmetic is fp32. Sampled x_next must be stored in
fp32: rounding it to bf16 changes z by up to 2^-9 |x| / std.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64

from wan_jax.diffusion.schedule import Schedule
from wan_jax.diffusion.solvers import PerVideo, per_sample

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

# {kind: default (noise_level, max_step_std)}
DEFAULTS = {
    "flow_grpo_wan": (1.0, math.inf),
    "flow_sde": (0.7, 1.0),
    "dance": (0.3, math.inf),
    "cps": (0.8, math.inf),
}


@dataclasses.dataclass(frozen=True)
class SDEConfig:
    """The noise coefficient g_i of each step; a = noise_level, None for the default of the kind.

        'flow_grpo_wan'  g_i = a sigma_1 sigma_i. Flow-GRPO's published code for Wan is a = 1, the
                         default.
        'flow_sde'       g_i = a sqrt(sigma_i / (1 - sigma_i)), Flow-GRPO's paper and image recipes;
                         default a = 0.7.
        'dance'          g_i = a, DanceGRPO's constant eta; default a = 0.3, its setting for Wan.
        'cps'            std_i = sigma_next sin(a pi / 2), CPS; 0 <= a <= 1, default a = 0.8. The
                         last step has no noise.

    max_step_std bounds std_i = g_i sqrt(-dt) by lowering g_i, so that mean and std remain
    consistent. None means 1.0 for flow_sde and no bound (math.inf) for the others: the latent has
    unit variance at s = 1, so one step that adds more noise than that destroys it. With 10 to 50
    steps and shifts 1 to 12 the default std is at most 0.44 for flow_grpo_wan and 0.78 for
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
        """Whether the mean is that of CPS."""
        return self.kind == "cps"


def diffusion_coefficient(sde: SDEConfig, schedule: Schedule) -> Float32[np.ndarray, " T"]:
    """Return g_i of every step, computed in float64. Callers set it to 0 where a step is
    deterministic.

    The first sigma is 1, or 1 - 1e-6, or 0.9997, depending on the schedule, and flow_sde diverges
    there: its first std on UniPC's 20-step list with shift 3 would be 92 (5 on the legacy list)
    instead of 0.7. So the divisor of step 0 uses sigma_1 instead of sigma_0. That rule is for the
    index of the step; no threshold on sigma would work, because with shift 12 and 50 steps the
    second sigma is already 0.998.
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
    x: Float[Array, " B *latent"],
    velocity: Float[Array, " B *latent"],
    sigma: PerVideo,
    sigma_next: PerVideo,
    g: PerVideo,
    preserving: bool = False,
) -> tuple[Float32[Array, " B *latent"], Float32[Array, ""] | Float32[Array, " B"]]:
    """Return mean and std of one step; the formulas are in the module's docstring.

    preserving: use the mean of CPS. g = 0 gives std = 0 and, without `preserving`, bit for bit the
    Euler step x + v dt. Every real step starts at sigma > 0; a padding row with sigma = 0 also
    gives finite values and gradients.
    """
    x, velocity = x.astype(jnp.float32), velocity.astype(jnp.float32)
    sigma, sigma_next, g = (jnp.asarray(value, jnp.float32) for value in (sigma, sigma_next, g))
    dt = sigma_next - sigma
    std = g * jnp.sqrt(-dt)
    predicted_noise = x + per_sample(1.0 - sigma, x) * velocity  # [B, ...]
    if preserving:
        noise_share = jnp.sqrt(jnp.maximum(sigma_next * sigma_next - std * std, 0.0))
        clean = x - per_sample(sigma, x) * velocity
        mean = (
            per_sample(1.0 - sigma_next, x) * clean + per_sample(noise_share, x) * predicted_noise
        )
        return mean, std
    drift = g * g / (2.0 * jnp.where(sigma > 0, sigma, 1.0)) * dt
    return x + velocity * per_sample(dt, x) + per_sample(drift, x) * predicted_noise, std


def mean_slope(config: SDEConfig, schedule: Schedule) -> Float64[np.ndarray, " T"]:
    """Return |d mean / d v| of every step if it is stochastic: (1 + g^2 (1 - s) / (2 s)) (-dt), or
    with the mean of CPS |s (1 - s_next) - (1 - s) sqrt(s_next^2 - std^2)|.
    """
    sigmas = schedule.sigmas.astype(np.float64)
    g = diffusion_coefficient(config, schedule).astype(np.float64)
    s, s_next = sigmas[:-1], sigmas[1:]
    if config.preserving:
        noise_share = np.sqrt(np.maximum(s_next**2 - g**2 * (s - s_next), 0.0))
        return np.abs(s * (1 - s_next) - (1 - s) * noise_share)
    return (1 + g**2 * (1 - s) / (2 * s)) * (s - s_next)


def log_prob(
    x_next: Float[Array, " B *latent"],
    mean: Float[Array, " B *latent"],
    std: PerVideo,
    cells: Float[Array, " B ..."] | None = None,
) -> Float32[Array, " B"]:
    """Return log N(x_next; mean, std^2 I) of each video, as the MEAN over all other dimensions.

    The mean instead of the sum keeps policy ratios within about 1e-3 of 1 whatever the size of the
    video, which is why clip ranges are so small; one unit in the last place is about 2e-7. A
    deterministic step (std = 0) has no density: its log-prob is defined as 0, and so are its
    gradients.

    cells: weights of the values of a video, with a mean of 1, in a shape that broadcasts against
    x_next; the mean is then weighted. None: all are 1.
    """
    std = jnp.broadcast_to(jnp.asarray(std, jnp.float32), x_next.shape[:1])  # [B]
    safe = jnp.where(std > 0, std, 1.0)
    z = (x_next.astype(jnp.float32) - mean.astype(jnp.float32)) / per_sample(safe, x_next)
    squares = z * z if cells is None else cells * (z * z)
    value = -0.5 * jnp.mean(squares, axis=tuple(range(1, z.ndim))) - jnp.log(safe) - HALF_LOG_2PI
    return jnp.where(std > 0, value, 0.0)


def sde_step(
    x: Float[Array, " B *latent"],
    velocity: Float[Array, " B *latent"],
    sigma: PerVideo,
    sigma_next: PerVideo,
    g: PerVideo,
    noise: Float[Array, " B *latent"],
    preserving: bool = False,
) -> tuple[
    Float32[Array, " B *latent"],
    Float32[Array, " B"],
    Float32[Array, " B *latent"],
    Float32[Array, ""] | Float32[Array, " B"],
]:
    """Return (x_next, log_prob, mean, std) with x_next = mean + std noise, noise ~ N(0, I)."""
    mean, std = sde_mean_std(x, velocity, sigma, sigma_next, g, preserving)
    x_next = mean + per_sample(std, mean) * noise.astype(jnp.float32)
    return x_next, log_prob(x_next, mean, std), mean, std
