"""The loss of a micro-batch of finished videos at one noise level each, by the velocities there."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

import jax
import jax.numpy as jnp

from grpo.learning.finished_batch import FinishedBatch, FinishedRows
from grpo.learning.kl import kl_to_reference, outside
from grpo.learning.policy import Flat, Policy
from grpo.rollout import sample_noise
from wan_jax.diffusion.guidance import pair, velocity
from wan_jax.diffusion.solvers import per_sample

if TYPE_CHECKING:
    from grpo.learning.optimiser import GradientInputs

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rows:
    """One micro-batch at one noise level, and the velocities there. In methods on pairs, rows
    alternate between a better video and a worse one, with one noise and one level for both.

    Attributes:
        x: [B, F, H, W, C] fp32, x_s.
        x0: [B, F, H, W, C] fp32, final latents.
        sigma: [B] fp32, s.
        v: [B, F, H, W, C], velocity of the trained weights.
        v_lagged: the velocity of each copy of earlier weights, without gradient.
        v_reference: the velocity of the base model, without gradient, where the method needs it.
        error: [B] fp32, mean((v - target)^2), weighted by `cells`.
        target: [B, F, H, W, C], the true velocity e - x0.
        weight: [B] fp32, weights of `Selection`; [B / 2] for pairs.
        cells: [B, F, H, W, 1] fp32, weights of the cells of the latents, with a mean of 1, in all
            means over a video but the KL's; None: all are 1.
        video: [B] int32, of `FinishedBatch`; [B / 2] for pairs.
        valid: [B] bool, rows that count; [B / 2] for pairs.
    """

    x: Array
    x0: Array
    sigma: Array
    v: Array
    v_lagged: dict[str, Array]
    v_reference: Array | None
    error: Array
    target: Array
    weight: Array
    cells: Array | None = None
    video: Array | None = None
    valid: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowMetrics:
    """Sums over the rows that count, with their number, so that micro-batches can be added exactly.
    fp32 [] each.

    Attributes:
        count: number of rows.
        policy_loss: sum of the loss.
        flow_error: sum of mean((v - (e - x0))^2), of the better videos of pairs.
        kl: sum of mean((v - v_reference)^2).
        more: sums of further values that the method logs.
    """

    count: Array
    policy_loss: Array
    flow_error: Array
    kl: Array
    more: dict[str, Array]

    @classmethod
    def zero(cls, logged: Sequence[str]) -> "FlowMetrics":
        """Return the metrics of no rows. logged: names of the further values."""
        zero = jnp.zeros((), jnp.float32)
        return cls(zero, zero, zero, zero, dict.fromkeys(logged, zero))

    def averages(self) -> dict[str, float]:
        """Return the means for the log, on the host; 0 without rows."""
        rows = max(float(self.count), 1.0)
        sums = {"policy_loss": self.policy_loss, "flow_error": self.flow_error, "kl": self.kl}
        return {name: float(value) / rows for name, value in (sums | self.more).items()}


class VelocityLoss(Protocol):
    """A loss of `Rows`, with the KL that is added to it.

    Attributes:
        kl_weight: weight of mean((v - v_reference)^2); 0: none is added.
        kl_copy: name of the lagged copy that is the reference of the KL; None: the base model is.
        kl_outside: whether the KL is that of the cells without text alone.
        needs_reference: whether the velocity of the base model is computed.
        logs: names of the further values that `loss` returns.
    """

    logs: ClassVar[tuple[str, ...]]

    @property
    def kl_weight(self) -> float: ...
    @property
    def kl_copy(self) -> str | None: ...
    @property
    def kl_outside(self) -> bool: ...
    @property
    def needs_reference(self) -> bool: ...
    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        """Return the loss of each row without the KL, and the values named in `logs`, [B] each."""
        ...


@dataclasses.dataclass(frozen=True)
class FlowError:
    """Flow matching: the weighted error of the velocity, without a KL. A `VelocityLoss`."""

    kl_weight: float = 0.0
    kl_copy: str | None = None
    kl_outside: bool = False
    needs_reference: bool = False
    logs: ClassVar[tuple[str, ...]] = ()

    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        return flow_error(rows), {}


def flow_error(rows: Rows) -> Array:
    """Return the weighted error of the velocity, [B] fp32, the loss of supervised fine-tuning."""
    return rows.weight * rows.error


def mean_square(x: Array, cells: Array | None = None) -> Array:
    """Return `video_mean` of the squares, [B] fp32."""
    return video_mean(jnp.square(x.astype(jnp.float32)), cells)


def video_mean(x: Array, cells: Array | None = None) -> Array:
    """Return the mean of x, [B, ...], over all axes but B, [B]. cells: weights of the values, with a
    mean of 1, which broadcast against x; None: all are 1.
    """
    return jnp.mean(x if cells is None else cells * x, axis=tuple(range(1, x.ndim)))


def objective(
    method: VelocityLoss,
    policy: Policy,
    guidance: float,
    trainable: Flat,
    inputs: "GradientInputs",
    frozen,
    rows: FinishedRows,
) -> tuple[Array, FlowMetrics]:
    """Return the sum of the loss over the valid rows of one micro-batch at one draw, and its
    metrics. guidance: of all velocities.
    """
    # x_s and the true velocity; the two videos of a pair have one noise and one level
    x0, text, sigma, timestep = rows.x0, rows.text, rows.sigma, rows.timestep
    cells = rows.cells
    noise = sample_noise(rows.key, rows.video, rows.draw, x0.shape[1:])
    if rows.worse is not None:
        x0, noise = pair(x0, rows.worse), pair(noise, noise)
        sigma, timestep = pair(sigma, sigma), pair(timestep, timestep)
        text = dataclasses.replace(text, embeddings=pair(text.embeddings, text.embeddings))
        if cells is not None and rows.worse_cells is not None:
            cells = pair(cells, rows.worse_cells)
    s = per_sample(sigma, x0)
    x = (1 - s) * x0 + s * noise
    target = noise - x0

    # velocities of the policy and of the models that it is compared with
    def velocity_of(module):
        return velocity(module, x, timestep, text, guidance)

    v = velocity_of(policy.module(trainable, frozen))
    v_lagged = {
        name: jax.lax.stop_gradient(velocity_of(policy.module(weights, frozen)))
        for name, weights in inputs.lagged.items()
    }
    v_reference = None
    if method.needs_reference:
        v_reference = jax.lax.stop_gradient(velocity_of(policy.reference(frozen)))
    error = mean_square(v - target, cells)
    v_kl = v_reference if method.kl_copy is None else v_lagged[method.kl_copy]
    kl = jnp.zeros_like(error)
    if v_kl is not None:
        held = outside(cells) if method.kl_outside and cells is not None else None
        kl = kl_to_reference(v, v_kl, None, kind="velocity", cells=held)

    # the loss of each row; the KL of a pair is that of the better video
    velocities = v, v_lagged, v_reference, error, target
    loss, more = method.loss(
        Rows(x, x0, sigma, *velocities, rows.weight, cells, rows.video, rows.valid)
    )
    if rows.worse is not None:
        error, kl = error[::2], kl[::2]
    if rows.kl_gate is not None:
        kl = rows.kl_gate * kl
    if method.kl_weight:
        weight = method.kl_weight if inputs.kl_weight is None else inputs.kl_weight
        loss = loss + weight * kl

    def total(values):
        return jnp.sum(jnp.where(rows.valid, values, 0.0))

    more = {name: total(more[name]) for name in method.logs}
    metrics = FlowMetrics(total(1.0), total(loss), total(error), total(kl), more)
    return total(loss), jax.lax.stop_gradient(metrics)


def make_gradient(method: VelocityLoss, policy: Policy, guidance: float) -> Callable:
    """Return the gradient of `objective`: (trainable, GradientInputs, frozen, FinishedBatch) -> (mean
    gradient over the valid rows, FlowMetrics). guidance: of all velocities in the loss; up to 1 there
    is none.
    """
    grad_fn = jax.grad(partial(objective, method, policy, guidance), has_aux=True)

    def gradient(trainable: Flat, inputs: "GradientInputs", frozen, batch: FinishedBatch):
        def one_draw(carry, level, micro):
            sigma, timestep, draw = level
            x0, worse, text, video, weight, valid, *factors = micro
            rows = x0, worse, text, video, weight, valid
            row = FinishedRows(*rows, sigma, timestep, draw, batch.key, *factors)
            grads, metrics = grad_fn(trainable, inputs, frozen, row)
            return jax.tree.map(jnp.add, carry, (grads, metrics)), None

        def one_micro_batch(carry, micro):
            *rows, sigma, timestep = micro
            levels = (sigma, timestep, batch.draw)
            return jax.lax.scan(partial(one_draw, micro=rows), carry, levels)[0], None

        carry = (jax.tree.map(jnp.zeros_like, trainable), FlowMetrics.zero(method.logs))
        micro_batches = (
            batch.x0,
            batch.worse,
            batch.text,
            batch.video,
            batch.weight,
            batch.valid,
            batch.cells,
            batch.worse_cells,
            batch.kl_gate,
            batch.sigma,
            batch.timestep,
        )
        (grads, metrics), _ = jax.lax.scan(one_micro_batch, carry, micro_batches)
        return jax.tree.map(lambda g: g / jnp.maximum(metrics.count, 1.0), grads), metrics

    return gradient
