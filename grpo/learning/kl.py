"""The KL to a reference model: its measures, and the adaptation of its weight.

The reference is the base model, or an average of the trained weights where a method keeps one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from grpo.settings.choices import KL_KINDS
from wan_jax.diffusion import sde

Array = jax.Array
KL_DECAY = 0.9  # decay of the average KL that an adaptive weight follows


def kl_to_reference(
    mean: Array, mean_ref: Array, std: Array | None, *, kind: str, cells: Array | None = None
) -> Array:
    """Return the distance of the policy's step from the reference model's, fp32 [B]: a mean over
    all axes but B. `step_kl` passes the arguments that each kind needs.

    kind         mean, mean_ref [B, ...]  std [B]      result
    'flow_grpo'  means of the step        g sqrt(-dt)  mean((mu - mu_ref)^2) / (2 std^2), the KL of
                                                       the Gaussians per dimension
    'sigma'      means of the step        g            the same without dt, as in Flow-GRPO's image
                                                       recipes
    'x'          means of the step        unused       mean((mu - mu_ref)^2)
    'velocity'   velocities               unused       mean((v - v_ref)^2)

    cells: weights of the values, with a mean of 1, which broadcast against mean; None: all are 1.
    Where std is 0 (a deterministic step) the result and its gradient are 0. Raises ValueError on an
    unknown kind.
    """
    check_kind(kind)
    difference = mean.astype(jnp.float32) - mean_ref.astype(jnp.float32)
    squares = difference * difference
    squares = squares if cells is None else cells * squares
    squared = jnp.mean(squares, axis=tuple(range(1, difference.ndim)))  # [B]
    if kind in ("x", "velocity"):
        return squared
    assert std is not None, f"kind={kind!r} needs std"
    std = jnp.broadcast_to(jnp.asarray(std, jnp.float32), squared.shape)
    safe = jnp.where(std > 0, std, 1.0)
    return jnp.where(std > 0, squared / (2.0 * safe * safe), 0.0)


def step_kl(
    x: Array,
    velocity: Array,
    velocity_ref: Array,
    step: tuple,
    kind: str,
    cells: Array | None = None,
) -> Array:
    """Return `kl_to_reference` of a step from x [B, ...] with the velocities of policy and reference
    [B, ...], fp32 [B]. step: (sigma, sigma_next, g, preserving) as `sde.sde_mean_std` takes them.
    """
    if kind == "velocity":
        return kl_to_reference(velocity, velocity_ref, None, kind=kind, cells=cells)
    (mean, std), (mean_ref, _) = (sde.sde_mean_std(x, v, *step) for v in (velocity, velocity_ref))
    std = step[2] if kind == "sigma" else std
    return kl_to_reference(mean, mean_ref, std, kind=kind, cells=cells)


def outside(cells: Array) -> Array:
    """Return weights with a mean of 1 of the cells without text, and 0 of those with it, fp32 as
    `cells`; 1 of all in a video that has no text, or text everywhere.

    cells: [B, F, H, W, 1] fp32, `Credit.cell_weights`, which are above 1 where text is and below 1
    elsewhere.
    """
    weights = (cells <= 1).astype(jnp.float32)
    return weights / jnp.mean(weights, axis=tuple(range(1, cells.ndim)), keepdims=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KLControl:
    """The state of an adaptive KL weight: the weight, and the average of the KL over the updates so
    far, fp32 [] each.
    """

    weight: Array
    average: Array


@dataclasses.dataclass(frozen=True)
class AdaptiveKL:
    """Adapts the weight of the KL so that the KL approaches `target`. The weight starts at `first`.

    An update with mean KL k changes the average a = 0.9 a + 0.1 k and then the weight by the factor
    exp((a - target) / target / horizon), within `bounds`: a KL of twice the target multiplies the
    weight by e in `horizon` updates (Pref-GRPO's code; Ziegler et al., arXiv 1909.08593, use a
    linear step). Raises ValueError on values with which the weight cannot adapt.
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
        """Return the control after an update with mean KL `kl`, fp32 []. first: bool [], whether it
        was the first update.
        """
        average = jnp.where(first, kl, KL_DECAY * control.average + (1 - KL_DECAY) * kl)
        weight = control.weight * jnp.exp((average - self.target) / self.target / self.horizon)
        return KLControl(jnp.clip(weight, *self.bounds), average)


def check_kind(kind: str) -> None:
    """Raise ValueError where a kind of KL is unknown."""
    if kind not in KL_KINDS:
        raise ValueError(f"KL kind={kind!r} is unknown; choose one of {', '.join(KL_KINDS)}")
