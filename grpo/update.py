"""The update: one jitted program that accumulates gradients over micro-batches and steps, then
applies AdamW.

A micro-batch is a rollout batch: the same forward on the same batch layout as when its samples were
drawn, so the first update's ratio is 1 to float precision. Samples that failed to score are masked,
never removed. The gradient here is GRPO's; other methods bring theirs
(`grpo.methods.flow_matching`).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo.methods.losses import (
    KLControl,
    LossConfig,
    LossMetrics,
    Rows,
    adapted_kl,
    policy_gradient_terms,
)
from grpo.policy import COMPILER_OPTIONS, Flat, Policy
from grpo.rollout import StepTable, Trajectory
from wan_jax.diffusion.guidance import velocity
from wan_jax.distributed import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    learning_rate: float = 1e-4
    warmup_updates: int = 0
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9

    def __post_init__(self):
        if not 0 < self.learning_rate < 1:
            raise ValueError(
                f"train.learning_rate={self.learning_rate} must lie between 0 and 1; 1e-4 is usual"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"train.ema_decay={self.ema_decay} must be in [0, 1); 0 evaluates the raw weights"
            )
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"train.max_grad_norm={self.max_grad_norm} must be above 0; 1 is usual"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes; all arrays fp32 but the counters."""

    trainable: Flat
    opt: optax.OptState
    ema: Flat
    updates: jax.Array  # int32 [], optimiser steps so far
    kl: KLControl | None = None  # where the weight of the KL adapts
    # weights of earlier updates, where the method keeps them (`forward.ForwardConfig`,
    # `LossConfig.reference_decay`)
    old: Flat | None = None

    @property
    def held(self) -> "Held":
        return Held(self.kl.weight if self.kl else None, self.old)


class Held(NamedTuple):
    """What a gradient may need of the state beside the trained weights."""

    kl_weight: jax.Array | None = None  # fp32 [], in place of the configuration's
    old: Flat | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateBatch:
    """M micro-batches of one optimiser step."""

    # its arrays with a leading axis M (text embeddings [M, B, St, text_dim], negative [M, ...])
    trajectory: Trajectory
    advantages: jax.Array  # [M, B] fp32, or [M, K, B]: each step's own
    valid: jax.Array  # [M, B] bool: False leaves a sample out of the mean


