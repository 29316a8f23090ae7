"""Samples an epoch: the groups of videos of its prompts by the behaviour policy, decoded and submitted
for scoring.

The host dispatches one batch ahead, so that the device has work while the host fetches videos and
passes them to the scoring processes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo.compiled.functions import Functions
from grpo.data.prompts import PromptSet, epoch_prompts
from grpo.learning.data_loss import DataSource
from grpo.learning.head_guidance import HeadState
from grpo.learning.optimiser import TrainState
from grpo.learning.policy import Flat
from grpo.random_streams import Stream
from grpo.records.clock import Stopwatch
from grpo.rollout import (
    Trajectory,
    branch,
    group_leaders,
    initial_noise,
    prefix,
    progress,
    rollout,
    rollout_batches,
    zero_rows,
)
from grpo.run import RunSpec
from grpo.scoring.advantages import step_importance
from grpo.scoring.group_spread import group_spread, sampled_values
from grpo.scoring.scores import PendingBatch, gather_rows, submit
from grpo.settings import frame_schedule
from rewards.pool_set import Pool
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.distributed import multihost
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.inference import pipeline

States = dict[str, TrainState]  # by name of the trained expert


@dataclasses.dataclass(frozen=True)
class Session:
    """The objects that all epochs of a run share.

    Attributes:
        functions: the jitted functions.
        prompts: of training.
        table: the embeddings of the prompts.
        decode: latents of a batch -> a function that returns the videos of this process.
        pool: the processes that score.
        frozen: number of an expert -> its base weights, on the device.
        start: the trainable arrays of the experts that are not trained.
        to_device: copies a moving average from host memory to the device; the identity where it
            is not offloaded.
        progress: (iterable, desc=..., total=...) -> the iterable with a progress bar.
        data: that updates train on too; None: without.
    """

    functions: Functions
    prompts: PromptSet
    table: pipeline.TextTable
    decode: Callable
    pool: Pool
    frozen: Callable[[int], Any]
    start: dict[str, Flat]
    to_device: Callable
    progress: Callable
    data: DataSource | None = None

    @property
    def spec(self) -> RunSpec:
        """The description of the run."""
        return self.functions.spec

    def of_epoch(self, epoch: int) -> "Session":
        """Return the session with the functions for the size of an epoch's videos."""
        return dataclasses.replace(self, functions=self.functions.of_epoch(epoch))

    def texts(self, prompt_of: np.ndarray) -> TextBatch:
        """Return the embeddings of prompts, int [B], as a batch on the mesh."""
        mesh = self.spec.mesh
        return self.table.batch(
            prompt_of, sharding_lib.batch_sharding(mesh), sharding_lib.replicated(mesh)
        )


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """The N videos of an epoch as training needs them, in rollout batches. Dicts are by the name of
    the expert.

    Attributes:
        key: JAX key of the epoch.
        frames: of a video.
        prompt_of: int [N], the prompt of each video.
        texts: `Session.texts`.
        trajectories: the stochastic steps of every batch, until the updates of an expert take them.
        finished: [B, F, H, W, C] fp32, final latents of every batch, where the method keeps them.
        kl: [K, N] of trained experts, where the KL is part of the reward.
        importance: [K, N] of trained experts, weights of the steps; empty unless they differ
            between videos (train.credit=otca).
        evaluations: of the model.
        evaluations_saved: of the model, because the videos of a group share their first steps.
        group_spread: `group_spread` of the final latents.
    """

    key: jax.Array
    frames: int
    prompt_of: np.ndarray
    texts: Callable
    trajectories: dict[str, list[Trajectory]]
    finished: list[jax.Array]
    kl: dict[str, np.ndarray]
    importance: dict[str, np.ndarray]
    evaluations: int
    evaluations_saved: int
    group_spread: float


def sampling_weights(
    session: Session, states: States, expert: int, head: HeadState | None = None
) -> tuple:
    """Return (trainable, frozen) of the behaviour policy of an expert: the lagged copy that the
    method samples with, else the trained weights. head: that guides the rollout; `trainable` is then
    (trainable, its arrays).
    """
    name = session.spec.preset.experts[expert]
    if name not in states:
        weights = session.start[name]
    else:
        state, copy = states[name], session.spec.method.sampler
        weights = state.trainable if copy is None else state.lagged[copy]
    return weights if head is None else (weights, head.arrays), session.frozen(expert)


