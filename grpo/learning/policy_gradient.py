"""The gradient of a method on stochastic steps: its batches, and the loss of one step of each video."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.optimiser import GradientInputs
from grpo.learning.policy import Flat, Policy
from grpo.learning.policy_loss import LossConfig, LossMetrics, Rows, policy_gradient_terms
from grpo.learning.step_table import StepTable
from grpo.rollout import Trajectory
from wan_jax.diffusion.guidance import TextBatch, velocity

# the lagged copy that is the reference with train.kl_reference=average, as checkpoints name it
AVERAGE = "old"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """M micro-batches of one optimiser step, with K stochastic steps of each video.

    Attributes:
        latents: [M, L, B, F, H, W, C] fp32. Where the steps follow each other, L is K + 1: those
            before each step, and those after the last. Else 2 K: those before and after each step.
        log_prob: [M, K, B] fp32, at rollout.
        step: int32 [M, K], index of the step in the schedule; [M, 1, B] where it differs between
            videos.
        mean: [M, K, B, F, H, W, C] fp32, of the steps at rollout, where the objective needs it.
        text: of the videos, with a leading axis M.
        advantages: [M, B] fp32, or [M, K, B] where they differ between steps.
        valid: [M, B] bool, videos that count.
        cells: [M, B, F, H, W, 1] fp32, `Credit.cell_weights`; None: all count alike.
        kl_gate: [M, B] fp32, `Credit.kl_gate`; None: the KL counts for all videos.
    """

    latents: jax.Array
    log_prob: jax.Array
    step: jax.Array
    mean: jax.Array | None
    text: TextBatch
    advantages: jax.Array
    valid: jax.Array
    cells: jax.Array | None = None
    kl_gate: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """One stochastic step of each video of a micro-batch.

    Attributes:
        x, x_next: [B, ...] fp32, latents before the step and as drawn.
        log_prob: [B] fp32, at rollout.
        index: int32 [], or [B] where it differs between videos: of the step in the schedule.
        mean: [B, ...] fp32, of the step at rollout, where the objective needs it.
        text: of the videos.
        advantages: [B] fp32.
        valid: [B] bool.
        cells: [B, F, H, W, 1] fp32, weights of the cells of the latents.
        kl_gate: [B] fp32, weights of the KL.
    """

    x: jax.Array
    x_next: jax.Array
    log_prob: jax.Array
    index: jax.Array
    mean: jax.Array | None
    text: TextBatch
    advantages: jax.Array
    valid: jax.Array
    cells: jax.Array | None = None
    kl_gate: jax.Array | None = None


def objective(
    policy: Policy,
    table: StepTable,
    guidance: float,
    config: LossConfig,
    trainable: Flat,
    inputs: GradientInputs,
    frozen,
    steps: Steps,
) -> tuple[jax.Array, LossMetrics]:
    """Return the sum of the loss over the valid rows of one micro-batch at one step of each video,
    and its metrics.

    guidance: of the policy's and the reference's velocity. The reference of the KL is the average of
    the trained weights where the state has one.
    """
    # the rows, with the schedule's values of their steps
    t, sigma, sigma_next, g = table.at(steps.index)
    shape, weight = steps.advantages.shape, None
    if table.weight is not None:
        weight = jnp.broadcast_to(jnp.asarray(table.weight)[steps.index], shape)
    rows = Rows(
        steps.x,
        steps.x_next,
        steps.log_prob,
        steps.advantages,
        sigma=jnp.broadcast_to(sigma, shape),
        sigma_next=jnp.broadcast_to(sigma_next, shape),
        g=jnp.broadcast_to(g, shape),
        mask=steps.valid,
        old_mean=steps.mean,
        weight=weight,
        cells=steps.cells,
        kl_gate=steps.kl_gate,
        preserving=table.preserving,
        index=jnp.broadcast_to(steps.index, shape),
        steps=len(table.timestep),
    )

    # velocities of the policy, the reference and the teacher
    def velocity_of(module, scale: float) -> jax.Array:
        return velocity(module, steps.x, t, steps.text, scale)

    v = velocity_of(policy.module(trainable, frozen), guidance)
    v_reference = teacher = None
    if config.kl_beta > 0:
        average = inputs.lagged.get(AVERAGE)
        model = policy.reference(frozen) if average is None else policy.module(average, frozen)
        v_reference = velocity_of(model, guidance)
    if config.distill_weight > 0:
        teacher = velocity_of(policy.reference(frozen), config.distill_guidance)

    # the loss
    loss, metrics = policy_gradient_terms(rows, v, v_reference, config, inputs.kl_weight, teacher)
    return jnp.sum(jnp.where(steps.valid, loss, 0.0)), metrics


def make_gradient(
    policy: Policy, table: StepTable, guidance: float, config: LossConfig
) -> Callable:
    """Return the function (trainable, GradientInputs, frozen, PolicyBatch) -> (mean gradient of the
    objective over the valid rows, LossMetrics).
    """
    grad_fn = jax.grad(partial(objective, policy, table, guidance, config), has_aux=True)

    def gradient(trainable: Flat, inputs: GradientInputs, frozen, batch: PolicyBatch):
        def one_step(carry, row, micro: PolicyBatch):
            k, log_prob, index, mean, advantages = row
            first = k if len(micro.latents) == len(micro.log_prob) + 1 else 2 * k
            x, x_next = micro.latents[first], micro.latents[first + 1]
            by_video = micro.text, advantages, micro.valid, micro.cells, micro.kl_gate
            steps = Steps(x, x_next, log_prob, index, mean, *by_video)
            grads, metrics = grad_fn(trainable, inputs, frozen, steps)
            return (jax.tree.map(jnp.add, carry[0], grads), carry[1].merge(metrics)), None

        def one_micro_batch(carry, micro: PolicyBatch):
            advantages = jnp.broadcast_to(micro.advantages, micro.log_prob.shape)
            number = jnp.arange(len(micro.log_prob))
            rows = (number, micro.log_prob, micro.step, micro.mean, advantages)  # each [K, ...]
            return jax.lax.scan(partial(one_step, micro=micro), carry, rows)[0], None

        zero = LossMetrics.zero(config, len(table.timestep))
        carry = (jax.tree.map(jnp.zeros_like, trainable), zero)
        (grads, metrics), _ = jax.lax.scan(one_micro_batch, carry, batch)
        return jax.tree.map(lambda g: g / jnp.maximum(metrics.count, 1.0), grads), metrics

    return gradient


def stack_batches(
    trajectories: Sequence[Trajectory],
    advantages: np.ndarray,
    valid: np.ndarray,
    neighbours: bool = False,
) -> PolicyBatch:
    """Return M rollout batches as one `PolicyBatch`. The KL of the trajectories is left out; the
    advantages contain it.

    advantages: [M, B] or [M, K, B]. valid: bool [M, B]. neighbours: whether the steps follow each
    other.
    """

    def latents(t: Trajectory) -> list[jax.Array]:
        if neighbours:
            return [*t.x, t.x_next[-1]]
        return [array for pair in zip(t.x, t.x_next) for array in pair]

    rows = [(t.log_prob, t.step, t.text) for t in trajectories]
    log_prob, step, text = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return PolicyBatch(
        _stack([latents(t) for t in trajectories]),
        log_prob,
        step,
        None if trajectories[0].mean is None else _stack([t.mean for t in trajectories]),
        text,
        jnp.asarray(advantages, jnp.float32),
        jnp.asarray(valid, bool),
    )


@jax.jit
def _stack(arrays):
    """Return M lists of L arrays [...] as one array [M, L, ...], without another copy."""
    stacked = jnp.stack([array for row in arrays for array in row])
    return stacked.reshape(len(arrays), -1, *stacked.shape[1:])
