"""Batches of finished videos: their latents, and the noise levels at which they are noised again."""

import dataclasses
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.selection import Selection
from grpo.random_streams import Stream
from grpo.rollout import branch
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.distributed import sharding as sharding_lib

if TYPE_CHECKING:
    from grpo.run import RunSpec

Array = jax.Array
LEAST_LEVEL = (
    1e-3  # bound of noise levels that are not those of the rollout: they are in [1e-3, 1 - 1e-3]
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FinishedBatch:
    """M micro-batches of one optimiser step, with K noise levels a row. A row is a video or a pair.

    Attributes:
        x0: [M, B, F, H, W, C] fp32, latents of the videos; of the better ones of pairs.
        worse: [M, B, F, H, W, C] fp32, latents of the worse ones of pairs.
        text: arrays with a leading axis M.
        video: [M, B] int32, number of the video in the epoch.
        sigma: [M, K, B] fp32, noise levels.
        timestep: [M, K, B] fp32, 0 to 1000.
        weight: [M, B] fp32, of `Selection`.
        valid: [M, B] bool, rows that count.
        draw: [K] int32, numbers of the draws: noise is a function of (key, video, draw).
        key: JAX key of the epoch.
        cells: [M, B, F, H, W, 1] fp32, `Credit.cell_weights` of `x0`; None: all count alike.
        worse_cells: the same of `worse`.
        kl_gate: [M, B] fp32, `Credit.kl_gate`; None: the KL counts for all videos.
    """

    x0: Array
    worse: Array | None
    text: TextBatch
    video: Array
    sigma: Array
    timestep: Array
    weight: Array
    valid: Array
    draw: Array
    key: Array
    cells: Array | None = None
    worse_cells: Array | None = None
    kl_gate: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FinishedRows:
    """One micro-batch of `FinishedBatch` at one draw: its arrays without their first axes, [B] and
    [B, ...].
    """

    x0: Array
    worse: Array | None
    text: TextBatch
    video: Array
    weight: Array
    valid: Array
    sigma: Array
    timestep: Array
    draw: Array
    key: Array
    cells: Array | None
    worse_cells: Array | None
    kl_gate: Array | None


@dataclasses.dataclass(frozen=True)
class Levels:
    """K noise levels for each of N videos, of one expert.

    Attributes:
        sigma: [N, K] fp32.
        timestep: [N, K] fp32, the model's input, 0 to 1000.
        draw: [K] int32, numbers of the draws, which differ between experts.
    """

    sigma: np.ndarray
    timestep: np.ndarray
    draw: np.ndarray


def levels_at(
    spec: "RunSpec", segment: int, share: np.ndarray, rollout_levels: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the noise levels of the expert of a segment at these shares of their distribution, from 0
    to 1, and the timesteps of the model there, float32 as `share`.

    With `rollout_levels` the distribution is uniform over the expert's steps of the rollout.
    Otherwise it is logit-normal, s = sigmoid(N(0, 1)) (Esser et al., arXiv 2403.03206), restricted to
    `level_range`.
    """
    steps = spec.segments[segment].steps
    if rollout_levels:
        step = np.minimum(steps.start + (share * len(steps)).astype(int), steps.stop - 1)
        return spec.schedule.sigmas[step], spec.schedule.timesteps[step]
    low, high = level_range(spec, segment)
    normal = NormalDist()
    first, last = (normal.cdf(np.log(level / (1 - level))) for level in (low, high))
    quantile = np.vectorize(normal.inv_cdf)(first + share * (last - first))
    sigma = np.clip(1 / (1 + np.exp(-quantile)), low, high).astype(np.float32)
    return sigma, 1000 * sigma


def level_range(spec: "RunSpec", segment: int) -> tuple[float, float]:
    """Return the bounds of the noise levels of the expert of a segment, within [1e-3, 1 - 1e-3]: from
    the model's boundary up for expert 0, those below for expert 1.
    """
    low, high = LEAST_LEVEL, 1 - LEAST_LEVEL
    boundary = spec.preset.boundary
    if boundary is not None and spec.segments[segment].expert == 0:
        low = max(boundary, low)
    elif boundary is not None:
        high = min(boundary, high)
    return low, high


def gather(latents: Sequence[Array], videos: np.ndarray, mesh: jax.sharding.Mesh) -> Array:
    """Return the latents of videos, [M, B, F, H, W, C] fp32.

    latents: [B, F, H, W, C] of each rollout batch, in order. videos: int [M, B], their numbers.
    """
    sharding, size = sharding_lib.batch_sharding(mesh), len(latents[0])

    def batch(row: np.ndarray) -> Array:
        whole = len(row) == size and row[0] % size == 0
        if whole and np.array_equal(row, row[0] + np.arange(size)):
            return latents[row[0] // size]  # a rollout batch as it was sampled
        numbers = sharding_lib.place(row.astype(np.int32), sharding_lib.replicated(mesh))
        return branch(latents, numbers, sharding)

    return jnp.stack([batch(row) for row in videos])


def stack(
    selected: Selection,
    latents: Sequence[Array],
    texts: Sequence[TextBatch],
    levels: Levels,
    epoch_key: Array,
    mesh: jax.sharding.Mesh,
    *,
    cells: np.ndarray | None = None,
) -> FinishedBatch:
    """Return the batch of one optimiser step.

    Args:
        selected: one of `Selection.batches`.
        latents: the final latents of each rollout batch.
        texts: the text of each micro-batch.
        levels: the noise levels of all videos of the epoch.
        epoch_key: JAX key of the epoch.
        mesh: of the arrays.
        cells: `Credit.cell_weights`, of all videos of the epoch.
    """
    sharding = sharding_lib.batch_sharding(mesh)
    sigma, timestep = (
        jnp.asarray(np.moveaxis(x[selected.videos], -1, 1)) for x in (levels.sigma, levels.timestep)
    )
    video = [sharding_lib.place(row.astype(np.int32), sharding) for row in selected.videos]

    def cells_of(videos: np.ndarray | None) -> Array | None:
        if cells is None or videos is None:
            return None
        return jnp.stack([sharding_lib.place(cells[row], sharding) for row in videos])

    return FinishedBatch(
        x0=gather(latents, selected.videos, mesh),
        worse=None if selected.worse is None else gather(latents, selected.worse, mesh),
        text=jax.tree.map(lambda *leaves: jnp.stack(leaves), *texts),
        video=jnp.stack(video),
        sigma=sigma,
        timestep=timestep,
        weight=jnp.asarray(selected.weight),
        valid=jnp.asarray(selected.valid),
        draw=jnp.asarray(levels.draw),
        key=Stream.RENOISING.key(epoch_key),
        cells=cells_of(selected.videos),
        worse_cells=cells_of(selected.worse),
    )
