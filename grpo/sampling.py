"""Samples an epoch: every prompt's group of videos by the behaviour policy, decoded and scored.

The host is one batch ahead of the device, which so has work while the host fetches videos and hands
them to the scoring processes.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from grpo.advantages import step_importance
from grpo.compiled.functions import Functions
from grpo.data.prompts import PromptSet, epoch_prompts
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
from grpo.scoring.scores import PendingBatch, gather_rows, submit
from grpo.settings import frame_schedule
from rewards.pool import RewardPool
from wan_jax.distributed import multihost
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.inference import pipeline

States = dict[str, TrainState]  # of the trained experts
# of a trajectory: all arrays with an axis of videos, but for the text
BLANKED = ("x", "x_next", "log_prob", "mean")


@dataclasses.dataclass(frozen=True)
class Session:
    """What stays the same from the first epoch to the last."""

    functions: Functions
    prompts: PromptSet  # of training
    table: pipeline.TextTable  # their embeddings
    decode: Callable  # latents of a batch -> a function that returns this process's videos
    pool: RewardPool
    frozen: Callable[[int], object]  # an expert's base weights, brought to the device
    start: dict[str, Flat]  # the arrays of every expert that training would change, at the start
    to_device: Callable  # of a moving average that is kept in host memory
    progress: Callable  # iterable, desc=..., total=... -> the iterable with a progress bar

    @property
    def spec(self) -> RunSpec:
        return self.functions.spec

    def texts(self, prompt_of: np.ndarray) -> pipeline.TextBatch:
        """Return the embeddings of prompts, int [B], as a batch on the mesh."""
        mesh = self.spec.mesh
        return self.table.batch(
            prompt_of, sharding_lib.batch_sharding(mesh), sharding_lib.replicated(mesh)
        )


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """An epoch's N videos as training needs them, in rollout batches."""

    key: jax.Array  # of the epoch
    frames: int
    prompt_of: np.ndarray  # int [N], each video's prompt
    texts: Callable  # `Session.texts`
    trajectories: dict[str, list[Trajectory]]  # by expert: the stochastic steps of every batch
    finished: list[jax.Array]  # final latents of every batch, where the method keeps them
    kl: dict[str, np.ndarray]  # by trained expert, [K, N], where it is part of the reward
    importance: dict[str, np.ndarray]  # by trained expert, [K, N], where steps count by their own
    evaluations: int  # of the model
    evaluations_saved: int  # by steps that the videos of a group share


def sampling_weights(session: Session, states: States, expert: int) -> tuple:
    """Return (trainable, frozen) of an expert as it samples: the method's lagged copy where it has
    one for that, else the trained weights.
    """
    name = session.spec.preset.experts[expert]
    if name not in states:
        return session.start[name], session.frozen(expert)
    state, copy = states[name], session.spec.method.sampler
    return state.trainable if copy is None else state.lagged[copy], session.frozen(expert)


def averaged_weights(session: Session, states: States, expert: int) -> tuple:
    """Return (trainable, frozen) of an expert as it is judged: the moving average."""
    name = session.spec.preset.experts[expert]
    if name not in states:
        return session.start[name], session.frozen(expert)
    return session.to_device(states[name].ema), session.frozen(expert)


