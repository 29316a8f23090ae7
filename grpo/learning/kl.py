"""The KL to a reference model: how it is measured, and how its weight adapts.

"Reference" is the base model, or an average of the trained weights where a method keeps one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from grpo.settings.choices import KL_KINDS
from wan_jax.diffusion import sde

Array = jax.Array
KL_DECAY = 0.9  # of the average that an adaptive weight follows


def kl_to_reference(mean: Array, mean_ref: Array, std: Array | None, *, kind: str) -> Array:
    """How far the policy's step is from the reference model's: a mean over all but B, [B].

    kind         first two   third        result
    'flow_grpo'  means       g sqrt(-dt)  mean((mu - mu_ref)^2) / (2 std^2), the Gaussians' KL per
                 dimension
    'sigma'      means       g            the same without dt, as in Flow-GRPO's image recipes
    'x'          means       unused       mean((mu - mu_ref)^2)
    'velocity'   velocities  unused       mean((v - v_ref)^2)

    Where a divisor is 0 (a deterministic step) the result and its gradient are 0. `step_kl` passes
    the right arguments for each kind. Raises ValueError on another kind.
    """
    check_kind(kind)
    difference = mean.astype(jnp.float32) - mean_ref.astype(jnp.float32)
    squared = jnp.mean(difference * difference, axis=tuple(range(1, difference.ndim)))  # [B]
    if kind in ("x", "velocity"):
        return squared
    std = jnp.broadcast_to(jnp.asarray(std, jnp.float32), squared.shape)
    safe = jnp.where(std > 0, std, 1.0)
    return jnp.where(std > 0, squared / (2.0 * safe * safe), 0.0)


def step_kl(x: Array, velocity: Array, velocity_ref: Array, step: tuple, kind: str) -> Array:
    """`kl_to_reference` of a step from x [B, ...], [B]. step: (sigma, sigma_next, g, preserving) of
    `sde_mean_std`.
    """
    if kind == "velocity":
        return kl_to_reference(velocity, velocity_ref, None, kind=kind)
    (mean, std), (mean_ref, _) = (sde.sde_mean_std(x, v, *step) for v in (velocity, velocity_ref))
    return kl_to_reference(mean, mean_ref, step[2] if kind == "sigma" else std, kind=kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KLControl:
    """The state of an adaptive KL weight, fp32 [] both."""

    weight: Array
    average: Array  # of the KL over the updates so far


@dataclasses.dataclass(frozen=True)
class AdaptiveKL:
    """A KL weight that follows the KL: from `first` on, so that the KL stays near `target`.

    After an update whose mean KL was k, with the average a = 0.9 a + 0.1 k of those so far,
    weight *= exp((a - target) / target / horizon), within `bounds`: a KL twice the target raises
    the weight by e in `horizon` updates (Pref-GRPO's code; Ziegler et al., arXiv 1909.08593, have
    the same with a linear step). Raises ValueError on values that cannot adapt.
    """

    first: float
    target: float
    horizon: float = 20.0
    bounds: tuple[float, float] = (1e-4, 1.0)

    def __post_init__(self):
        low, high = self.bounds
        if not (0 < self.target < float("inf") and 0 < self.horizon < float("inf")):
            raise ValueError(
                f"kl_target={self.target}, kl_horizon={self.horizon}: must be finite and > 0; "
                "leave kl_target out to keep the weight"
            )
        if not 0 < low <= self.first <= high:
            raise ValueError(
                f"kl_weight_range={tuple(self.bounds)} must hold the first weight, {self.first}, "
                "and begin above 0: a weight of 0 can never grow"
            )

    def init(self) -> KLControl:
        """Return the control before the first update."""
        return KLControl(jnp.asarray(self.first, jnp.float32), jnp.zeros((), jnp.float32))

    def step(self, control: KLControl, kl: Array, first: Array) -> KLControl:
        """Return the control after an update whose mean KL was `kl`. first: bool [], whether it was
        the first update.
        """
        average = jnp.where(first, kl, KL_DECAY * control.average + (1 - KL_DECAY) * kl)
        weight = control.weight * jnp.exp((average - self.target) / self.target / self.horizon)
        return KLControl(jnp.clip(weight, *self.bounds), average)


def check_kind(kind):
    if kind not in KL_KINDS:
        raise ValueError(f"KL kind={kind!r} is unknown; choose one of {', '.join(KL_KINDS)}")