def averaged_weights(session: Session, states: States, expert: int) -> tuple:
    """Return (trainable, frozen) of an expert for evaluations: the moving average, where there is one."""
    name = session.spec.preset.experts[expert]
    if name not in states:
        return session.start[name], session.frozen(expert)
    return session.to_device(states[name].averaged), session.frozen(expert)


def sample_epoch(
    session: Session, states: States, epoch: int, clock: Stopwatch, head: HeadState | None = None
) -> tuple[RolloutBatch, list[PendingBatch]]:
    """Return the videos of an epoch as training needs them, and their pending scores. head: that guides
    the rollout.

    All batches are computed with one expert before the next expert's weights are loaded onto the
    device.
    """
    spec, recipe, settings = session.spec, session.spec.recipe, session.spec.settings
    method, sample = spec.method, recipe.sample

    # ---- the draws of the epoch: prompts, stochastic steps, noise ----------------------------
    frames = frame_schedule.at(epoch, sample.frames, sample.frame_schedule)
    key = jax.random.fold_in(Stream.ROLLOUT.key(jax.random.key(recipe.seed)), epoch)
    chosen = epoch_prompts(recipe.seed, epoch - 1, len(session.prompts), sample.groups)
    prompt_of = np.repeat(chosen, sample.group_size)
    windows = spec.windows.of_epoch(recipe.seed, epoch)
    noisy = sample.untrained_noise and method.keeps_steps
    size, sharded = sample.batch_size, sharding_lib.batch_sharding(spec.mesh)
    rows = [np.arange(b * size, (b + 1) * size) for b in range(settings.batches)]
    numbers = [sharding_lib.place(r.astype(np.int32), sharded) for r in rows]
    steps_done = saved = 0
    if sample.shared_noise:
        first = np.array(spec.segments[0].steps) if noisy else windows[0]
        steps_done, saved, noise = shared_prefix(
            session, states, key, frames, prompt_of, first, rows
        )
    else:
        noise = [initial_noise(key, n, spec.shape_of(frames)) for n in numbers]

    # ---- denoise, decode and submit, batch by batch ------------------------------------------
    batches = rollout_batches(
        session.functions.steps,
        lambda expert: sampling_weights(session, states, expert, head),
        noise,
        [session.texts(prompt_of[r]) for r in rows],
        key=key,
        samples=numbers,
        parts=spec.segments,
        windows=windows,
        done=steps_done,
        multistep=sample.ode_solver != "euler",
        untrained_noise=noisy,
    )
    last = len(spec.segments) - 1
    decoding = (
        (*batch, session.decode(batch[2]) if batch[0] == last else None) for batch in batches
    )
    shown = session.progress(
        pipeline.one_ahead(decoding),
        desc=f"epoch {epoch}",
        total=len(spec.segments) * settings.batches,
    )
    trajectories: dict[str, list[Trajectory]] = {}
    finished, pending, values = [], [], []
    local = multihost.my_rows(sharded, size)  # rows of each batch on the devices of this process
    for i, b, x, trajectory, video in shown:
        name, place = spec.preset.experts[spec.segments[i].expert], f"{b + 1} of {len(rows)}"
        multihost.stage(f"epoch {epoch}: sampling batch {place} with {name}")
        if trajectory is not None:
            trajectories.setdefault(name, []).append(trajectory)
        clock("sample", x)
        if video is None:
            continue
        values.append(sampled_values(x))
        if method.keeps_latents:
            finished.append(x)
        multihost.stage(f"epoch {epoch}: decoding batch {place}")
        videos = video()
        clock("decode")
        if len(rows[b][local]):  # else this process scores no row of the batch
            targets = [session.prompts.targets[p] for p in prompt_of[rows[b][local]]]
            pending.append(submit(session.pool, rows[b][local], videos, targets, sample.group_size))

    # ---- values of the steps that the method needs on the host -------------------------------
    kl = {}
    if method.sampling_kl:
        for name in spec.trained:
            measured = [t.kl for t in trajectories[name] if t.kl is not None]
            kl[name] = gather_rows(measured, sharded)
    importance = {}
    if method.importance:
        trained = {name: trajectories[name] for name in trajectories if name in spec.trained}
        importance = importance_of(trained, finished, sharded)
    batch = RolloutBatch(
        key=key,
        frames=frames,
        prompt_of=prompt_of,
        texts=session.texts,
        trajectories=trajectories,
        finished=finished,
        kl=kl,
        importance=importance,
        evaluations=settings.videos * sample.steps - saved,
        evaluations_saved=saved,
        group_spread=group_spread(gather_rows(values, sharded), sample.group_size),
    )
    return batch, pending


