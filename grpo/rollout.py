"""Sampling with the policy, keeping what training needs: x_t, x_next and log-prob of the stochastic steps.

One jitted denoising step serves every step of every batch; the loop over steps runs on the host, so the next
dispatch overlaps the running one and a step may be stochastic or not without a second program. Every random draw is
a function of (seed, epoch, sample number, step), so results depend neither on the batch nor on the devices.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grpo.policy import COMPILER_OPTIONS, Flat, Policy
from wan_jax import sde
from wan_jax.experts import Segment
from wan_jax.guidance import TextBatch, velocity
from wan_jax.schedule import Schedule

CREDITS = ("none", "longcat")
WINDOWS = ("any", "random", "progressive", "decay", "exp_decay")
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
    mean: jax.Array | None = None  # [K, B, F, H, W, C] of the step's Gaussian, where the objective needs it


@dataclasses.dataclass(frozen=True)
class StepTable:
    """The schedule's values per step: fp32 [T] each. g is the noise coefficient where the step is stochastic."""

    timestep: np.ndarray
    sigma: np.ndarray
    sigma_next: np.ndarray
    g: np.ndarray
    weight: np.ndarray | None = None  # what the step counts in the loss (`step_credit`); None: as all others
    preserving: bool = False  # the mean of a stochastic step is CPS'

    @classmethod
    def make(cls, schedule: Schedule, config: sde.SDEConfig, credit: str = "none") -> "StepTable":
        return cls(np.asarray(schedule.timesteps, np.float32), schedule.sigmas[:-1], schedule.sigmas[1:],
                   sde.diffusion_coefficient(config, schedule), step_credit(credit, schedule), config.preserving)

    def at(self, i):
        """(timestep, sigma, sigma_next, g) of step i, which may be traced."""
        return tuple(jnp.asarray(v)[i] for v in (self.timestep, self.sigma, self.sigma_next, self.g))


def step_credit(kind: str, schedule: Schedule) -> np.ndarray | None:
    """The weight of each step in the loss, fp32 [T]; None for 'none'.

    'longcat': w = sqrt(s / (1 - s)) / sqrt(-dt), which cancels the coefficient sqrt(-dt (1 - s) / s) that the gradient
    of flow_sde's log-prob has (LongCat-Video). The first step takes s_1 in the divisor, as `sde.diffusion_coefficient`.
    """
    if kind not in CREDITS:
        raise ValueError(f"credit={kind!r} is unknown; choose one of {', '.join(CREDITS)}")
    if kind == "none":
        return None
    s = schedule.sigmas.astype(np.float64)
    return (np.sqrt(s[:-1] / (1.0 - np.append(s[1], s[1:-1]))) / np.sqrt(-np.diff(s))).astype(np.float32)


def sde_window(seed: int, epoch: int, size: int, low: int, high: int, segment: int = 0, *, rule: str = "any",
               every: int = 25) -> np.ndarray:
    """The stochastic steps of an epoch: `size` of [low, high), ascending, a function of (seed, epoch, segment).

    rule: 'any' subset; 'random', a window of neighbours at a random place (Flow-GRPO-Fast; MixGRPO's random strategy);
    'progressive', 'decay' and 'exp_decay', MixGRPO's windows that slide from the first steps to the last and start
    again: `every` epochs at each place, or fewer the later the steps (`window_epochs`). MixGRPO: arXiv 2507.21802;
    its window is empty at the last place, ours stops where it is whole. Raises ValueError when they do not fit.
    """
    if size == 0:
        return np.arange(0)
    if not 0 <= low <= high or not 0 <= size <= high - low:
        raise ValueError(f"{size} stochastic steps do not fit in the steps {low} to {high}")
    if rule not in WINDOWS or every < 1:
        raise ValueError(f"window={rule!r}, every={every}: choose one of {', '.join(WINDOWS)}, and at least 1 epoch")
    if size == high - low:
        return np.arange(low, high)
    rng = np.random.default_rng([seed, epoch, 0x5DE, *([segment] if segment else [])])
    if rule == "any":
        return np.sort(rng.choice(np.arange(low, high), size, replace=False))
    places = high - low - size + 1
    if rule == "random":
        place = int(rng.integers(places))
    else:
        stays = [window_epochs(rule, place, high - low, every) for place in range(places)]
        place = int(np.searchsorted(np.cumsum(stays), (epoch - 1) % sum(stays), side="right"))
    return np.arange(low + place, low + place + size)