def sample_epoch(
    session: Session, states: States, epoch: int, clock: Stopwatch
) -> tuple[RolloutBatch, list[PendingBatch]]:
    """Return the epoch's videos as training needs them, and their scores while they are computed.

    All batches go through one expert's steps before the next expert's weights are brought.
    """
    spec, recipe, settings = session.spec, session.spec.recipe, session.spec.settings
    method, sample = spec.method, recipe.sample
    # ---- the epoch's draws: prompts, stochastic steps, noise
    frames = frame_schedule.at(epoch, sample.frames, sample.frame_schedule)
    key = jax.random.fold_in(Stream.ROLLOUT.key(jax.random.key(recipe.seed)), epoch)
    chosen = epoch_prompts(recipe.seed, epoch - 1, len(session.prompts), sample.groups)
    prompt_of = np.repeat(chosen, sample.group_size)
    windows = spec.windows.of_epoch(recipe.seed, epoch)
    size, sharded = sample.batch_size, sharding_lib.batch_sharding(spec.mesh)
    rows = [np.arange(b * size, (b + 1) * size) for b in range(settings.batches)]
    numbers = [sharding_lib.place(r.astype(np.int32), sharded) for r in rows]
    steps_done, saved = 0, 0
    if sample.shared_noise:
        steps_done, saved, noise = shared_prefix(
            session, states, key, frames, prompt_of, windows[0], rows
        )
    else:
        noise = [initial_noise(key, n, spec.shape_of(frames)) for n in numbers]

    # ---- denoise, decode and submit, a batch at a time
    batches = rollout_batches(
        session.functions.steps,
        lambda expert: sampling_weights(session, states, expert),
        noise,
        [session.texts(prompt_of[r]) for r in rows],
        key=key,
        samples=numbers,
        parts=spec.segments,
        windows=windows,
        done=steps_done,
        multistep=sample.ode_solver != "euler",
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
    finished, pending = [], []
    own = multihost.my_rows(sharded, size)  # of each batch, on this process's devices
    for i, b, x, trajectory, video in shown:
        name, place = spec.preset.experts[spec.segments[i].expert], f"{b + 1} of {len(rows)}"
        multihost.stage(f"epoch {epoch}: sampling batch {place} with {name}")
        if trajectory is not None:
            trajectories.setdefault(name, []).append(trajectory)
        clock("sample", x)
        if video is None:
            continue
        if method.keeps_latents:
            finished.append(x)
        multihost.stage(f"epoch {epoch}: decoding batch {place}")
        videos = video()
        clock("decode")
        if len(rows[b][own]):  # none where other processes answer for all that is here
            targets = [session.prompts.targets[p] for p in prompt_of[rows[b][own]]]
            pending.append(submit(session.pool, rows[b][own], videos, targets))

    # ---- what the method needs of the steps, on the host
    kl = {}
    if method.sampling_kl:
        for name in spec.trained:
            kl[name] = gather_rows([t.kl for t in trajectories[name]], sharded)
    importance = {}
    if method.importance:
        trained = {name: trajectories[name] for name in trajectories if name in spec.trained}
        importance = importance_of(trained, finished, sharded)
    evaluations = settings.videos * sample.steps - saved
    return (
        RolloutBatch(
            key,
            frames,
            prompt_of,
            session.texts,
            trajectories,
            finished,
            kl,
            importance,
            evaluations,
            saved,
        ),
        pending,
    )


def blanked(batch: RolloutBatch, finite: np.ndarray, mesh: jax.sharding.Mesh) -> RolloutBatch:
    """Return the batch with zeros for what videos that are not `finite` [N] left behind. Their loss
    is masked, but the gradient of a masked NaN is NaN.
    """
    if finite.all():
        return batch
    count = max(len(batch.finished), *map(len, batch.trajectories.values()), 0)
    sharding = sharding_lib.batch_sharding(mesh)
    rows = [sharding_lib.place(r, sharding) for r in finite.reshape(count, -1)]

    def without(trajectory: Trajectory, kept: jax.Array) -> Trajectory:
        arrays = tuple(getattr(trajectory, name) for name in BLANKED)
        return dataclasses.replace(
            trajectory, **dict(zip(BLANKED, zero_rows(arrays, kept, axis=1)))
        )

    return dataclasses.replace(
        batch,
        finished=[zero_rows(x, r, axis=0) for x, r in zip(batch.finished, rows)],
        trajectories={
            name: [without(t, r) for t, r in zip(batches, rows)]
            for name, batches in batch.trajectories.items()
        },
    )


def importance_of(
    trajectories: dict[str, list[Trajectory]],
    finished: Sequence[jax.Array],
    sharding: jax.sharding.Sharding,
) -> dict[str, np.ndarray]:
    """Return `step_importance` among the trained steps of all experts, [K, N] for each."""
    gains = {}
    for name, batches in trajectories.items():
        steps = [progress(t.x, t.x_next, final) for t, final in zip(batches, finished)]
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
    """Denoise what a group's videos share, before their first stochastic step, once for the group.

    Returns (steps done, evaluations saved, each batch's latents).
    """
    spec, sample = session.spec, session.spec.recipe.sample
    segment = spec.segments[0]
    steps = prefix(segment, window)
    sharded, replicated = sharding_lib.batch_sharding(spec.mesh), sharding_lib.replicated(spec.mesh)
    leaders = group_leaders(sample.groups, sample.group_size, sample.batch_size)
    trunk = []
    for leading in leaders:
        numbers = sharding_lib.place(leading, sharded)
        latents, _ = rollout(
            session.functions.steps[segment.expert],
            *sampling_weights(session, states, segment.expert),
            initial_noise(key, numbers, spec.shape_of(frames)),
            session.texts(prompt_of[leading]),
            key=key,
            samples=numbers,
            steps=steps,
            window=np.arange(0),
            multistep=sample.ode_solver != "euler",
        )
        trunk.append(latents)
    group_of = (np.arange(len(prompt_of)) // sample.group_size).astype(np.int32)
    latents = [branch(trunk, sharding_lib.place(group_of[r], replicated), sharded) for r in rows]
    return len(steps), len(steps) * (len(prompt_of) - leaders.size), latents
