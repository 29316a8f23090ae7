"""Sampling with the policy, keeping what training needs: x_t, x_next and log-prob of the stochastic
steps.

One jitted denoising step serves every step of every batch; the loop over steps runs on the host, so
the next dispatch overlaps the running one and a step may be stochastic or not without a second
program. Every random draw is a function of (seed, epoch, sample number, step), so results depend
neither on the batch nor on the devices.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.kl import step_kl
from grpo.learning.policy import COMPILER_OPTIONS, Flat, Policy
from grpo.random_streams import Stream
from grpo.settings.choices import CREDITS
from wan_jax.diffusion import sde
from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.diffusion.schedule import Schedule
from wan_jax.diffusion.solvers import DPMSolverPP2M, dpm_step, per_sample
from wan_jax.distributed import sharding as sharding_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One rollout batch: the K stochastic steps, everything fp32."""

    x: jax.Array  # [K, B, F, H, W, C] latents before the step
    x_next: jax.Array  # [K, B, F, H, W, C] latents after it, as sampled
    log_prob: jax.Array  # [K, B]
    step: jax.Array  # [K] int32, index into the schedule; [1, B] where each video has its own
    text: TextBatch
    # [K, B, F, H, W, C] of the step's Gaussian, where the objective needs it
    mean: jax.Array | None = None
    kl: jax.Array | None = None  # [K, B] to the reference, where it is part of the reward


@dataclasses.dataclass(frozen=True)
class StepTable:
    """The schedule's values per step: fp32 [T] each. g is the noise coefficient where the step is
    stochastic.
    """

    timestep: np.ndarray
    sigma: np.ndarray
    sigma_next: np.ndarray
    g: np.ndarray
    # what the step counts in the loss (`step_credit`); None: as all others
    weight: np.ndarray | None = None
    preserving: bool = False  # the mean of a stochastic step is CPS'
    # [T, 3], `DPMSolverPP2M.table`, where the other steps are that solver's; None: Euler
    dpm: np.ndarray | None = None

    @classmethod
    def make(
        cls,
        schedule: Schedule,
        config: sde.SDEConfig,
        credit: str = "none",
        trained: slice = slice(None),
        ode_solver: str = "euler",
    ) -> "StepTable":
        """trained: the steps that may be stochastic; ode_solver: of the others, `euler` or `dpmpp_2m`."""
        return cls(
            np.asarray(schedule.timesteps, np.float32),
            schedule.sigmas[:-1],
            schedule.sigmas[1:],
            sde.diffusion_coefficient(config, schedule),
            step_credit(credit, schedule, config, trained),
            config.preserving,
            DPMSolverPP2M(schedule).table if ode_solver == "dpmpp_2m" else None,
        )

    def at(self, i):
        """(timestep, sigma, sigma_next, g) of step i, which may be traced, or of steps [B], [B]
        each.
        """
        return tuple(
            jnp.asarray(v)[i] for v in (self.timestep, self.sigma, self.sigma_next, self.g)
        )


def step_credit(
    kind: str, schedule: Schedule, config: sde.SDEConfig, trained: slice
) -> np.ndarray | None:
    """The weight of each step in the loss, fp32 [T]; None for 'none', and for 'otca', which is each
    video's own (`advantages.step_importance`).

    'longcat': w = sqrt(s / (1 - s)) / sqrt(-dt), which cancels the coefficient sqrt(-dt (1 - s) /
    s) that the gradient of flow_sde's log-prob has (LongCat-Video). The first step takes s_1 in the
    divisor, as `sde.diffusion_coefficient`. 'rectified': w = 1 / c over its mean of the `trained`
    steps, Flash-GRPO's temporal gradient rectification (arXiv 2605.15980). The gradient of a step's
    log-prob with respect to v is z |d mean / d v| / std with z ~ N(0, 1), so c = |d mean / d v| /
    std = sqrt(-dt) / g + g sqrt(-dt) (1 - s) / (2 s) for all forms but CPS; on flow_sde, 1 / c is
    'longcat' up to a factor. The published divisor is the mean over an update's rows; ours does not
    change between updates, and is the same where the rows are spread evenly over the trained steps.
    """
    if kind not in CREDITS:
        raise ValueError(f"credit={kind!r} is unknown; choose one of {', '.join(CREDITS)}")
    if kind in ("none", "otca"):
        return None
    if kind == "rectified":
        std = sde.diffusion_coefficient(config, schedule) * np.sqrt(
            -np.diff(schedule.sigmas.astype(np.float64))
        )
        weight = std / sde.mean_slope(config, schedule)
        return (weight / np.mean(weight[trained])).astype(np.float32)
    s = schedule.sigmas.astype(np.float64)
    return (np.sqrt(s[:-1] / (1.0 - np.append(s[1], s[1:-1]))) / np.sqrt(-np.diff(s))).astype(
        np.float32
    )


