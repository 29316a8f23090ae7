"""Reward guidance in the rollout, by a head that is fitted again in every epoch.

Methods without an importance ratio learn from videos of any policy, so a rollout can be guided towards
the reward (Euphonium, arXiv 2602.04928, guides rollouts and distils the guidance; its rollouts are
stochastic). Evaluations are not guided. The head (`wan_jax.inference.reward_guidance`) knows the videos
of the model that it was trained on, so after each update of the policy it goes on learning from the
finished videos of the epoch and their rewards, which cost nothing more.

Every draw is a function of (seed, number of the head's updates), and the state of the head is part of
checkpoints, so a run that is resumed repeats it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from grpo.learning import abstract
from grpo.learning.policy import Flat
from grpo.random_streams import Stream
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.solvers import per_sample
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.inference.reward_guidance import load_head, predict, shift
from wan_jax.models import flat_params
from wan_jax.models.config import TransformerConfig
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.storage.model_dir import ModelDir

if TYPE_CHECKING:
    from grpo.compiled.functions import Functions
    from grpo.credit import Credit
    from grpo.run import RunSpec
    from grpo.sampling import RolloutBatch

Array = jax.Array
RATE = 1e-4  # learning rate of AdamW


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadState:
    """The head of a run.

    Attributes:
        arrays: its weights, fp32 by path.
        opt: the state of AdamW.
        updates: int32 [], number of its updates in the run.
    """

    arrays: Flat
    opt: Any
    updates: Array

    def tree(self) -> dict:
        """Return the arrays as a checkpoint stores them."""
        leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(self.opt))}
        return {"arrays": self.arrays, "opt": leaves, "updates": self.updates}

    def of_tree(self, tree: dict) -> "HeadState":
        """Return the state with the arrays of `tree`."""
        leaves, structure = jax.tree.flatten(self.opt)
        opt = jax.tree.unflatten(structure, [tree["opt"][str(i)] for i in range(len(leaves))])
        return HeadState(tree["arrays"], opt, tree["updates"])


@dataclasses.dataclass(frozen=True)
class HeadGuidance:
    """The guidance of a rollout, without the head's weights.

    Attributes:
        graph, like: structure of the head, and its weights, abstract.
        weight: sample.reward_guidance.
    """

    graph: Any
    like: Any
    weight: float

    @classmethod
    def of(cls, spec: "RunSpec") -> "HeadGuidance | None":
        """Return the guidance of a run; None without. Raises `UserError` as `load_head`."""
        sample = spec.recipe.sample
        if not sample.reward_guidance:
            return None
        return cls(
            *read_structure(sample.reward_head, spec.preset.transformer), sample.reward_guidance
        )

    def module(self, arrays: Flat) -> WanTransformer3D:
        """Return the head with these weights."""
        return nnx.merge(self.graph, flat_params.unflatten(self.like, arrays))

    def shift(self, arrays: Flat, x: Array, sigma, timestep, text: TextBatch) -> Array:
        """Return what is subtracted from the velocity, as `reward_guidance.shift`."""
        return self.weight * shift(self.module(arrays), x, sigma, timestep, text)

    @property
    def state(self) -> HeadState:
        """The abstract state."""
        arrays: Any = flat_params.flatten(self.like)
        return HeadState(
            arrays, jax.eval_shape(optax.adamw(RATE).init, arrays), abstract.array((), jnp.int32)
        )

    def make_refit(self, mesh: jax.sharding.Mesh) -> Callable:
        """Return the jitted update (HeadState, key, x0, text, rewards, valid) -> HeadState, which donates
        the state: one step of AdamW on the error of a batch of finished videos (`fit_error`).

        key: of the run. x0: fp32 [B, F, H, W, C]. rewards: fp32 [B]. valid: bool [B], videos with a
        reward; without any the weights do not change.
        """
        optimiser = optax.adamw(RATE)

        @functools.partial(
            jax.jit, donate_argnums=(0,), out_shardings=sharding_lib.replicated(mesh)
        )
        def refit(state: HeadState, key, x0, text: TextBatch, rewards, valid):
            key = jax.random.fold_in(key, state.updates)

            def error(arrays):
                return fit_error(self.module(arrays), key, x0, text, rewards, valid)

            changes, opt = optimiser.update(jax.grad(error)(state.arrays), state.opt, state.arrays)
            arrays: Any = optax.apply_updates(state.arrays, changes)
            new = HeadState(arrays, opt, state.updates)
            new = jax.tree.map(functools.partial(jnp.where, valid.any()), new, state)
            return dataclasses.replace(new, updates=state.updates + 1)

        return refit


@functools.cache
def read_structure(path: str, config: TransformerConfig) -> tuple[Any, Any]:
    """Return (graphdef, abstract state) of the head in a file. Raises `UserError` as `load_head`."""
    graph, state = nnx.split(load_head(path, config))
    return graph, jax.tree.map(lambda x: abstract.array(x.shape, x.dtype), state)


def fit_error(
    head: WanTransformer3D,
    key: Array,
    x0: Array,
    text: TextBatch,
    rewards: Array,
    valid: Array | None = None,
) -> Array:
    """Return mean((predict(x_s) - r)^2) over the valid videos, fp32 [], with x_s = (1 - s) x0 + s e,
    one uniform noise level s and new noise e for each video. valid: bool [B]; None: all.
    """
    level_key, noise_key = jax.random.split(key)
    sigma = jax.random.uniform(level_key, rewards.shape)
    predicted = predict(head, noised(noise_key, x0, sigma), 1000 * sigma, text)
    error = (predicted - rewards) ** 2
    if valid is None:
        return jnp.mean(error)
    return jnp.sum(jnp.where(valid, error, 0.0)) / jnp.maximum(valid.sum(), 1)


def noised(key: Array, x0: Array, sigma) -> Array:
    """Return x_s = (1 - s) x0 + s e with e ~ N(0, 1). sigma: s, scalar or [B]."""
    s = per_sample(sigma, x0)
    return (1 - s) * x0 + s * jax.random.normal(key, x0.shape, jnp.float32)


def initial_head(spec: "RunSpec", model: ModelDir) -> HeadState | None:
    """Return the head of a run before its first epoch, from its file; None without guidance. Raises
    `UserError` as `load_head`, also where the head was trained on another model.
    """
    sample = spec.recipe.sample
    if not sample.reward_guidance:
        return None
    head = load_head(sample.reward_head, spec.preset.transformer, model)
    arrays = flat_params.flatten(nnx.state(head, nnx.Param))
    state = HeadState(arrays, optax.adamw(RATE).init(arrays), jnp.zeros((), jnp.int32))
    return sharding_lib.replicate(state, spec.mesh)


def refit_head(
    functions: "Functions", head: HeadState, rollout: "RolloutBatch", credit: "Credit"
) -> HeadState:
    """Return the head after reward.head_refit updates on the rollout batches of an epoch, in turn. A
    video without a reward does not count.
    """
    recipe, mesh = functions.spec.recipe, functions.spec.mesh
    sharded, size = sharding_lib.batch_sharding(mesh), recipe.sample.batch_size
    key, refit = Stream.HEAD_REFIT.key(jax.random.key(recipe.seed)), functions.refit
    if refit is None:
        return head
    rewards = np.where(credit.valid, credit.total, 0.0).astype(np.float32)
    for update in range(recipe.reward.head_refit):
        batch = update % len(rollout.finished)
        rows = np.arange(batch * size, (batch + 1) * size)
        head = refit(
            head,
            key,
            rollout.finished[batch],
            rollout.texts(rollout.prompt_of[rows]),
            sharding_lib.place(rewards[rows], sharded),
            sharding_lib.place(credit.valid[rows], sharded),
        )
    return head