def zero_nonfinite(
    batch: RolloutBatch, finite: np.ndarray, mesh: jax.sharding.Mesh
) -> RolloutBatch:
    """Return the batch with zeros in the arrays of videos that are not finite. Their loss is masked,
    but the gradient of a masked NaN is NaN. finite: bool [N].
    """
    if finite.all():
        return batch
    count = max(len(batch.finished), *map(len, batch.trajectories.values()), 0)
    sharding = sharding_lib.batch_sharding(mesh)
    rows = [sharding_lib.place(r, sharding) for r in finite.reshape(count, -1)]

    def zeroed(trajectory: Trajectory, valid: jax.Array) -> Trajectory:
        t, log_prob = trajectory, zero_rows(trajectory.log_prob, valid, axis=1)
        kept = {id(x): zero_rows(x, valid) for x in (*t.x, *t.x_next, *(t.mean or ()))}
        x, x_next = (tuple(kept[id(a)] for a in arrays) for arrays in (t.x, t.x_next))
        mean = None if t.mean is None else tuple(kept[id(a)] for a in t.mean)
        return dataclasses.replace(t, x=x, x_next=x_next, mean=mean, log_prob=log_prob)

    return dataclasses.replace(
        batch,
        finished=[zero_rows(x, valid) for x, valid in zip(batch.finished, rows)],
        trajectories={
            name: [zeroed(trajectory, valid) for trajectory, valid in zip(batches, rows)]
            for name, batches in batch.trajectories.items()
        },
    )


def importance_of(
    trajectories: dict[str, list[Trajectory]],
    finished: Sequence[jax.Array],
    sharding: jax.sharding.NamedSharding,
) -> dict[str, np.ndarray]:
    """Return `step_importance` of the trained steps of all experts together, [K, N] for each expert.

    trajectories: of the trained experts. finished: final latents of every batch. sharding: of B.
    """
    gains = {}
    for name, batches in trajectories.items():
        steps = [
            jnp.stack([progress(x, x_next, final) for x, x_next in zip(t.x, t.x_next)])
            for t, final in zip(batches, finished)
        ]
        gains[name] = gather_rows(steps, sharding)
    ends = np.cumsum([len(g) for g in gains.values()])
    weights = step_importance(np.concatenate([*gains.values()]))
    return dict(zip(gains, np.split(weights, ends[:-1])))


def shared_prefix(
    session: Session,
    states: States,
    key: jax.Array,
    frames: int,
    prompt_of: np.ndarray,
    window: np.ndarray,
    rows: Sequence[np.ndarray],
) -> tuple[int, int, list[jax.Array]]:
    """Compute the steps before the first stochastic one, which the videos of a group share, once for
    each group. Returns (number of these steps, evaluations saved, latents of each batch).

    prompt_of: int [N]. window: the stochastic steps of the first segment. rows: numbers of the
    videos of each batch.
    """
    spec, sample = session.spec, session.spec.recipe.sample
    segment = spec.segments[0]
    steps = prefix(segment, window)
    sharded, replicated = sharding_lib.batch_sharding(spec.mesh), sharding_lib.replicated(spec.mesh)
    leaders = group_leaders(sample.groups, sample.group_size, sample.batch_size)
    shared = []  # latents of the groups, in batches
    for leading in leaders:
        numbers = sharding_lib.place(leading, sharded)
        trainable, frozen = sampling_weights(session, states, segment.expert)
        latents, _ = rollout(
            session.functions.steps[segment.expert],
            trainable,
            frozen,
            initial_noise(key, numbers, spec.shape_of(frames)),
            session.texts(prompt_of[leading]),
            key=key,
            samples=numbers,
            steps=steps,
            window=np.arange(0),
            multistep=sample.ode_solver != "euler",
        )
        shared.append(latents)
    group_of = (np.arange(len(prompt_of)) // sample.group_size).astype(np.int32)
    latents = [branch(shared, sharding_lib.place(group_of[r], replicated), sharded) for r in rows]
    return len(steps), len(steps) * (len(prompt_of) - leaders.size), latents