def sample_noise(key: jax.Array, samples: jax.Array, step, shape: tuple[int, ...]) -> jax.Array:
    """N(0, 1) fp32 [B, *shape]; each sample's draw depends on (key, its number, step) only.
    samples: int32 [B].
    """

    def draw(sample):
        return jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(key, sample), step), shape, jnp.float32
        )

    return jax.vmap(draw)(samples)


@partial(jax.jit, static_argnames=("shape",))
def initial_noise(key, samples, shape):
    """x_T, fp32 [B, *shape]."""
    return sample_noise(key, samples, Stream.INITIAL_NOISE.index, shape)


def make_step(
    policy: Policy,
    table: StepTable,
    guidance: float,
    keep_mean: bool = False,
    kl_kind: str | None = None,
):
    """The jitted denoising step: (trainable, frozen, x, i, stochastic, text, key, samples) ->
    (x_next, log_prob, mean, kl, clean), mean None without keep_mean, kl [B] to the reference
    (`kl_to_reference`) or None without kl_kind; where no row is stochastic the reference is not
    run. stochastic: bool, or bool [B].

    With DPM-Solver++ between stochastic steps, it also takes (last, follows): the `clean` sample
    that the step before predicted, and whether that one was deterministic, as `stochastic`. Where
    it was not, the solver starts anew with a step of first order: noise has moved x off the path
    that the prediction was for.
    """

    @partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def rollout_step(
        trainable: Flat,
        frozen,
        x,
        i,
        stochastic,
        text: TextBatch,
        key,
        samples,
        last=None,
        follows=None,
    ):
        t, sigma, sigma_next, g = table.at(i)
        g = jnp.where(stochastic, g, 0.0)
        v = velocity(policy.module(trainable, frozen), x, t, text, guidance)
        noise = sample_noise(key, samples, i, x.shape[1:])
        x_next, log_prob, mean, _ = sde.sde_step(
            x, v, sigma, sigma_next, g, noise, table.preserving
        )

        clean = None
        if table.dpm is not None:
            clean = x - sigma * v
            keep, base, old = jnp.asarray(table.dpm)[i]
            ode = dpm_step(x, clean, last, keep, base, jnp.where(follows, old, 0.0))
            x_next = jnp.where(per_sample(stochastic, x) > 0, x_next, ode)

        def distance():
            v_ref = velocity(policy.reference(frozen), x, t, text, guidance)
            return step_kl(x, v, v_ref, (sigma, sigma_next, g, table.preserving), kl_kind)

        kl = (
            jax.lax.cond(jnp.any(stochastic), distance, lambda: jnp.zeros(len(x)))
            if kl_kind
            else None
        )
        return x_next, log_prob, mean if keep_mean else None, kl, clean

    return rollout_step


def rollout(
    step,
    trainable: Flat,
    frozen,
    x: jax.Array,
    text: TextBatch,
    *,
    key,
    samples,
    steps: range,
    window: np.ndarray,
    multistep: bool = False,
) -> tuple[jax.Array, Trajectory | None]:
    """Runs the denoising steps `steps` for one batch from x fp32 [B,F,H,W,C] (`initial_noise`
    before step 0).

    Steps in `window` [K] are stochastic and kept, the others are ODE steps; a window [1, B] has
    each row's own, and what a row with a step outside `steps` leaves behind is an ODE step, to be
    masked. samples: int32 [B], global sample numbers in the epoch, sharded over the mesh.
    multistep: the step is one that takes `last` and `follows`. Returns (latents after the last
    step, Trajectory, or None when the window is empty). Everything is dispatched asynchronously.
    """
    kept, own = [], window.ndim == 2
    place = partial(sharding_lib.place, sharding=samples.sharding) if own else lambda flag: flag
    past = (x, place(np.zeros(window.shape[1], bool) if own else False)) if multistep else ()
    for i in steps:
        rows = window[0] == i if own else i in window
        stochastic = place(rows)
        x_next, *rest, clean = step(trainable, frozen, x, i, stochastic, text, key, samples, *past)
        now = x, x_next, *rest
        past = (clean, place(~rows if own else not rows)) if multistep else ()
        if own and kept:
            kept = [choose_rows(stochastic, now, kept[0])] if rows.any() else kept
        elif own or stochastic:
            kept.append(now)
        x = x_next
    if not kept:
        return x, None
    xs, nexts, log_probs, means, kls = jax.tree.map(lambda *rows: jnp.stack(rows), *kept)
    if own:
        inside = np.where(
            (window[0] >= steps.start) & (window[0] < steps.stop), window[0], steps.start
        )
        index = jnp.stack([sharding_lib.place(inside.astype(np.int32), samples.sharding)])
    else:
        index = jnp.asarray(window, jnp.int32)
    return x, Trajectory(xs, nexts, log_probs, index, text, means, kls)


