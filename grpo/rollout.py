"""Sampling with the policy, which keeps x_t, x_next and the log-prob of the stochastic steps for
training.

One jitted function computes every denoising step of every batch, stochastic or not. The loop over the
steps runs on the host, so that the next dispatch overlaps the step that is running. Every random draw
is a function of (seed, epoch, sample number, step), so results depend neither on the batch nor on the
devices.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.kl import step_kl
from grpo.learning.policy import COMPILER_OPTIONS, Flat, Policy
from grpo.learning.step_table import StepTable
from grpo.random_streams import Stream
from wan_jax.diffusion import sde
from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.diffusion.solvers import dpm_step, per_sample
from wan_jax.distributed import sharding as sharding_lib

if TYPE_CHECKING:
    from grpo.learning.head_guidance import HeadGuidance


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The K stochastic steps of one rollout batch.

    Attributes:
        x: K arrays [B, F, H, W, C] fp32, latents before the step.
        x_next: K arrays [B, F, H, W, C] fp32, latents after the step, as sampled. If the next step is
            stochastic too, they are the array that is its x: latents are kept once.
        log_prob: [K, B] fp32.
        step: [K] int32, index of the step in the schedule; [1, B] where it differs between videos.
        text: of the videos.
        mean: K arrays [B, F, H, W, C] fp32, mean of the step, where the objective needs it.
        kl: [K, B] fp32, KL to the reference, where it is part of the reward.
    """

    x: tuple[jax.Array, ...]
    x_next: tuple[jax.Array, ...]
    log_prob: jax.Array
    step: jax.Array
    text: TextBatch
    mean: tuple[jax.Array, ...] | None = None
    kl: jax.Array | None = None

    @classmethod
    def make(cls, taken: Sequence[tuple], step: jax.Array, text: TextBatch) -> "Trajectory":
        """Return the trajectory of K steps (x, x_next, log_prob, mean, kl), as `make_step`."""
        x, x_next, log_prob, mean, kl = zip(*taken)
        return cls(
            x,
            x_next,
            jnp.stack(log_prob),
            step,
            text,
            None if mean[0] is None else mean,
            None if kl[0] is None else jnp.stack(kl),
        )


def sample_noise(key: jax.Array, samples: jax.Array, step, shape: tuple[int, ...]) -> jax.Array:
    """Return draws of N(0, 1), fp32 [B, *shape]. The draw of a sample depends only on (key, its
    number, step). samples: int32 [B], their numbers.
    """

    def draw(sample):
        return jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(key, sample), step), shape, jnp.float32
        )

    return jax.vmap(draw)(samples)


@partial(jax.jit, static_argnames=("shape",))
def initial_noise(key, samples, shape):
    """Return x_T, fp32 [B, *shape], of samples, int32 [B]."""
    return sample_noise(key, samples, Stream.INITIAL_NOISE.index, shape)


