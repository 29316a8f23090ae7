"""The optimiser step with moments and moving average offloaded to host memory between updates; one
array at a time is on the device.

The gradient of all arrays is one jitted function, as in `optimiser.make_update`; its peak is lower by
the bytes of moments and average, 12 a trained parameter in fp32. After it, array by array, the moments
and the average are copied to the device, stepped, and copied back. The step is computed by the same
functions as without offloading, so results are the same but for rounding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo.learning import abstract
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
ANY = "array"  # the name of each array while it is stepped: equal shapes share a compiled function


def check_device(device: jax.Device) -> None:  # pyright: ignore[reportInvalidTypeForm]
    """Raise ValueError where the backend has no host memory for arrays."""
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if KIND not in kinds:
        raise ValueError(
            f"config.train.offload_optimiser=True needs memory of kind {KIND}, {device.platform} "
            f"has {', '.join(kinds)}; set it to False, and split the state with config.mesh.fsdp"
        )


def init_state(trainable: Flat, *args, **kwargs) -> TrainState:
    """Return the state of `optimiser.init_state`, with moments and average in host memory, split
    over the hosts as the weights are.

    The moments and average of at most one array are on the devices at any time, because all of them
    may not fit.
    """
    states = {}
    for name, x in trainable.items():
        states[name] = jax.block_until_ready(
            to_host(update_lib.init_state({ANY: x}, *args, **kwargs))
        )
    return join_states(states)


def to_host(state: TrainState) -> TrainState:
    """Return a state with moments and average in host memory. The copies are asynchronous."""
    return dataclasses.replace(
        state, opt=to_memory(state.opt, KIND), ema=to_memory(state.ema, KIND)
    )


def to_device(tree):
    """Return a tree with its arrays in device memory."""
    return to_memory(tree, "device")


def to_memory(tree, kind: str):
    """Return a tree with its arrays, which may be abstract, in memory of a kind. Scalars are not
    moved.
    """

    def move(x):
        if not x.ndim:
            return x
        sharding = x.sharding.with_memory_kind(kind)
        if isinstance(x, jax.ShapeDtypeStruct):
            return abstract.array(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return jax.tree.map(move, tree)


@dataclasses.dataclass(frozen=True)
class OffloadedUpdate:
    """The optimiser step for states of `init_state`: a call has the arguments, results and donation
    of `optimiser.make_update`'s.

    Attributes:
        gradient: jitted, (trainable, GradientInputs, frozen, batch) -> (clipped gradient, metrics,
            norm of the gradient). Its peak memory is that of the whole optimiser step.
        step: jitted, (state of one array, its gradient, share_kept, its number among all) -> (state,
            norm of the update).
        adapt: jitted, (KL control, updates so far, metrics) -> KL control.
    """

    gradient: Callable
    step: Callable
    adapt: Callable

    def __call__(self, state: TrainState, frozen, batch, share_kept=None, kl_weight=None):
        # the gradient of all arrays
        grads, metrics, grad_norm = self.gradient(
            state.trainable, state.gradient_inputs(kl_weight), frozen, batch
        )
        control = self.adapt(state.kl, state.updates, metrics)
        # the step, array by array
        clipping_state, adamw_state = state.opt
        stepped, norms = {}, []
        for number, name in enumerate(sorted(grads)):
            one = only(dataclasses.replace(state, opt=adamw_state, kl=None), name)
            on_device = jax.block_until_ready(to_device(one))
            for x in jax.tree.leaves((one.opt, one.ema)):
                if x.sharding.memory_kind == KIND:
                    x.delete()  # the host may not have memory for both old and new ones
            gradient = {ANY: grads.pop(name)}
            new, norm = self.step(on_device, gradient, share_kept or {}, np.uint32(number))
            if stepped:  # at most two are on the device: one is copied while the next is stepped
                jax.block_until_ready(list(stepped.values())[-1])
            stepped[name] = to_host(new)
            norms.append(norm)
        new = join_states(stepped)
        # what `optimiser.make_update` returns
        norms = {"grad_norm": grad_norm, "update_norm": jnp.sqrt(sum(norm**2 for norm in norms))}
        norms |= {"kl_weight": state.kl.weight} if state.kl else {}
        return dataclasses.replace(new, opt=(clipping_state, new.opt), kl=control), metrics, norms


def make_update(
    mean_gradient: Callable,
    policy: Policy,
    config: OptimiserConfig,
    mesh: jax.sharding.Mesh,
    *,
    adaptive_kl: AdaptiveKL | None = None,
    lagged: Sequence[str] = (),
) -> OffloadedUpdate:
    """Return the update of `optimiser.make_update` for states of `init_state`."""
    shapes = state_shapes(policy, config, adaptive_kl, lagged)
    shardings = sharding_lib.param_shardings(shapes, mesh)

    @partial(
        jax.jit, out_shardings=(shardings.trainable, None, None), compiler_options=COMPILER_OPTIONS
    )
    def gradient(trainable, inputs, frozen, batch):
        grads, metrics = mean_gradient(trainable, inputs, frozen, batch)
        clipped, _ = clipping(config).update(grads, optax.EmptyState())
        return clipped, metrics, optax.global_norm(grads)

    @partial(jax.jit, donate_argnums=0, compiler_options=COMPILER_OPTIONS)
    def step(state: TrainState, grads, share_kept, number):
        rule = adamw(config, number)
        new, updates = apply_gradient(rule, config.ema_decay, state, grads, share_kept)
        return jax.tree.map(
            jax.lax.with_sharding_constraint, new, sharding_lib.param_shardings(new, mesh)
        ), optax.global_norm(updates)

    @partial(jax.jit, out_shardings=shardings.kl)
    def adapt(kl, updates, metrics):
        return adapt_kl(kl, updates, metrics, adaptive_kl)

    return OffloadedUpdate(gradient, step, adapt)


def only(state: TrainState, name: str) -> TrainState:
    """Return the state of one trained array. Counters are copied, so that all of it can be donated."""
    return jax.tree.map(
        lambda x: {ANY: x[name]} if is_flat(x) else jnp.copy(x), state, is_leaf=is_flat
    )


def join_states(states: dict[str, TrainState]) -> TrainState:
    """Return the state of all arrays from the states of each, the inverse of `only`."""
    return jax.tree.map(
        lambda *xs: {k: x[ANY] for k, x in zip(states, xs)} if is_flat(xs[0]) else xs[0],
        *states.values(),
        is_leaf=is_flat,
    )


def is_flat(x) -> bool:
    """Return whether `x` is a dict of arrays by name, and not one of such dicts."""
    return isinstance(x, dict) and bool(x) and not any(isinstance(v, dict) for v in x.values())
