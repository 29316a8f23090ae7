"""The optimiser step and the state that it changes, for all methods.

One jitted function computes a method's gradient over all micro-batches (`Method.make_gradient`),
applies AdamW, and updates the moving average and the copies of earlier weights.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo.learning import abstract
from grpo.learning.kl import AdaptiveKL, KLControl
from grpo.learning.policy import COMPILER_OPTIONS, Flat, Policy
from wan_jax.choices import DTYPES
from wan_jax.distributed import sharding as sharding_lib


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """Settings of the optimiser and of the moving average, as in the section `train` of a recipe.
    Raises ValueError, with the key and the value, on values that cannot train.
    """

    learning_rate: float = 1e-4
    warmup_updates: int = 0
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9
    moments_dtype: str = "float32"

    def __post_init__(self):
        if not 0 < self.learning_rate < 1:
            raise ValueError(
                f"train.learning_rate={self.learning_rate} must be between 0 and 1; 1e-4 is usual"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"train.ema_decay={self.ema_decay} must be in [0, 1); 0 evaluates the raw weights"
            )
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"train.max_grad_norm={self.max_grad_norm} must be above 0; 1 is usual"
            )
        if self.moments_dtype not in DTYPES:
            raise ValueError(
                f"train.moments_dtype={self.moments_dtype!r} must be one of {', '.join(DTYPES)}"
            )

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes of the moments and of the average of one trained parameter."""
        return 2 * jnp.dtype(self.moments_dtype).itemsize + (4 if self.ema_decay else 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that training changes. All arrays are fp32, but for counters, and moments where
    `moments_dtype` is 'bfloat16'.

    Attributes:
        trainable: the trained arrays by name.
        opt: the state of the optimiser: (clipping's, AdamW's).
        ema: the moving average of the trained arrays; {} where ema_decay is 0.
        updates: int32 [], number of optimiser steps so far.
        kl: state of the KL's weight where it adapts.
        lagged: the copies of earlier weights by name (`Method.lagged`).
    """

    trainable: Flat
    opt: Any
    ema: Flat
    updates: jax.Array
    kl: KLControl | None = None
    lagged: dict[str, Flat] = dataclasses.field(default_factory=dict)

    @property
    def averaged(self) -> Flat:
        """The weights to evaluate and to export: the average, or the trained arrays without one."""
        return self.ema or self.trainable

    def gradient_inputs(self, kl_weight: jax.Array | None = None) -> "GradientInputs":
        """Return what a gradient may need besides the trained arrays. kl_weight: fp32 [], where the
        guard sets it.
        """
        return GradientInputs(self.kl.weight if self.kl else kl_weight, self.lagged)


class GradientInputs(NamedTuple):
    """The state that a gradient may need besides the trained arrays.

    Attributes:
        kl_weight: fp32 [], used instead of the method's; None: the method's.
        lagged: the copies of earlier weights by name.
    """

    kl_weight: jax.Array | None
    lagged: dict[str, Flat]


def make_optimiser(config: OptimiserConfig) -> optax.GradientTransformation:
    """Return clipping of the global norm, followed by AdamW (Loshchilov & Hutter, arXiv 1711.05101)
    with a linear warm-up.
    """
    return optax.chain(clipping(config), adamw(config))


def clipping(config: OptimiserConfig) -> optax.GradientTransformation:
    """Return the clipping of the global norm. It needs the gradients of all arrays and has no
    state.
    """
    return optax.clip_by_global_norm(config.max_grad_norm)


def learning_rate(config: OptimiserConfig, update: int) -> float:
    """Return the learning rate of an update, counted from 0: W updates of a linear warm-up, then
    the full rate.
    """
    warmup = config.warmup_updates
    return config.learning_rate * (min(1.0, (update + 1) / warmup) if warmup else 1.0)


def adamw(config: OptimiserConfig, first: jax.Array | int = 0) -> optax.GradientTransformation:
    """Return AdamW, which treats each array independently. first: number of the first array among all
    that are trained, which the noise of its moments' rounding follows from.
    """
    rate = config.learning_rate
    if config.warmup_updates:
        rate = optax.linear_schedule(rate / config.warmup_updates, rate, config.warmup_updates - 1)
    rule = optax.adamw(
        rate,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    return rule if config.moments_dtype == "float32" else bfloat16_moments(rule, first)


def bfloat16_moments(
    rule: optax.GradientTransformation, first: jax.Array | int = 0
) -> optax.GradientTransformation:
    """Return AdamW with moments that are kept in bfloat16, and computed in fp32. first: as of `adamw`.

    They are rounded stochastically. Rounded to the nearest value, a second moment would never fall: at
    b2 = 0.999 an update lowers it by at most 0.1 %, and neighbouring values of bfloat16 differ by 0.4
    to 0.8 %. The noise follows from the number of updates, so a run is repeated to the bit.
    """

    def stored(state: Any, as_stored: Callable[[Any, int], Any]) -> Any:
        """Return a state with other moments. as_stored: (moment of all arrays, its number) -> the same."""
        adam, *others = state
        adam = adam._replace(mu=as_stored(adam.mu, 0), nu=as_stored(adam.nu, 1))
        return (adam, *others)

    def cast(dtype) -> Callable[[Any, int], Any]:
        return lambda moment, _: jax.tree.map(lambda x: x.astype(dtype), moment)

    def init(params):
        return stored(rule.init(params), cast(jnp.bfloat16))

    def update(updates, state: Any, params=None):
        changes, new = rule.update(updates, stored(state, cast(jnp.float32)), params)
        count = state[0].count.astype(jnp.uint32)

        def rounded(moment: Any, number: int) -> Any:
            leaves, structure = jax.tree.flatten(moment)
            seed = hash_bits(2 * count + number) + jnp.asarray(first, jnp.uint32)
            return jax.tree.unflatten(
                structure, [round_stochastically(x, seed + i) for i, x in enumerate(leaves)]
            )

        return changes, stored(new, rounded)

    return optax.GradientTransformation(init, update)


def round_stochastically(x: jax.Array, seed: jax.Array) -> jax.Array:
    """Return fp32 values in bfloat16: one of the two neighbours, with `x` as the expected value.

    seed: uint32 []. The noise is a hash of it and of a value's position, which XLA computes in the same
    loop as the value. Random numbers of JAX would be arrays of several times the size of `x` on a GPU.
    """
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    noise = hash_bits(position ^ hash_bits(seed)) >> 16
    upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) >> 16
    rounded = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def hash_bits(x: jax.Array) -> jax.Array:
    """Return a hash of each uint32: the last steps of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def init_state(
    trainable: Flat,
    config: OptimiserConfig,
    adaptive_kl: AdaptiveKL | None = None,
    lagged: Sequence[str] = (),
) -> TrainState:
    """Return the state before the first update. The average, where there is one, and the lagged copies
    start as copies of the weights.

    All arrays have the shardings that they have after an update, on the weights' mesh, so that the
    update is compiled once.
    """

    def fresh(trainable):
        kl = adaptive_kl.init() if adaptive_kl else None
        return make_optimiser(config).init(trainable), jnp.zeros((), jnp.int32), kl

    sharding = next(iter(trainable.values())).sharding
    assert isinstance(sharding, jax.sharding.NamedSharding), sharding
    mesh = sharding.mesh
    assert isinstance(mesh, jax.sharding.Mesh), mesh
    shardings = sharding_lib.param_shardings(jax.eval_shape(fresh, trainable), mesh)
    opt, updates, kl = jax.jit(fresh, out_shardings=shardings)(trainable)
    ema = jax.tree.map(jnp.copy, trainable) if config.ema_decay else {}
    copies = jax.tree.map(jnp.copy, dict.fromkeys(lagged, trainable))
    return TrainState(trainable, opt, ema, updates, kl, copies)


def state_shapes(
    policy: Policy,
    config: OptimiserConfig,
    adaptive_kl: AdaptiveKL | None = None,
    lagged: Sequence[str] = (),
) -> TrainState:
    """Return the state of `init_state` with abstract arrays."""
    shapes: Any = policy.trainable
    return TrainState(
        trainable=shapes,
        opt=jax.eval_shape(make_optimiser(config).init, shapes),
        ema=shapes if config.ema_decay else {},
        updates=abstract.array((), jnp.int32),
        kl=jax.eval_shape(adaptive_kl.init) if adaptive_kl else None,
        lagged={name: shapes for name in lagged},  # noqa: C420
    )


def apply_gradient(
    optimiser: optax.GradientTransformation,
    ema_decay: float,
    state: TrainState,
    grads: Flat,
    share_kept: Mapping[str, jax.Array],
) -> tuple[TrainState, Flat]:
    """Return the state after one optimiser step, and the changes of the weights.

    In update n the average, where there is one, keeps min((1 + n) / (10 + n), ema_decay) of itself, and a lagged copy
    keeps its `share_kept`, fp32 []. The rest is the new weights.
    """
    changes: Any
    changes, opt = optimiser.update(grads, state.opt, state.trainable)
    trainable: Any = optax.apply_updates(state.trainable, changes)
    count = state.updates + 1
    decay = jnp.minimum((1 + count) / (10 + count), ema_decay)
    ema = {name: decay * e + (1 - decay) * trainable[name] for name, e in state.ema.items()}
    lagged = {}
    for name, copy in state.lagged.items():
        share = share_kept[name]
        lagged[name] = jax.tree.map(
            lambda old, new, share=share: share * old + (1 - share) * new, copy, trainable
        )
    return TrainState(trainable, opt, ema, count, state.kl, lagged), changes


def adapt_kl(
    kl: KLControl | None, updates: jax.Array, metrics, adaptive_kl: AdaptiveKL | None
) -> KLControl | None:
    """Return the KL's control after one more update than `updates`, int32 []; None where the weight
    does not adapt. metrics: of that update, with sums `kl` and `count`.
    """
    if kl is None or adaptive_kl is None:
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
    """Return the jitted update (TrainState, frozen, batch, share_kept, kl_weight) -> (TrainState,
    metrics, norms). It donates the state.

    share_kept: {name: float} of the lagged copies. kl_weight: float, weight of the KL where the guard
    sets it (train.on_alarm=kl), else None; another value compiles nothing. norms: fp32 scalars
    'grad_norm', before clipping, 'update_norm', and 'kl_weight', the weight that was used, where it
    adapts.

    Args:
        gradient: the result of `Method.make_gradient`.
        policy: its structure.
        config: settings of the optimiser.
        mesh: of the state. The new state then has the shardings of the old one; otherwise XLA may
            choose others, and the next call is compiled again.
        adaptive_kl: the rule by which the KL's weight adapts.
        lagged: names of the copies of earlier weights.
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
    def update(state: TrainState, frozen, batch, share_kept=None, kl_weight=None):
        inputs = state.gradient_inputs(kl_weight)
        grads, metrics = gradient(state.trainable, inputs, frozen, batch)
        new, changes = apply_gradient(optimiser, config.ema_decay, state, grads, share_kept or {})
        norms = {"grad_norm": optax.global_norm(grads), "update_norm": optax.global_norm(changes)}
        norms |= {"kl_weight": state.kl.weight} if state.kl else {}
        kl = adapt_kl(state.kl, state.updates, metrics, adaptive_kl)
        return dataclasses.replace(new, kl=kl), metrics, norms

    return update