def make_optimiser(config: OptimiserConfig) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW (Loshchilov & Hutter, arXiv 1711.05101), with a linear
    warm-up.
    """
    return optax.chain(clipping(config), adamw(config))


def clipping(config: OptimiserConfig) -> optax.GradientTransformation:
    """Needs all gradients at once, and has no state."""
    return optax.clip_by_global_norm(config.max_grad_norm)


def adamw(config: OptimiserConfig) -> optax.GradientTransformation:
    """Works on each array by itself."""
    rate = config.learning_rate
    if config.warmup_updates:
        rate = optax.linear_schedule(rate / config.warmup_updates, rate, config.warmup_updates - 1)
    return optax.adamw(
        rate,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def init_state(
    trainable: Flat,
    config: OptimiserConfig,
    loss: LossConfig | None = None,
    keeps_old: bool = False,
) -> TrainState:
    """Fresh optimiser state; the EMA, and the old weights where there are any, start as a copy of
    the weights. All of it lies on the weights' mesh, as it does after an update, so that the update
    compiles once. loss: as of the update; None: its KL weight does not adapt.
    """

    def fresh(trainable):
        return make_optimiser(config).init(trainable), jnp.zeros((), jnp.int32), init_kl(loss)

    mesh = next(iter(trainable.values())).sharding.mesh
    shardings = mesh_lib.param_shardings(jax.eval_shape(fresh, trainable), mesh)
    opt, updates, kl = jax.jit(fresh, out_shardings=shardings)(trainable)
    ema, old = jax.tree.map(jnp.copy, (trainable, trainable if keeps_old else None))
    return TrainState(trainable, opt, ema, updates, kl, old)


def init_kl(loss: LossConfig | None) -> KLControl | None:
    """The first weight, where it adapts."""
    if loss is None or loss.kl_target is None:
        return None
    return KLControl(jnp.asarray(loss.kl_beta, jnp.float32), jnp.zeros((), jnp.float32))


def state_shapes(
    policy: Policy, config: OptimiserConfig, loss: LossConfig | None = None, keeps_old: bool = False
) -> TrainState:
    """`init_state` without arrays: a TrainState of `jax.ShapeDtypeStruct`s."""
    shapes = policy.trainable
    return TrainState(
        shapes,
        jax.eval_shape(make_optimiser(config).init, shapes),
        shapes,
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.eval_shape(lambda: init_kl(loss)),
        shapes if keeps_old else None,
    )


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
    """Sum of the loss over the valid rows of one micro-batch at step i, and its metrics. The KL is
    to the old weights where there are any.
    """
    t, *step = table.at(i)
    weight = (
        None
        if table.weight is None
        else jnp.broadcast_to(jnp.asarray(table.weight)[i], advantages.shape)
    )
    rows = Rows(
        x,
        x_next,
        old_log_prob,
        advantages,
        *(jnp.broadcast_to(s, advantages.shape) for s in step),
        mask=valid,
        old_mean=old_mean,
        weight=weight,
        preserving=table.preserving,
    )
    v = velocity(policy.module(trainable, frozen), x, t, text, guidance)
    v_ref = None
    if config.kl_beta > 0:
        reference = (
            policy.reference(frozen) if held.old is None else policy.module(held.old, frozen)
        )
        v_ref = velocity(reference, x, t, text, guidance)
    teacher = (
        velocity(policy.reference(frozen), x, t, text, config.distill_guidance)
        if config.distill_weight > 0
        else None
    )
    loss, metrics = policy_gradient_terms(rows, v, v_ref, config, held.kl_weight, teacher)
    return jnp.sum(jnp.where(valid, loss, 0.0)), metrics


def make_gradient(
    policy: Policy, table: StepTable, guidance: float, config: LossConfig
) -> Callable:
    """(trainable, Held, frozen, UpdateBatch) -> (mean gradient of the objective over the valid
    rows, LossMetrics).
    """
    grad_fn = jax.grad(partial(objective, policy, table, guidance, config), has_aux=True)

    def gradient(trainable: Flat, held: Held, frozen, batch: UpdateBatch):
        def one_step(carry, row, text, valid):
            *row, advantages = row
            grads, metrics = grad_fn(trainable, frozen, *row, text, advantages, valid, held)
            return (jax.tree.map(jnp.add, carry[0], grads), carry[1].merge(metrics)), None

        def one_micro_batch(carry, micro):
            t, advantages, valid = micro
            rows = (
                t.x,
                t.x_next,
                t.log_prob,
                t.step,
                t.mean,
                jnp.broadcast_to(advantages, t.log_prob.shape),
            )
            body = partial(one_step, text=t.text, valid=valid)  # rows: each [K, ...]
            return jax.lax.scan(body, carry, rows)[0], None

        zero, inf = jnp.zeros((), jnp.float32), jnp.full((), jnp.inf, jnp.float32)
        none_yet = LossMetrics(
            count=zero,
            ratio=zero,
            ratio_min=inf,
            ratio_max=-inf,
            clipped=zero,
            approx_kl=zero,
            policy_loss=zero,
            kl=zero,
            distillation=zero if config.distill_weight > 0 else None,
        )
        carry = (jax.tree.map(jnp.zeros_like, trainable), none_yet)
        (grads, metrics), _ = jax.lax.scan(
            one_micro_batch, carry, (batch.trajectory, batch.advantages, batch.valid)
        )
        return jax.tree.map(lambda g: g / jnp.maximum(metrics.count, 1.0), grads), metrics

    return gradient


def apply_gradient(
    optimiser: optax.GradientTransformation,
    ema_decay: float,
    state: TrainState,
    grads: Flat,
    old_kept=None,
) -> tuple[TrainState, Flat]:
    """The state after one optimiser step, and what was added to the weights. The average begins
    fast: it keeps at most (1 + n) / (10 + n) of itself in update n. Old weights keep `old_kept` of
    themselves, a scalar; the rest is new.
    """
    updates, opt = optimiser.update(grads, state.opt, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    count = state.updates + 1
    decay = jnp.minimum((1 + count) / (10 + count), ema_decay)
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, trainable)
    old = state.old and jax.tree.map(
        lambda o, p: old_kept * o + (1 - old_kept) * p, state.old, trainable
    )
    return TrainState(trainable, opt, ema, count, state.kl, old), updates


def after_update(
    kl: KLControl | None, updates: jax.Array, metrics, config: LossConfig | None
) -> KLControl | None:
    """The KL's control after another update than the `updates` so far; None where it does not
    adapt.
    """
    return kl and adapted_kl(kl, metrics.kl / jnp.maximum(metrics.count, 1.0), updates == 0, config)


def make_update(
    policy: Policy,
    table: StepTable,
    guidance: float,
    config: LossConfig,
    optimiser_config: OptimiserConfig,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable:
    """GRPO's jitted update: `update_of` its gradient."""
    return update_of(
        make_gradient(policy, table, guidance, config),
        policy,
        optimiser_config,
        mesh,
        config,
        keeps_old=config.reference_decay is not None,
    )


