"""The optimiser step and the state that it changes, the same for every method.

One jitted function computes a method's gradient over all micro-batches (`Method.make_gradient`) and
applies AdamW, the moving average and the copies of earlier weights.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo.learning.kl import AdaptiveKL, KLControl
from grpo.learning.policy import COMPILER_OPTIONS, Flat, Policy
from wan_jax.distributed import sharding as sharding_lib


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
    # copies of earlier weights by name, where the method keeps any (`Method.lagged`)
    lagged: dict[str, Flat] = dataclasses.field(default_factory=dict)

    @property
    def held(self) -> "Held":
        return Held(self.kl.weight if self.kl else None, self.lagged)


class Held(NamedTuple):
    """What a gradient may need of the state beside the trained weights."""

    kl_weight: jax.Array | None  # fp32 [], instead of the method's
    lagged: dict[str, Flat]


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
    adaptive_kl: AdaptiveKL | None = None,
    lagged: Sequence[str] = (),
) -> TrainState:
    """Return a fresh state: the average and the lagged copies start as copies of the weights.

    All of it is placed on the weights' mesh as it is after an update, so the update compiles once.
    """

    def fresh(trainable):
        kl = adaptive_kl and adaptive_kl.init()
        return make_optimiser(config).init(trainable), jnp.zeros((), jnp.int32), kl

    mesh = next(iter(trainable.values())).sharding.mesh
    shardings = sharding_lib.param_shardings(jax.eval_shape(fresh, trainable), mesh)
    opt, updates, kl = jax.jit(fresh, out_shardings=shardings)(trainable)
    ema, copies = jax.tree.map(jnp.copy, (trainable, dict.fromkeys(lagged, trainable)))
    return TrainState(trainable, opt, ema, updates, kl, copies)


def state_shapes(
    policy: Policy,
    config: OptimiserConfig,
    adaptive_kl: AdaptiveKL | None = None,
    lagged: Sequence[str] = (),
) -> TrainState:
    """Return `init_state` without arrays: a TrainState of `jax.ShapeDtypeStruct`s."""
    shapes = policy.trainable
    return TrainState(
        trainable=shapes,
        opt=jax.eval_shape(make_optimiser(config).init, shapes),
        ema=shapes,
        updates=jax.ShapeDtypeStruct((), jnp.int32),
        kl=jax.eval_shape(adaptive_kl.init) if adaptive_kl else None,
        lagged=dict.fromkeys(lagged, shapes),
    )


def apply_gradient(
    optimiser: optax.GradientTransformation,
    ema_decay: float,
    state: TrainState,
    grads: Flat,
    share_kept: Mapping[str, jax.Array],
) -> tuple[TrainState, Flat]:
    """Return the state after one optimiser step, and what was added to the weights.

    The average begins fast: it keeps at most (1 + n) / (10 + n) of itself in update n. A lagged
    copy keeps `share_kept` of itself, fp32 []; the rest is new.
    """
    updates, opt = optimiser.update(grads, state.opt, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    count = state.updates + 1
    decay = jnp.minimum((1 + count) / (10 + count), ema_decay)
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, trainable)
    lagged = {}
    for name, copy in state.lagged.items():
        kept = share_kept[name]
        lagged[name] = jax.tree.map(lambda o, p, k=kept: k * o + (1 - k) * p, copy, trainable)
    return TrainState(trainable, opt, ema, count, state.kl, lagged), updates


def adapt_kl(
    kl: KLControl | None, updates: jax.Array, metrics, adaptive_kl: AdaptiveKL | None
) -> KLControl | None:
    """Return the KL's control after another update than the `updates` so far; None where it does
    not adapt.
    """
    if kl is None:
        return None
    return adaptive_kl.step(kl, metrics.kl / jnp.maximum(metrics.count, 1.0), updates == 0)


def make_update(
    gradient: Callable,
    policy: Policy,
    config: OptimiserConfig,
    mesh: jax.sharding.Mesh | None = None,
    *,
    adaptive_kl: AdaptiveKL | None = None,
    lagged: Sequence[str] = (),
) -> Callable:
    """Return the jitted update: (TrainState, frozen, batch, share_kept) -> (TrainState, metrics,
    norms). It donates the state.

    gradient: `Method.make_gradient`'s. share_kept: {name: float} of the lagged copies. norms:
    {'grad_norm', 'update_norm'}, fp32 scalars, the gradient's before clipping; and 'kl_weight', the
    one it had, where that adapts. mesh: of the state; the new one is then placed as the old one,
    where XLA would split biases by its own choice and the next call compile again.
    """
    optimiser = make_optimiser(config)
    state = state_shapes(policy, config, adaptive_kl, lagged)
    shardings = (sharding_lib.param_shardings(state, mesh), None, None) if mesh else None

    @partial(
        jax.jit,
        donate_argnums=(0,),
        out_shardings=shardings,
        compiler_options=COMPILER_OPTIONS,
    )
    def update(state: TrainState, frozen, batch, share_kept=None):
        grads, metrics = gradient(state.trainable, state.held, frozen, batch)
        new, updates = apply_gradient(optimiser, config.ema_decay, state, grads, share_kept or {})
        norms = {"grad_norm": optax.global_norm(grads), "update_norm": optax.global_norm(updates)}
        norms |= {"kl_weight": state.kl.weight} if state.kl else {}
        kl = adapt_kl(state.kl, state.updates, metrics, adaptive_kl)
        return dataclasses.replace(new, kl=kl), metrics, norms

    return update