def window_epochs(rule: str, place: int, steps: int, every: int) -> int:
    """How many epochs MixGRPO's window stays at a place, of `steps` in all: `every` ('progressive'), falling to a fifth
    along the schedule ('decay'), or as exp(-0.1 (place - 13)) from the fourteenth place on ('exp_decay')."""
    if rule == "decay":
        least = max(1, every // 5)
        return max(least, int(every * (1 - place / steps) + least * place / steps))
    if rule == "exp_decay":
        return math.ceil(every * math.exp(-0.1 * max(place - 13, 0)))
    return every


def step_quotas(parts: tuple[Segment, ...], experts: tuple[str, ...], trained: tuple[str, ...], size: int, low: int,
                high: int, setting: str = "sample.sde_steps") -> tuple[int, ...]:
    """How many of an epoch's `size` stochastic steps each segment gets: in proportion to its steps in [low, high), and
    at least one for every trained expert, so that each has a gradient in every epoch. Noise levels of `grpo.forward`
    are shared out in the same way. setting: what `size` is called, for messages.

    Raises ValueError when a trained expert has no step there, or there are fewer steps than experts to train.
    """
    where = f"sample.sde_range=({low}, {high})" if setting == "sample.sde_steps" else "the rollout"
    room = [len(range(max(low, p.steps.start), min(high, p.steps.stop))) if experts[p.expert] in trained else 0
            for p in parts]
    for name in trained:
        if not any(n for p, n in zip(parts, room) if experts[p.expert] == name):
            split = ", ".join(f"{experts[p.expert]} steps {p.steps.start} to {p.steps.stop - 1}" for p in parts)
            raise ValueError(f"{name} would be trained without a step: {where} holds none of its steps ({split}); "
                             "change sample.sde_range, sample.shift or sample.steps, or leave the expert out of "
                             "train.experts")
    if size < len(trained) or size > sum(room):
        raise ValueError(f"{setting}={size} must be from {len(trained)} (one for each trained expert) to "
                         f"{sum(room)} (the trained experts' steps in {where})")
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


def make_step(policy: Policy, table: StepTable, guidance: float, keep_mean: bool = False):
    """The jitted denoising step: (trainable, frozen, x, i, stochastic, text, key, samples) -> (x_next, log_prob, mean),
    mean None without keep_mean."""

    @partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def rollout_step(trainable: Flat, frozen, x, i, stochastic, text: TextBatch, key, samples):
        t, sigma, sigma_next, g = table.at(i)
        v = velocity(policy.module(trainable, frozen), x, t, text, guidance)
        noise = sample_noise(key, samples, i, x.shape[1:])
        x_next, log_prob, mean, _ = sde.sde_step(x, v, sigma, sigma_next, jnp.where(stochastic, g, 0.0), noise,
                                                 table.preserving)
        return x_next, log_prob, mean if keep_mean else None

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
        x_next, log_prob, mean = step(trainable, frozen, x, i, stochastic, text, key, samples)
        if stochastic:
            kept.append((x, x_next, log_prob, mean))
        x = x_next
    if not kept:
        return x, None
    xs, nexts, log_probs, means = jax.tree.map(lambda *rows: jnp.stack(rows), *kept)
    return x, Trajectory(xs, nexts, log_probs, jnp.asarray(window, jnp.int32), text, means)


def prefix(part: Segment, window: np.ndarray) -> range:
    """The steps of a part before its first stochastic one: videos with one prompt and one noise are the same there."""
    return range(part.steps.start, int(window[0]) if len(window) else part.steps.stop)


def group_leaders(groups: int, group_size: int, batch: int) -> np.ndarray:
    """The number of each group's first video, in batches: int32 [m, batch], where the last wraps around."""
    count = -(-groups // batch)
    return np.resize(np.arange(groups) * group_size, (count, batch)).astype(np.int32)


@partial(jax.jit, static_argnames=("sharding",))
def branch(latents: Sequence[jax.Array], rows: jax.Array, sharding) -> jax.Array:
    """Rows of batches [B, ...] laid end to end, int32 [B], as a batch of that sharding."""
    return jax.lax.with_sharding_constraint(jnp.concatenate(latents)[rows], sharding)


def rollout_batches(steps: Sequence, arrays: Callable, noise: Sequence[jax.Array], texts: Sequence[TextBatch], *, key,
                    samples: Sequence[jax.Array], parts: Sequence[Segment], windows: Sequence[np.ndarray], done: int = 0
                    ) -> Iterator[tuple[int, int, jax.Array, Trajectory | None]]:
    """Dispatches `rollout` for every part of the schedule and every batch; yields (part, batch, latents, Trajectory).

    All batches go through one expert's steps before the next expert's weights are asked for, with nothing under way,
    since these change places on the device. steps: one `make_step` an expert; arrays(expert): (trainable, frozen);
    noise, texts, samples: one a batch; windows: one a part; done: steps of the first part that `noise` has behind it.
    """
    latents = list(noise)
    for i, (part, window) in enumerate(zip(parts, windows)):
        if i:
            jax.block_until_ready(latents)
        trainable, frozen = arrays(part.expert)
        for b, (text, numbers) in enumerate(zip(texts, samples)):
            x, trajectory = rollout(steps[part.expert], trainable, frozen, latents[b], text, key=key, samples=numbers,
                                    steps=part.steps if i else part.steps[done:], window=window)
            latents[b] = x if i < len(parts) - 1 else None
            yield i, b, x, trajectory
