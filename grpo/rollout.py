"""Sampling with the policy, keeping what training needs: x_t, x_next and log-prob of the stochastic steps.

One jitted denoising step serves every step of every batch; the loop over steps runs on the host, so the next
dispatch overlaps the running one and a step may be stochastic or not without a second program. Every random draw is
a function of (seed, epoch, sample number, step), so results depend neither on the batch nor on the devices.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grpo.policy import COMPILER_OPTIONS, Flat, Policy
from wan_jax import sde
from wan_jax.experts import Segment
from wan_jax.guidance import TextBatch, velocity
from wan_jax.schedule import Schedule

INITIAL = 2**31 - 1  # the "step" of the initial noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One rollout batch: the K stochastic steps, everything fp32."""

    x: jax.Array  # [K, B, F, H, W, C] latents before the step
    x_next: jax.Array  # [K, B, F, H, W, C] latents after it, as sampled
    log_prob: jax.Array  # [K, B]
    step: jax.Array  # [K] int32, index into the schedule
    text: TextBatch


@dataclasses.dataclass(frozen=True)
class StepTable:
    """The schedule's values per step: fp32 [T] each. g is the noise coefficient where the step is stochastic."""

    timestep: np.ndarray
    sigma: np.ndarray
    sigma_next: np.ndarray
    g: np.ndarray

    @classmethod
    def make(cls, schedule: Schedule, config: sde.SDEConfig) -> "StepTable":
        return cls(np.asarray(schedule.timesteps, np.float32), schedule.sigmas[:-1], schedule.sigmas[1:],
                   sde.diffusion_coefficient(config, schedule))

    def at(self, i):
        """(timestep, sigma, sigma_next, g) of step i, which may be traced."""
        return tuple(jnp.asarray(v)[i] for v in (self.timestep, self.sigma, self.sigma_next, self.g))


def sde_window(seed: int, epoch: int, size: int, low: int, high: int, segment: int = 0) -> np.ndarray:
    """The stochastic steps of an epoch: `size` of [low, high), ascending, a function of (seed, epoch, segment)."""
    if not 0 <= low <= high or not 0 <= size <= high - low:
        raise ValueError(f"{size} stochastic steps do not fit in the steps {low} to {high}")
    if size == high - low:
        return np.arange(low, high)
    rng = np.random.default_rng([seed, epoch, 0x5DE, *([segment] if segment else [])])
    return np.sort(rng.choice(np.arange(low, high), size, replace=False))


def step_quotas(parts: tuple[Segment, ...], experts: tuple[str, ...], trained: tuple[str, ...], size: int, low: int,
                high: int) -> tuple[int, ...]:
    """How many of an epoch's `size` stochastic steps each segment gets: in proportion to its steps in [low, high), and
    at least one for every trained expert, so that each has a gradient in every epoch.

    Raises ValueError when a trained expert has no step there, or there are fewer steps than experts to train.
    """
    room = [len(range(max(low, p.steps.start), min(high, p.steps.stop))) if experts[p.expert] in trained else 0
            for p in parts]
    for name in trained:
        if not any(n for p, n in zip(parts, room) if experts[p.expert] == name):
            split = ", ".join(f"{experts[p.expert]} steps {p.steps.start} to {p.steps.stop - 1}" for p in parts)
            raise ValueError(f"{name} would be trained without a step: sample.sde_range=({low}, {high}) holds none of "
                             f"its steps ({split}); change sample.sde_range, sample.shift or sample.steps, or leave "
                             "the expert out of train.experts")
    if size < len(trained) or size > sum(room):
        raise ValueError(f"sample.sde_steps={size} must be from {len(trained)} (one for each trained expert) to "
                         f"{sum(room)} (the trained experts' steps in sample.sde_range=({low}, {high}))")
    quotas = [min(n, 1) for n in room]
    while sum(quotas) < size:  # the next step goes where the share is furthest behind
        behind = [n / sum(room) - q / size if q < n else -1.0 for n, q in zip(room, quotas)]
        quotas[int(np.argmax(behind))] += 1
    return tuple(quotas)


def sample_noise(key: jax.Array, samples: jax.Array, step, shape: tuple[int, ...]) -> jax.Array:
    """N(0, 1) fp32 [B, *shape]; each sample's draw depends on (key, its number, step) only. samples: int32 [B]."""
    def draw(sample):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), step), shape, jnp.float32)
    return jax.vmap(draw)(samples)


@partial(jax.jit, static_argnames=("shape",))
def initial_noise(key, samples, shape):
    """x_T, fp32 [B, *shape]."""
    return sample_noise(key, samples, INITIAL, shape)


def make_step(policy: Policy, table: StepTable, guidance: float):
    """The jitted denoising step: (trainable, frozen, x, i, stochastic, text, key, samples) -> (x_next, log_prob)."""

    @partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def rollout_step(trainable: Flat, frozen, x, i, stochastic, text: TextBatch, key, samples):
        t, sigma, sigma_next, g = table.at(i)
        v = velocity(policy.module(trainable, frozen), x, t, text, guidance)
        noise = sample_noise(key, samples, i, x.shape[1:])
        x_next, log_prob, _, _ = sde.sde_step(x, v, sigma, sigma_next, jnp.where(stochastic, g, 0.0), noise)
        return x_next, log_prob

    return rollout_step


def rollout(step, trainable: Flat, frozen, x: jax.Array, text: TextBatch, *, key, samples, steps: range,
            window: np.ndarray) -> tuple[jax.Array, Trajectory | None]:
    """Runs the denoising steps `steps` for one batch from x fp32 [B,F,H,W,C] (`initial_noise` before step 0).

    Steps in `window` are stochastic and kept, the others are ODE steps. samples: int32 [B], global sample numbers in
    the epoch, sharded over the mesh. Returns (latents after the last step, Trajectory, or None when the window is
    empty). Everything is dispatched asynchronously.
    """
    kept = []
    for i in steps:
        stochastic = i in window
        x_next, log_prob = step(trainable, frozen, x, i, stochastic, text, key, samples)
        if stochastic:
            kept.append((x, x_next, log_prob))
        x = x_next
    if not kept:
        return x, None
    xs, nexts, log_probs = (jnp.stack(v) for v in zip(*kept))
    return x, Trajectory(xs, nexts, log_probs, jnp.asarray(window, jnp.int32), text)