@jax.jit
def choose_rows(rows: jax.Array, new, old):
    """Trees of [B, ...]: the rows of `new` where bool [B] is True, else those of `old`."""
    return jax.tree.map(lambda a, b: jnp.where(per_sample(rows, a) > 0, a, b), new, old)


@partial(jax.jit, static_argnames=("axis",))
def zero_rows(x, kept: jax.Array, axis: int):
    """A tree of arrays, with zeros in those rows along `axis` where kept, bool [B], is False."""

    def zeroed(a):
        return jnp.where(
            kept.reshape((-1,) + (1,) * (a.ndim - axis - 1)), a, jnp.zeros((), a.dtype)
        )

    return jax.tree.map(zeroed, x)


@jax.jit
def progress(x: jax.Array, x_next: jax.Array, final: jax.Array) -> jax.Array:
    """What steps brought videos nearer to their own end, fp32 [K, B]: the cosine of the angle
    between x_next and the final latents [B, F, H, W, C] less that between x and them, [K, B, F, H,
    W, C] both.
    """

    def cosine(y):
        axes = tuple(range(2, y.ndim))
        lengths = jnp.sum(y * y, axes) * jnp.sum(final * final, tuple(a - 1 for a in axes))
        return jnp.sum(y * final, axes) * jax.lax.rsqrt(lengths)

    return cosine(x_next) - cosine(x)


def prefix(part: Segment, window: np.ndarray) -> range:
    """The steps of a part before its first stochastic one, of any video: those with one prompt and
    one noise are the same there.
    """
    inside = window[(window >= part.steps.start) & (window < part.steps.stop)]
    return range(part.steps.start, int(inside.min()) if inside.size else part.steps.stop)


def group_leaders(groups: int, group_size: int, batch: int) -> np.ndarray:
    """The number of each group's first video, in batches: int32 [m, batch], where the last wraps
    around.
    """
    count = -(-groups // batch)
    return np.resize(np.arange(groups) * group_size, (count, batch)).astype(np.int32)


@partial(jax.jit, static_argnames=("sharding",))
def branch(latents: Sequence[jax.Array], rows: jax.Array, sharding) -> jax.Array:
    """Rows of batches [B, ...] laid end to end, int32 [B], as a batch of that sharding."""
    return jax.lax.with_sharding_constraint(jnp.concatenate(latents)[rows], sharding)


def rollout_batches(
    steps: Sequence,
    arrays: Callable,
    noise: Sequence[jax.Array],
    texts: Sequence[TextBatch],
    *,
    key,
    samples: Sequence[jax.Array],
    parts: Sequence[Segment],
    windows: Sequence[np.ndarray],
    done: int = 0,
    multistep: bool = False,
) -> Iterator[tuple[int, int, jax.Array, Trajectory | None]]:
    """Dispatches `rollout` for every part of the schedule and every batch; yields (part, batch,
    latents, Trajectory).

    All batches go through one expert's steps before the next expert's weights are asked for, with
    nothing under way, since these change places on the device. steps: one `make_step` an expert;
    arrays(expert): (trainable, frozen); noise, texts, samples: one a batch; windows: one a part,
    [K] or, of all batches' videos, [1, N]; done: steps of the first part that `noise` has behind
    it; multistep as of `rollout`, which starts anew with each part and after `done`.
    """
    latents = list(noise)
    for i, (part, window) in enumerate(zip(parts, windows)):
        if i:
            jax.block_until_ready(latents)
        trainable, frozen = arrays(part.expert)
        for b, (text, numbers) in enumerate(zip(texts, samples)):
            mine = (
                window if window.ndim == 1 else window[:, b * len(numbers) : (b + 1) * len(numbers)]
            )
            x, trajectory = rollout(
                steps[part.expert],
                trainable,
                frozen,
                latents[b],
                text,
                key=key,
                samples=numbers,
                steps=part.steps if i else part.steps[done:],
                window=mine,
                multistep=multistep,
            )
            latents[b] = x if i < len(parts) - 1 else None
            yield i, b, x, trajectory
