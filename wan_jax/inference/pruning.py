"""Early pruning of candidates: of the samples of a prompt, only those go on from a middle step whose
predicted reward is highest.

A reward head (`wan_jax.inference.reward_guidance`) predicts the reward of the finished video from the
latents at the noise level of that step. Its input is the noisy latents and their level, on which it
was trained, not a one-step estimate of the clean video.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.solvers import SolverState
from wan_jax.errors import UserError
from wan_jax.inference.reward_guidance import predict
from wan_jax.models.transformer import WanTransformer3D


@dataclasses.dataclass(frozen=True)
class Pruning:
    """Which samples of a prompt are denoised to the end.

    Attributes:
        head: predicts the reward.
        step: number of the step before which the samples are ranked, from 1.
        keep: number of samples of each prompt that go on.
    """

    head: WanTransformer3D
    step: int
    keep: int


def step_at(sigmas: np.ndarray, level: float) -> int:
    """Return the step, from 1, that begins nearest to a noise level. sigmas: of the schedule, [T + 1].
    Raises `UserError` with fewer than two steps.
    """
    if len(sigmas) < 3:
        raise UserError(
            "--steps=1 leaves no step at which candidates could be ranked: use 2 or more"
        )
    return 1 + int(np.abs(np.asarray(sigmas)[1:-1] - level).argmin())


def before_and_after(
    segments: Sequence[Segment], step: int
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Return the segments of the steps before `step`, and those from it on."""
    before = [Segment(s.expert, range(s.steps.start, min(s.steps.stop, step))) for s in segments]
    after = [Segment(s.expert, range(max(s.steps.start, step), s.steps.stop)) for s in segments]
    return tuple(s for s in before if s.steps), tuple(s for s in after if s.steps)


def collect(
    pruning: Pruning,
    every: Iterator[SolverState],
    texts: Iterable[TextBatch],
    timestep: float,
    batches: Sequence[np.ndarray],
) -> tuple[SolverState, np.ndarray]:
    """Return the states of all N videos in host memory, and their predicted rewards, fp32 [N].

    every, texts: of each batch, which may repeat videos at its end. timestep: of the step before
    which they are ranked. batches: the numbers of the videos of each batch.
    """
    graph, weights = nnx.split(pruning.head)
    level = jnp.asarray(timestep, jnp.float32)
    ranked = jax.jit(lambda w, x, text: predict(nnx.merge(graph, w), x, level, text))
    kept, predicted = [], []
    for rows, state, text in zip(batches, every, texts):
        predicted.append(np.asarray(ranked(weights, state.x, text))[: len(rows)])
        kept.append(jax.tree.map(np.asarray, state))
    sizes = [len(rows) for rows in batches]  # the last batch may repeat its videos
    states = jax.tree.map(
        lambda *parts: np.concatenate([part[:size] for part, size in zip(parts, sizes)]), *kept
    )
    return states, np.concatenate(predicted)


def survivors(predicted: np.ndarray, samples: int, keep: int) -> np.ndarray:
    """Return the numbers of the samples that go on, ascending: of each prompt the `keep` with the
    highest prediction, the first of equal ones; nan is the lowest.

    predicted: [prompts x samples], prompt by prompt.
    """
    values = np.where(np.isnan(predicted), -np.inf, predicted).reshape(-1, samples)
    best = np.sort(np.argsort(-values, axis=1, kind="stable")[:, :keep], axis=1)
    return (best + np.arange(len(values))[:, None] * samples).ravel()