def update_of(
    gradient: Callable,
    policy: Policy,
    optimiser_config: OptimiserConfig,
    mesh: jax.sharding.Mesh | None = None,
    loss: LossConfig | None = None,
    keeps_old: bool = False,
) -> Callable:
    """The jitted update: (TrainState, frozen, batch[, old_kept]) -> (TrainState, metrics, norms).
    Donates the state.

    gradient: (trainable, Held, frozen, batch) -> (gradient, metrics). norms: {'grad_norm',
    'update_norm'}, fp32 scalars, the gradient's before clipping; and 'kl_weight', the one it had,
    where that adapts. mesh: where the state lies; the new one then lies as the old one, where XLA
    would split biases by its own choice and the next call compile again. loss: whose KL weight may
    adapt.
    """
    optimiser = make_optimiser(optimiser_config)
    state = state_shapes(policy, optimiser_config, loss, keeps_old)
    shardings = (mesh_lib.param_shardings(state, mesh), None, None) if mesh else None

    @partial(
        jax.jit, donate_argnums=(0,), out_shardings=shardings, compiler_options=COMPILER_OPTIONS
    )
    def update(state: TrainState, frozen, batch, old_kept=None):
        grads, metrics = gradient(state.trainable, state.held, frozen, batch)
        new, updates = apply_gradient(optimiser, optimiser_config.ema_decay, state, grads, old_kept)
        norms = {"grad_norm": optax.global_norm(grads), "update_norm": optax.global_norm(updates)}
        norms |= {"kl_weight": state.kl.weight} if state.kl else {}
        return (
            dataclasses.replace(new, kl=after_update(state.kl, state.updates, metrics, loss)),
            metrics,
            norms,
        )

    return update


def stack_batches(
    trajectories: list[Trajectory], advantages: jax.Array, valid: jax.Array
) -> UpdateBatch:
    """Rollout batches [K, B, ...] to one `UpdateBatch`, without the KL, which is in the advantages.
    On the host: advantages [M, B] or [M, K, B], valid [M, B].
    """
    trajectories = [dataclasses.replace(t, kl=None) for t in trajectories]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trajectories)
    return UpdateBatch(stacked, jnp.asarray(advantages, jnp.float32), jnp.asarray(valid, bool))