def make_step(
    policy: Policy,
    table: StepTable,
    guidance: float,
    keep_mean: bool = False,
    kl_kind: str | None = None,
    head: "HeadGuidance | None" = None,
):
    """Return the jitted denoising step (trainable, frozen, x, i, stochastic, text, key, samples) ->
    (x_next, log_prob, mean, kl, clean).

    The arguments are x fp32 [B, F, H, W, C], the index i of the step, stochastic as bool [] or [B],
    and samples int32 [B]. The results are x_next as x, log_prob [B], the mean of the step as x or
    None without keep_mean, the KL to the reference [B] or None without kl_kind (`kl_to_reference`),
    and the predicted final latents or None with Euler. The reference runs only where a row is
    stochastic. With `head`, which guides towards the reward, `trainable` is (trainable, arrays of the
    head).

    Where deterministic steps are DPM-Solver++(2M), the step has two further arguments: `last`, the
    final latents that the previous step predicted, and `follows`, as `stochastic`, whether that step
    was deterministic. Where it was not, the solver starts again with a step of first order, because
    noise has moved x away from the path of the prediction.
    """

    @partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def rollout_step(
        trainable: Any,
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
        trainable, arrays = trainable if head is not None else (trainable, {})
        v = velocity(policy.module(trainable, frozen), x, t, text, guidance)
        if head is not None:
            v = v - head.shift(arrays, x, sigma, t, text)
        noise = sample_noise(key, samples, i, x.shape[1:])
        x_next, log_prob, mean, _ = sde.sde_step(
            x, v, sigma, sigma_next, g, noise, table.preserving
        )

        clean = None
        if table.dpm is not None:
            assert last is not None and follows is not None, "DPM-Solver++ needs both"
            clean = x - sigma * v
            keep, base, previous = jnp.asarray(table.dpm)[i]
            ode = dpm_step(x, clean, last, keep, base, jnp.where(follows, previous, 0.0))
            x_next = jnp.where(per_sample(stochastic, x) > 0, x_next, ode)

        kl = None
        if kl_kind is not None:

            def distance(kind=kl_kind):
                v_ref = velocity(policy.reference(frozen), x, t, text, guidance)
                return step_kl(x, v, v_ref, (sigma, sigma_next, g, table.preserving), kind)

            kl = jax.lax.cond(jnp.any(stochastic), distance, lambda: jnp.zeros(len(x)))
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
    untrained_noise: bool = False,
) -> tuple[jax.Array, Trajectory | None]:
    """Compute denoising steps of one batch, and return (latents after the last step, Trajectory).

    The trajectory is None where no step is stochastic. All work is dispatched asynchronously.

    Args:
        step: the result of `make_step`.
        trainable, frozen: arrays of the policy.
        x: fp32 [B, F, H, W, C], latents before the steps (`initial_noise` before step 0).
        text: of the batch.
        key: JAX key of the epoch.
        samples: int32 [B], numbers of the samples in the epoch, sharded over the mesh.
        steps: to compute, of the schedule.
        window: int [K], the steps whose values the trajectory has, which are stochastic. Or
            int [1, B], one such step for each row. A row with a step outside of `steps` gets another
            step in the trajectory, which is to be masked.
        multistep: whether `step` needs the arguments `last` and `follows`.
        untrained_noise: whether the other steps are stochastic too; else they follow the ODE.
    """
    if window.ndim == 2:
        place = partial(sharding_lib.place, sharding=samples.sharding)
        return _rollout_by_row(
            partial(step, trainable, frozen),
            x,
            text,
            key=key,
            samples=samples,
            steps=steps,
            window=window[0],
            place=place,
            multistep=multistep,
            untrained_noise=untrained_noise,
        )
    taken = []  # (x, x_next, log_prob, mean, kl) of each step of the window
    past = (x, False) if multistep else ()
    for i in steps:
        trained = i in window
        stochastic = trained or untrained_noise
        x_next, *rest, clean = step(trainable, frozen, x, i, stochastic, text, key, samples, *past)
        past = (clean, not stochastic) if multistep else ()
        if trained:
            taken.append((x, x_next, *rest))
        x = x_next
    if not taken:
        return x, None
    return x, Trajectory.make(taken, jnp.asarray(window, jnp.int32), text)


def _rollout_by_row(
    step,
    x: jax.Array,
    text: TextBatch,
    *,
    key,
    samples,
    steps: range,
    window: np.ndarray,
    place: Callable,
    multistep: bool,
    untrained_noise: bool,
) -> tuple[jax.Array, Trajectory | None]:
    """Return the result of `rollout` with one step of the trajectory for each row, int [B].

    step: with the policy's arrays. place: puts an array [B] on the devices of the batch.
    """
    taken = None  # (x, x_next, log_prob, mean, kl) of the rows' steps in the window so far
    past = (x, place(np.zeros(len(window), bool))) if multistep else ()
    for i in steps:
        trained = window == i
        stochastic = trained | untrained_noise
        x_next, *rest, clean = step(x, i, place(stochastic), text, key, samples, *past)
        past = (clean, place(~stochastic)) if multistep else ()
        if taken is None:
            taken = (x, x_next, *rest)
        elif trained.any():
            taken = choose_rows(place(trained), (x, x_next, *rest), taken)
        x = x_next
    if taken is None:
        return x, None
    inside = np.where((window >= steps.start) & (window < steps.stop), window, steps.start)
    return x, Trajectory.make([taken], jnp.stack([place(inside.astype(np.int32))]), text)


