"""The loss on data: pictures or videos with their own prompts, as an anchor of any method or alone.

With data.only the loss is that of a method, on all data or on given pairs or ratings of them
(`Method.of_data`). The anchor is flow matching:

    L = L_method + w mean over pairs of mean((v(x_s, s, c) - (e - x0))^2),   x_s = (1 - s) x0 + s e

x0 are latents of the data, c is the prompt of each of them, and v the velocity without guidance. It is
the data term of DDRL (arXiv 2512.04332; w is 0.01 in cosmos-rl's released settings). Noise and levels
are drawn for the data (data.noise=own), the levels from the distribution of the method: the rollout's
steps, or logit-normal (`finished_batch.levels_at`). Or they are those of the rollout, as in cosmos-rl:
the initial noise of a video and the level of one of its stochastic steps (`rollout_draws`). In
cosmos-rl a pair has the noise of a video of the same prompt, and, as far as its code was read, the
squared error of v is multiplied by s^2 + (1 - s)^2 (sigma_data is 1). Here data and rollout have
prompts of their own, and all levels have the same weight.

Every draw is a function of (seed, expert, number of the optimiser step, place in its batch), so a run
that is resumed repeats it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo.data.labels import ITEMS, PAIRS, read_labels
from grpo.data.latent_folder import LatentData, open_data
from grpo.learning import abstract
from grpo.learning.finished_batch import FinishedBatch, levels_at
from grpo.learning.optimiser import GradientInputs
from grpo.learning.policy import Flat, Policy
from grpo.learning.selection import Selection, layout
from grpo.learning.velocity_loss import FlowError, FlowMetrics, make_gradient
from grpo.random_streams import Stream
from wan_jax.command_line import cli
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import multihost
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.errors import UserError
from wan_jax.inference.pipeline import TextTable
from wan_jax.storage.model_dir import ModelDir

if TYPE_CHECKING:
    from grpo.compiled.run_arrays import RunArrays
    from grpo.run import RunSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnchoredBatch:
    """The batch of an optimiser step with data.

    Attributes:
        method: the batch of the method.
        data: M micro-batches of data, with one noise level a row.
    """

    method: Any
    data: FinishedBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnchoredMetrics:
    """The metrics of a method's update, and those of its data."""

    method: Any
    data: FlowMetrics

    @property
    def count(self) -> jax.Array:
        """The number of the method's rows."""
        return self.method.count

    @property
    def kl(self) -> jax.Array:
        """The sum of the KL over the method's rows."""
        return self.method.kl

    def averages(self) -> dict[str, float]:
        """Return the method's means for the log, and `data_error`, the flow-matching error on data."""
        return self.method.averages() | {"data_error": self.data.averages()["flow_error"]}


