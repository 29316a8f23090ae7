"""What an epoch's updates are made of, without a model: sessions, rollouts and scores of zeros."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from grpo.compiled.functions import Functions
from grpo.learning.optimiser import init_state
from grpo.rollout import Trajectory
from grpo.run import RunSpec
from grpo.sampling import RolloutBatch, Session
from grpo.scoring.scores import GatheredScores
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.distributed import sharding as sharding_lib

STEPS = 2  # stochastic steps of every video


def session_of(spec: RunSpec, **changes) -> tuple[Session, list[tuple]]:
    """Return a session and the (batch, share_kept) of every update that it makes.

    Each update adds 1 to all numbers of the state.
    """
    made = []

    def update(state, frozen, batch, share_kept, kl_weight):
        made.append((batch, share_kept))
        metrics = types.SimpleNamespace(averages=lambda: {"ratio_min": 1.0, "ratio_max": 1.0})
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), metrics, {"grad_norm": 1.0}

    functions = Functions(spec)
    vars(functions)["updates"] = [update] * len(spec.preset.experts)
    names = ("prompts", "table", "decode", "pool", "progress")
    values = dict.fromkeys(names) | {
        "functions": functions,
        "frozen": lambda expert: f"frozen {expert}",
        "start": {},
        "to_device": lambda arrays: arrays,
    }
    return Session(**values | changes), made


def states_of(spec: RunSpec) -> dict:
    """Return the states of the trained experts, of three weights each."""
    method, optimiser = spec.method, spec.settings.optimiser

    def fresh():
        weights = {"w": jax.device_put(jnp.ones(3), sharding_lib.replicated(spec.mesh))}
        return init_state(weights, optimiser, method.adaptive_kl, method.lagged)

    return {name: fresh() for name in spec.trained}


def texts(prompt_of: np.ndarray) -> TextBatch:
    return TextBatch(jnp.zeros((len(prompt_of), 2, 3)), jnp.zeros((2, 3)), 1)


def rollout_of(spec: RunSpec, **changes) -> RolloutBatch:
    """Return the rollout of an epoch: its latents are zeros, the KL is 0 in the first step and rises from
    video to video in the second.
    """
    size, videos = spec.recipe.sample.batch_size, spec.settings.videos
    x, row = jnp.zeros((size, *spec.shape)), jnp.zeros((STEPS, size))
    steps = (x,) * STEPS
    trajectory = Trajectory(steps, steps, row, jnp.arange(STEPS), texts(np.arange(size)))
    batches = spec.settings.batches
    kl = np.stack([np.zeros(videos), np.linspace(0, 1, videos)])
    values = {
        "key": jax.random.key(0),
        "frames": 1,
        "prompt_of": np.repeat([3, 5], videos // 2),
        "texts": texts,
        "trajectories": {name: [trajectory] * batches for name in spec.preset.experts},
        "finished": [x] * batches,
        "kl": dict.fromkeys(spec.trained, kl),
        "importance": {},
        "evaluations": 0,
        "evaluations_saved": 0,
        "group_spread": 1.0,
    }
    return RolloutBatch(**values | changes)


def scores_of(values, parts=None) -> GatheredScores:
    """Return scores of which those that are not finite are not valid."""
    values = np.asarray(values, np.float64)
    valid = np.isfinite(values)
    return GatheredScores(
        values=values,
        valid=valid,
        texts=[""] * len(values),
        failures=int((~valid).sum()),
        retries=0,
        error="",
        parts=parts or {},
        finite=np.ones(len(values), bool),
        part_retries={},
    )