@jax.jit
def choose_rows(rows: jax.Array, new, old):
    """Return trees of [B, ...] with the rows of `new` where rows, bool [B], is True, and else those
    of `old`.
    """
    return jax.tree.map(lambda a, b: jnp.where(per_sample(rows, a) > 0, a, b), new, old)


@partial(jax.jit, static_argnames=("axis",))
def zero_rows(array: jax.Array, valid: jax.Array, axis: int = 0) -> jax.Array:
    """Return an array with zeros in the rows along `axis` where valid, bool [B], is False."""
    mask = valid.reshape((-1,) + (1,) * (array.ndim - axis - 1))
    return jnp.where(mask, array, jnp.zeros((), array.dtype))


@jax.jit
def progress(x: jax.Array, x_next: jax.Array, final: jax.Array) -> jax.Array:
    """Return the progress of videos towards their final latents in a step, fp32 [B]: the cosine
    similarity of x_next and the final latents, minus that of x and the final latents.

    x, x_next, final: [B, F, H, W, C].
    """

    def cosine(y):
        axes = tuple(range(1, y.ndim))
        lengths = jnp.sum(y * y, axes) * jnp.sum(final * final, axes)
        return jnp.sum(y * final, axes) * jax.lax.rsqrt(lengths)

    return cosine(x_next) - cosine(x)


def prefix(part: Segment, window: np.ndarray) -> range:
    """Return the steps of a segment before the first stochastic step of any video. There, videos
    with one prompt and one noise are equal.

    window: int [K], or [1, N], the stochastic steps.
    """
    inside = window[(window >= part.steps.start) & (window < part.steps.stop)]
    return range(part.steps.start, int(inside.min()) if inside.size else part.steps.stop)


def group_leaders(groups: int, group_size: int, batch: int) -> np.ndarray:
    """Return the numbers of the first videos of all groups in batches, int32 [m, batch]. The last
    batch wraps around.
    """
    count = -(-groups // batch)
    return np.resize(np.arange(groups) * group_size, (count, batch)).astype(np.int32)


@partial(jax.jit, static_argnames=("sharding",))
def branch(latents: Sequence[jax.Array], rows: jax.Array, sharding) -> jax.Array:
    """Return the rows, int32 [B], of concatenated batches [B, ...], as a batch with a sharding."""
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
    untrained_noise: bool = False,
) -> Iterator[tuple[int, int, jax.Array, Trajectory | None]]:
    """Dispatch `rollout` for every segment of the schedule and every batch, and yield (number of the
    segment, number of the batch, latents, Trajectory or None).

    All batches are computed with one expert before the next expert's weights are asked for. By then
    all work has finished, because the experts' weights may be swapped on the device.

    Args:
        steps: the result of `make_step` for each expert.
        arrays: expert -> (trainable, frozen).
        noise, texts, samples: of each batch.
        key: JAX key of the epoch.
        parts: segments of the schedule.
        windows: of each segment, as in `rollout`: int [K], or int [1, N] of all videos.
        done: number of steps of the first segment that were computed for `noise` before.
        multistep, untrained_noise: as in `rollout`. The solver starts again in each segment and
            after `done`.
    """
    latents: list[jax.Array | None] = list(noise)
    for i, (part, window) in enumerate(zip(parts, windows)):
        if i:
            jax.block_until_ready(latents)
        trainable, frozen = arrays(part.expert)
        for b, (text, numbers) in enumerate(zip(texts, samples)):
            size = len(numbers)
            batch_window = window if window.ndim == 1 else window[:, b * size : (b + 1) * size]
            start = latents[b]
            assert start is not None
            x, trajectory = rollout(
                steps[part.expert],
                trainable,
                frozen,
                start,
                text,
                key=key,
                samples=numbers,
                steps=part.steps if i else part.steps[done:],
                window=batch_window,
                multistep=multistep,
                untrained_noise=untrained_noise,
            )
            latents[b] = x if i < len(parts) - 1 else None
            del start
            yield i, b, x, trajectory
