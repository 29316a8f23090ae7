"""The optimiser's moments and the moving average in host memory between updates, and one array at a
time on the device.

The gradient of all arrays is one program, as in `update.make_update`, whose peak then lacks 12
bytes a trained parameter; after it, array by array, the moments and the average come to the device,
are stepped, and go back. The same functions compute as without it, so results are the same but for
rounding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax

from grpo.learning import optimiser as update_lib
from grpo.learning.kl import AdaptiveKL
from grpo.learning.optimiser import (
    OptimiserConfig,
    TrainState,
    adamw,
    adapt_kl,
    apply_gradient,
    clipping,
    state_shapes,
)
from grpo.learning.policy import COMPILER_OPTIONS, Flat, Policy
from wan_jax.distributed import sharding as sharding_lib

KIND = "pinned_host"
ANY = "array"  # in place of each one's name, so that those of one shape share a program


def check_device(device: jax.Device):
    """Raises ValueError where the backend has no host memory that arrays could lie in."""
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if KIND not in kinds:
        raise ValueError(
            f"config.train.offload_optimiser=True needs memory of kind {KIND}, {device.platform} "
            f"has {', '.join(kinds)}; set it to False, and split the state with config.mesh.fsdp"
        )


def init_state(trainable: Flat, *args, **kwargs) -> TrainState:
    """`update.init_state` with moments and average in host memory, split over the devices' hosts as
    the weights are. No more than one array's are on the devices at any time, where all of them may
    not fit.
    """
    return joined(
        {
            name: jax.block_until_ready(leaving(update_lib.init_state({ANY: x}, *args, **kwargs)))
            for name, x in trainable.items()
        }
    )


def leaving(state: TrainState) -> TrainState:
    """The state with moments and average on their way to host memory."""
    return dataclasses.replace(state, opt=moved(state.opt, KIND), ema=moved(state.ema, KIND))


def to_device(tree):
    return moved(tree, "device")


def moved(tree, kind: str):
    """The tree with its arrays in memory of `kind`; counters stay where they are."""
    return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)) if x.ndim else x, tree
    )


def make_update(
    mean_gradient: Callable,
    policy: Policy,
    config: OptimiserConfig,
    mesh: jax.sharding.Mesh,
    *,
    adaptive_kl: AdaptiveKL | None = None,
    lagged: Sequence[str] = (),
) -> Callable:
    """Return what `update.make_update` does, for states of `init_state`, as the new ones are too.
    It donates the state.
    """
    shapes = state_shapes(policy, config, adaptive_kl, lagged)
    shardings = sharding_lib.param_shardings(shapes, mesh)

    @partial(
        jax.jit, out_shardings=(shardings.trainable, None, None), compiler_options=COMPILER_OPTIONS
    )
    def gradient(trainable, held, frozen, batch):
        grads, metrics = mean_gradient(trainable, held, frozen, batch)
        clipped, _ = clipping(config).update(grads, optax.EmptyState())
        return clipped, metrics, optax.global_norm(grads)

    @partial(jax.jit, donate_argnums=0, compiler_options=COMPILER_OPTIONS)
    def step(state: TrainState, grads, share_kept):
        new, updates = apply_gradient(adamw(config), config.ema_decay, state, grads, share_kept)
        return jax.tree.map(
            jax.lax.with_sharding_constraint, new, sharding_lib.param_shardings(new, mesh)
        ), optax.global_norm(updates)

    @partial(jax.jit, out_shardings=shardings.kl)
    def adapt(kl, updates, metrics):
        return adapt_kl(kl, updates, metrics, adaptive_kl)

    def update(state: TrainState, frozen, batch, share_kept=None):
        share_kept = share_kept or {}
        grads, metrics, grad_norm = gradient(state.trainable, state.held, frozen, batch)
        control = adapt(state.kl, state.updates, metrics)
        empty, opt = state.opt  # clipping's, adamw's
        done, norms = {}, []
        for name in sorted(grads):
            part = only(dataclasses.replace(state, opt=opt, kl=None), name)
            here = jax.block_until_ready(to_device(part))
            for x in jax.tree.leaves((part.opt, part.ema)):
                if x.sharding.memory_kind == KIND:
                    x.delete()  # the new ones take its place, where the host may not hold both
            new, norm = step(here, {ANY: grads.pop(name)}, share_kept)
            if done:  # two on the device: one that moves while the other is stepped
                jax.block_until_ready(list(done.values())[-1])
            done[name] = leaving(new)
            norms.append(norm)
        new = joined(done)
        norms = {"grad_norm": grad_norm, "update_norm": jnp.sqrt(sum(norm**2 for norm in norms))}
        norms |= {"kl_weight": state.kl.weight} if state.kl else {}
        return dataclasses.replace(new, opt=(empty, new.opt), kl=control), metrics, norms

    update.gradient = gradient  # to be compiled ahead: its peak is the whole's
    return update


def only(state: TrainState, name: str) -> TrainState:
    """The state of one trained array; counters are copied, so that all of it can be donated."""
    return jax.tree.map(
        lambda x: {ANY: x[name]} if is_flat(x) else jnp.copy(x), state, is_leaf=is_flat
    )


def joined(parts: dict[str, TrainState]) -> TrainState:
    """The inverse of `only`, of all names."""
    return jax.tree.map(
        lambda *xs: {k: x[ANY] for k, x in zip(parts, xs)} if is_flat(xs[0]) else xs[0],
        *parts.values(),
        is_leaf=is_flat,
    )


def is_flat(x) -> bool:
    """Whether `x` is a dict of arrays by name, not one of such dicts."""
    return isinstance(x, dict) and bool(x) and not any(isinstance(v, dict) for v in x.values())