def with_data(gradient: Callable, policy: Policy, weight: float) -> Callable:
    """Return the gradient of a method's loss with that on data: (trainable, inputs, frozen,
    `AnchoredBatch`) -> (gradient, `AnchoredMetrics`).

    gradient: the result of `Method.make_gradient`. policy: as given there. weight: w.
    """
    of_data = make_gradient(FlowError(), policy, 1.0)

    def anchored(trainable: Flat, inputs: GradientInputs, frozen, batch: AnchoredBatch):
        grads, metrics = gradient(trainable, inputs, frozen, batch.method)
        pull, data = of_data(trainable, GradientInputs(None, {}), frozen, batch.data)
        total = jax.tree.map(lambda g, d: g + weight * d, grads, pull)
        return total, AnchoredMetrics(metrics, data)

    return anchored


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What an optimiser step trains on, of the rollout of its epoch.

    Attributes:
        epoch: number of the epoch.
        key: JAX key of the epoch.
        videos: int [V], numbers of the videos that count in the step; at least one.
    """

    epoch: int
    key: jax.Array
    videos: np.ndarray


@dataclasses.dataclass(frozen=True)
class DataSource:
    """The data of a run.

    Attributes:
        data: the latents, on disk, with the labels that the run trains on.
        table: the embeddings of the prompts of all items.
    """

    data: LatentData
    table: TextTable

    @classmethod
    def make(cls, data: LatentData, table: TextTable, dtype) -> "DataSource":
        """Return the source of a run. table: of the run's prompts; its rows suffice for the data's.
        dtype: of the embeddings on the devices.
        """
        rows = tuple(text.astype(dtype) for text in data.texts())
        return cls(data, dataclasses.replace(table, prompts=rows))

    def batch(
        self, spec: "RunSpec", segment: int, update: int, rollout: "Rollout | None" = None
    ) -> FinishedBatch:
        """Return the data of an optimiser step of the expert of a segment. update: number of the
        expert's optimiser steps so far. rollout: with data.noise=rollout, what the step trains on.
        """
        seed, expert = spec.recipe.seed, spec.segments[segment].expert
        size, mesh = data_rows(spec), spec.mesh
        labels = self.data.labels
        drawn = draw_numbers(seed, update, len(self.data if labels is None else labels), size)
        numbers, rejected, weight = drawn, None, np.ones(size, np.float32)
        if labels is not None:
            numbers = labels.items[drawn]
            if labels.rejected is not None:
                rejected = labels.rejected[drawn]
            if labels.scores is not None:
                weight = spec.method.rated_weights(labels.scores)[drawn]
        share = draw_shares(seed, update, expert, size)
        key = jax.random.fold_in(Stream.DATA_NOISE.key(jax.random.key(seed)), update)
        noise_of, draw = np.arange(size), expert  # noise is a function of (key, noise_of, draw)
        if rollout is None:
            sigma, timestep = levels_at(spec, segment, share, spec.method.rollout_levels)
        else:
            noise_of, step = rollout_draws(spec, segment, share, rollout)
            sigma, timestep = spec.schedule.sigmas[step], spec.schedule.timesteps[step]
            key, draw = rollout.key, Stream.INITIAL_NOISE.index
        every = Selection(np.arange(size), None, weight, np.ones(size, bool))
        shards = mesh_lib.batch_shards(mesh)
        (chosen,) = every.batches(1, spec.recipe.sample.batch_size, shards)
        places = chosen.videos  # int [M, B], in the batch; those that fill it up repeat others
        sharded, replicated = sharding_lib.batch_sharding(mesh), sharding_lib.replicated(mesh)

        def latents(items: np.ndarray) -> jax.Array:
            """Return the latents of these items of the batch, [M, B, F, H, W, C]. Each process reads
            those of its own devices.
            """

            def rows(p: np.ndarray) -> jax.Array:
                def read(index):
                    return self.data.latents(items[p[index[0]]])

                return jax.make_array_from_callback((len(p), *self.data.shape), sharded, read)

            return jnp.stack([rows(p) for p in places])

        texts = [self.table.batch(numbers[p], sharded, replicated) for p in places]
        video = [sharding_lib.place(noise_of[p].astype(np.int32), sharded) for p in places]
        return FinishedBatch(
            x0=latents(numbers),
            worse=None if rejected is None else latents(rejected),
            text=jax.tree.map(lambda *leaves: jnp.stack(leaves), *texts),
            video=jnp.stack(video),
            sigma=jnp.asarray(sigma[places][:, None]),
            timestep=jnp.asarray(timestep[places][:, None]),
            weight=jnp.asarray(chosen.weight),
            valid=jnp.asarray(chosen.valid),
            draw=jnp.asarray(np.array([draw], np.int32)),
            key=key,
        )

    def batches(
        self, spec: "RunSpec", segment: int, update: int
    ) -> Iterator[tuple[np.ndarray, FinishedBatch, dict[str, float]]]:
        """Yield what `Method.batches` does, for an epoch that trains on data alone."""
        for number in range(update, update + spec.recipe.train.updates_per_epoch):
            last = number + 1 == update + spec.recipe.train.updates_per_epoch
            share_kept = spec.method.share_kept(number + 1, last)
            yield np.arange(0), self.batch(spec, segment, number), share_kept


def open_run_data(spec: "RunSpec", model: ModelDir) -> LatentData | None:
    """Return the data that training sees, whose files are compared with their digests, with the labels
    that it needs; None without any. Raises `UserError`, also where the processes of a run have
    different data.
    """
    recipe = spec.recipe
    if not recipe.data.used:
        return None
    with cli.user_input():
        data = open_data(recipe.data.path, model)
        kind = spec.method.of_data if recipe.data.only else ITEMS
        if kind not in (None, ITEMS):
            labels = read_labels(recipe.data.labels, data, kind)
            data = dataclasses.replace(data, labels=labels)
    if jax.process_count() > 1:
        multihost.check_same_facts({"config.data.path": str(data)})
    if data.shape != spec.data_shape:
        raise UserError(
            f"config.data.path={recipe.data.path} has latents of {list(data.shape)}, and this model's "
            f"are {list(spec.data_shape or ())}: encode the data with --model={model.path}"
        )
    if recipe.data.noise == "rollout" and data.shape != spec.shape:
        raise UserError(
            f"config.data.noise=rollout noises data of {list(data.shape)} by the noise of videos of "
            f"{list(spec.shape)}: encode the data at sample.height={recipe.sample.height}, "
            f"sample.width={recipe.sample.width} and sample.frames={recipe.sample.frames}, or set "
            "data.noise=own"
        )
    return data


def data_rows(spec: "RunSpec") -> int:
    """Return the number of items or pairs of them of an optimiser step."""
    return spec.recipe.data.batch_size or spec.recipe.sample.batch_size


def draw_numbers(seed: int, update: int, total: int, size: int) -> np.ndarray:
    """Return the numbers of the items, or of the labels, of an optimiser step, int [size]: the next
    ones of shuffled passes over all `total` of them, none of which is left out.
    """
    first = update * size
    positions = np.arange(first, first + size)
    passes = range(first // total, (first + size - 1) // total + 1)
    orders = [Stream.DATA_ORDER.generator(seed, number).permutation(total) for number in passes]
    return np.concatenate(orders)[positions - passes.start * total]


def draw_shares(seed: int, update: int, expert: int, size: int) -> np.ndarray:
    """Return where the noise levels of the rows of an optimiser step lie in their distribution,
    float64 [size] from 0 to 1: one in each of `size` equal parts, in a random order.
    """
    rng = Stream.DATA_LEVEL.generator(seed, update, expert)
    return (rng.permutation(size) + rng.random(size)) / size


def rollout_draws(
    spec: "RunSpec", segment: int, share: np.ndarray, rollout: Rollout
) -> tuple[np.ndarray, np.ndarray]:
    """Return (number of the video whose initial noise each pair has, its stochastic step), int [size]
    each, for the expert of a segment.

    share: `draw_shares`. The pairs have the videos of the step in turn, and the stochastic steps of
    the epoch at their shares; with one step a group, that of the video.
    """
    sample = spec.recipe.sample
    videos = rollout.videos[np.arange(len(share)) % len(rollout.videos)]
    window = spec.windows.of_epoch(spec.recipe.seed, rollout.epoch)[segment]
    if window.ndim == 1:
        step = window[(share * len(window)).astype(int)]
    else:
        step = window[0, videos]
    if sample.shared_noise:  # that of the group's first video
        videos = videos // sample.group_size * sample.group_size
    return videos, step


def data_shapes(arrays: "RunArrays") -> FinishedBatch:
    """Return the abstract data of an optimiser step."""
    spec = arrays.spec
    shards = mesh_lib.batch_shards(spec.mesh)
    m, b = layout(data_rows(spec), 1, spec.recipe.sample.batch_size, shards)
    assert spec.data_shape is not None
    levels = abstract.array((m, 1, b), jnp.float32)
    latents = arrays.rows(jnp.float32, m, shape=spec.data_shape, batch=b)
    paired = spec.recipe.data.only and spec.method.of_data == PAIRS
    return FinishedBatch(
        x0=latents,
        worse=latents if paired else None,
        text=arrays.text(m, batch=b),
        video=arrays.rows(jnp.int32, m, batch=b),
        sigma=levels,
        timestep=levels,
        weight=abstract.array((m, b), jnp.float32),
        valid=abstract.array((m, b), bool),
        draw=abstract.array((1,), jnp.int32),
        key=arrays.random_key(),
    )
