"""What an epoch does: sampling, decoding and scoring with the present weights, then the updates."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import ml_collections
import numpy as np

from grpo.advantages import (
    GroupStatistics,
    extremes,
    from_groups_with_spread,
    group_advantages,
    group_statistics,
    largest_spread,
    step_advantages,
    step_importance,
)
from grpo.compiled.functions import Run
from grpo.data.prompts import PromptSet, epoch_prompts
from grpo.methods import flow_matching
from grpo.methods.selection import select
from grpo.records import run_log
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
from grpo.scoring import reward_combination
from grpo.scoring.scores import Scores, gather_rows, gather_scores, submit
from grpo.settings import frame_schedule
from grpo.settings.parse import Settings
from grpo.update import TrainState, stack_batches
from rewards.workers import RewardPool
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import multihost
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.storage.checkpoint import Checkpoints

# of a trajectory: all arrays with an axis of videos, but for the text
BLANKED = ("x", "x_next", "log_prob", "mean")
STAGES = ("sample", "decode", "score_wait", "update")
BOUNDS = {"ratio_min": min, "ratio_max": max, "ratio_max_error": max}  # what an epoch says of them


class Stopwatch:
    """Called after a stage: adds the seconds since the last call, once the arrays given are
    computed. The clock is monotonic: setting the machine's clock changes no duration and ends no
    budget.
    """

    def __init__(self):
        self.first = self.last = time.monotonic()
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def __call__(self, stage: str, wait_for=None) -> None:
        jax.block_until_ready(wait_for)
        before, self.last = self.last, time.monotonic()
        self.seconds[stage] += self.last - before

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.first


@dataclasses.dataclass(frozen=True)
class Sampled:
    """An epoch's N videos, in batches, and their scores."""

    key: jax.Array  # of the epoch
    length: int  # frames
    prompt_of: np.ndarray  # [N] int, numbers of prompts; a group's videos stand together
    trajectories: dict[str, list[Trajectory]]  # an expert's stochastic steps, by batch
    # latents by batch, where the method trains on them or weighs steps by them
    finished: list[jax.Array]
    # [K, N] to the reference, of an expert's steps, where it is part of the reward
    kl: dict[str, np.ndarray]
    importance: dict[str, np.ndarray]  # [K, N] of an expert's steps, where these are told apart
    scores: Scores
    evaluations: int  # of the model
    saved: int  # by prefixes that groups share


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What the rewards say; the same on every process."""

    total: np.ndarray  # [N], the sum of the weighted rewards
    valid: np.ndarray  # [N] bool
    advantages: np.ndarray  # [N]
    groups: GroupStatistics
    spread: np.ndarray  # [N] bool, the valid videos of groups whose rewards are not all equal
    order: np.ndarray  # the batches that are trained
    counted: np.ndarray  # [N] bool, the videos that Flow-GRPO trains


@dataclasses.dataclass
class Learner:
    """The experts under training. `states` is what changes; the sources of weights return those of
    expert i.
    """

    c: ml_collections.ConfigDict
    s: Settings
    run: Run
    boundary: float | None  # of two experts
    shapes: dict[int, tuple[int, ...]]  # latents of one video of so many frames
    prompts: PromptSet
    table: pipeline.TextTable
    pool: RewardPool
    decode: Callable
    vae: object  # its state
    start: dict[str, dict[str, jax.Array]]  # each expert's trainable arrays before training
    weights: Callable[[int], object]  # frozen ones, on the device
    states: dict[str, TrainState]  # of the experts that are trained
    on_device: Callable  # of an average that may wait in host memory
    checkpoints: Checkpoints
    bar: Callable

    def __post_init__(self):
        mesh = self.run.mesh
        self.replicated, self.sharded = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
        self.experts, self.parts, self.windows = (
            self.run.preset.experts,
            self.run.parts,
            self.run.windows,
        )
        self.key = jax.random.key(self.c.seed)

    def sampled(self, expert: int) -> tuple:
        """Weights to sample with: (trainable, frozen)."""
        name = self.experts[expert]
        if name not in self.states:
            return self.start[name], self.weights(expert)
        state = self.states[name]
        return (state.old if self.c.train.method == "nft" else state.trainable), self.weights(
            expert
        )

    def averaged(self, expert: int) -> tuple:
        """Weights to judge: (trainable, frozen)."""
        name = self.experts[expert]
        return (
            self.on_device(self.states[name].ema) if name in self.states else self.start[name],
            self.weights(expert),
        )

    def texts(self, prompt_of: np.ndarray) -> pipeline.TextBatch:
        return self.table.batch(prompt_of, self.sharded, self.replicated)

    # ---- sampling --------------------------------------------------------------------------------
    def sample(self, epoch: int, lap: Stopwatch) -> Sampled:
        """All batches by one expert before the next. The host is one batch ahead of the device,
        which so has work while the host fetches videos and hands them to the scoring processes.
        """
        c, s = self.c, self.s
        length = frame_schedule.at(epoch, c.sample.frames, c.sample.frame_schedule)
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1), epoch)
        chosen = epoch_prompts(c.seed, epoch - 1, len(self.prompts), c.sample.groups)
        prompt_of = np.repeat(chosen, c.sample.group_size)
        windows = self.windows.of_epoch(c.seed, epoch)
        rows = [
            np.arange(b * c.sample.batch_size, (b + 1) * c.sample.batch_size)
            for b in range(s.batches)
        ]
        samples = [mesh_lib.place(r.astype(np.int32), self.sharded) for r in rows]
        if c.sample.shared_noise:
            done, saved, noise = self.shared_prefix(key, length, prompt_of, windows[0], rows)
        else:
            done, saved = 0, 0
            noise = [initial_noise(key, numbers, self.shapes[length]) for numbers in samples]

        trajectories, finished, pending = {}, [], []
        # of each batch, on this process's devices
        mine = multihost.my_rows(self.sharded, c.sample.batch_size)
        batches = rollout_batches(
            self.run.steps,
            self.sampled,
            noise,
            [self.texts(prompt_of[r]) for r in rows],
            key=key,
            samples=samples,
            parts=self.parts,
            windows=windows,
            done=done,
            multistep=c.sample.ode_solver != "euler",
        )
        last = len(self.parts) - 1
        decoding = (
            (*batch, self.decode(self.vae, batch[2]) if batch[0] == last else None)
            for batch in batches
        )
        for i, b, x, trajectory, video in self.bar(
            pipeline.one_ahead(decoding), desc=f"epoch {epoch}", total=len(self.parts) * s.batches
        ):
            name = self.experts[self.parts[i].expert]
            multihost.stage(f"epoch {epoch}: sampling batch {b + 1} of {s.batches} with {name}")
            if trajectory is not None:
                trajectories.setdefault(name, []).append(trajectory)
            lap("sample", x)
            if video is not None:
                if s.forward is not None or s.importance:
                    finished.append(x)
                multihost.stage(f"epoch {epoch}: decoding batch {b + 1} of {s.batches}")
                videos = video()  # those of rows `mine`
                lap("decode")
                numbers = rows[b][mine]
                if len(numbers):  # none where other processes answer for all that lie here
                    targets = [self.prompts.targets[p] for p in prompt_of[numbers]]
                    pending.append(submit(self.pool, numbers, videos, targets))
        multihost.stage(f"epoch {epoch}: scores")
        scores = gather_scores(pending, s.videos)
        lap("score_wait")
        kl = {
            name: gather_rows([t.kl for t in kept], self.sharded)
            for name, kept in trajectories.items()
            if s.kl_reward and name in self.states
        }
        importance = self.importance(trajectories, finished)
        if scores.nonfinite:
            self.blank(trajectories, finished, scores.finite)
        return Sampled(
            key,
            length,
            prompt_of,
            trajectories,
            finished,
            kl,
            importance,
            scores,
            s.videos * c.sample.steps - saved,
            saved,
        )

    def blank(
        self,
        trajectories: dict[str, list[Trajectory]],
        finished: list[jax.Array],
        finite: np.ndarray,
    ) -> None:
        """Replace what the videos that are not `finite` [N] left behind by zeros. Their loss is
        masked, but the gradient of a masked NaN is NaN.
        """
        kept = [mesh_lib.place(rows, self.sharded) for rows in finite.reshape(self.s.batches, -1)]
        finished[:] = [zero_rows(x, rows, axis=0) for x, rows in zip(finished, kept)]
        for batches in trajectories.values():
            batches[:] = [
                dataclasses.replace(
                    t,
                    **dict(
                        zip(
                            BLANKED,
                            zero_rows(tuple(getattr(t, name) for name in BLANKED), rows, axis=1),
                        )
                    ),
                )
                for t, rows in zip(batches, kept)
            ]

    def importance(
        self, trajectories: dict[str, list[Trajectory]], finished: Sequence[jax.Array]
    ) -> dict[str, np.ndarray]:
        """`step_importance` among the trained steps of all experts."""
        if not self.s.importance:
            return {}
        gains = {
            name: gather_rows(
                [progress(t.x, t.x_next, x) for t, x in zip(kept, finished)], self.sharded
            )
            for name, kept in trajectories.items()
            if name in self.states
        }
        ends = np.cumsum([len(g) for g in gains.values()])
        return dict(
            zip(gains, np.split(step_importance(np.concatenate([*gains.values()])), ends[:-1]))
        )

    def shared_prefix(
        self,
        key,
        length: int,
        prompt_of: np.ndarray,
        window: np.ndarray,
        rows: Sequence[np.ndarray],
    ) -> tuple[int, int, list[jax.Array]]:
        """A group's videos are one until they branch: (steps done, evaluations saved, each batch's
        latents).
        """
        sample, expert = self.c.sample, self.parts[0].expert
        shared = prefix(self.parts[0], window)
        first = group_leaders(sample.groups, sample.group_size, sample.batch_size)
        trunk = []
        for r in first:
            numbers = mesh_lib.place(r, self.sharded)
            trunk.append(
                rollout(
                    self.run.steps[expert],
                    *self.sampled(expert),
                    initial_noise(key, numbers, self.shapes[length]),
                    self.texts(prompt_of[r]),
                    key=key,
                    samples=numbers,
                    steps=shared,
                    window=np.arange(0),
                    multistep=sample.ode_solver != "euler",
                )[0]
            )
        groups = (np.arange(len(prompt_of)) // sample.group_size).astype(np.int32)
        return (
            len(shared),
            len(shared) * (len(prompt_of) - first.size),
            [branch(trunk, mesh_lib.place(groups[r], self.replicated), self.sharded) for r in rows],
        )

    # ---- learning --------------------------------------------------------------------------------
    def lesson(self, sampled: Sampled, base: reward_combination.Base) -> Lesson:
        """base: the measures of the starting model. Where not one video could be scored, none is
        valid.
        """
        c, s, scores, prompt_of = self.c, self.s, sampled.scores, sampled.prompt_of
        rewards = reward_combination.terms(scores.values, scores.parts, s.weights, base)
        total = reward_combination.combined(rewards, s.weights)
        valid = scores.valid & np.isfinite(total)
        advantages = (
            group_advantages(total, prompt_of, valid, **self.normalised)
            if c.reward.combine == "rewards"
            else reward_combination.combined_advantages(
                rewards, s.weights, prompt_of, valid, **self.normalised
            )
        )
        kept = largest_spread(total, prompt_of, valid, c.train.groups or c.sample.groups)
        differing = [total] if c.reward.combine == "rewards" else list(rewards.values())
        return Lesson(
            total,
            valid,
            advantages,
            group_statistics(total, prompt_of, valid),
            from_groups_with_spread(differing, prompt_of, valid),
            np.flatnonzero(kept.reshape(s.batches, -1).any(1)),
            kept & extremes(total, prompt_of, valid, c.train.best_of),
        )

    @property
    def normalised(self) -> dict:
        """How advantages are."""
        return dict(std=self.c.train.advantage_std, clip=self.c.train.advantage_clip)

    def learn(self, epoch: int, sampled: Sampled, lesson: Lesson) -> dict:
        """Make the epoch's updates. Returns `summary` of all of them, how many videos they were
        from, and where two experts are trained the summary of each one's under `run_log.EXPERTS`.
        The expert that is on the device goes first, so that the next epoch finds the first one
        there.
        """
        # by expert: what each of its updates measured; numbers of videos
        updates, trained = {}, set()
        for i, part in reversed(list(enumerate(self.parts))):
            expert, name = part.expert, self.experts[part.expert]
            if name not in self.states:
                continue
            done, batches = (
                updates.setdefault(name, []),
                (self.regression_batches if self.s.forward else self.policy_batches),
            )
            for videos, *batch in batches(epoch, i, sampled, lesson):
                self.states[name], metrics, norms = self.run.updates[expert](
                    self.states[name], self.weights(expert), *batch
                )
                values = metrics.averages() | {k: float(v) for k, v in norms.items()}
                check_finite(values, epoch, self.checkpoints)
                if self.s.forward is None and not done:
                    values["ratio_max_error"] = max(
                        values["ratio_max"] - 1, 1 - values["ratio_min"]
                    )
                    check_ratio(values["ratio_max_error"], self.s.ratio_tolerance, epoch)
                if self.s.kl_reward:
                    values["kl"] = float(
                        np.nanmean(sampled.kl[name][:, list(self.windows.videos(i))])
                    )
                done.append(values)
                trained.update(videos.tolist())
        record = summary([values for done in updates.values() for values in done]) | {
            "videos_trained": len(trained)
        }
        return (
            record
            if len(updates) == 1
            else record | {run_log.EXPERTS: {name: summary(done) for name, done in updates.items()}}
        )

    def policy_batches(
        self, epoch: int, i: int, sampled: Sampled, lesson: Lesson
    ) -> Iterator[tuple]:
        """GRPO's, of the steps in segment i: (the counted videos, arguments of the update...). An
        update whose videos are all from groups without spread is left out, though its KL would have
        a gradient.
        """
        expert, batches = self.parts[i].expert, self.s.batches
        name, here = self.experts[expert], np.isin(np.arange(self.s.videos), self.windows.videos(i))
        trajectories, advantages = sampled.trajectories[name], lesson.advantages
        if self.s.kl_reward:
            advantages = step_advantages(
                lesson.total,
                sampled.kl[name],
                self.s.kl_reward,
                sampled.prompt_of,
                here & lesson.valid,
                **self.normalised,
            )
        if self.s.importance:
            advantages = advantages * sampled.importance[name]
        # [batches, (K,) B]
        by_batch = np.moveaxis(advantages.reshape(*advantages.shape[:-1], batches, -1), -2, 0)
        rows, decay = (here & lesson.counted).reshape(batches, -1), self.s.loss.reference_decay
        kept = () if decay is None else (decay,)  # of the average that the KL is to
        spread, numbers = (
            x.reshape(batches, -1) for x in (lesson.spread, np.arange(self.s.videos))
        )
        for chosen in lesson.order[self.run.update_batches(expert)]:
            if (rows & spread)[chosen].any():
                yield (
                    numbers[chosen][rows[chosen]],
                    stack_batches(
                        [trajectories[b] for b in chosen], by_batch[chosen], rows[chosen]
                    ),
                    *kept,
                )

    def regression_batches(
        self, epoch: int, i: int, sampled: Sampled, lesson: Lesson
    ) -> Iterator[tuple]:
        """The same of the methods that train on finished videos, at the noise levels of segment i's
        expert. Videos of groups without spread are masked; an update without any other is left out.
        """
        c, method = self.c, self.s.forward
        value = lesson.total if c.reward.combine == "rewards" else lesson.advantages
        name = self.experts[self.parts[i].expert]
        updates = select(
            method, value, lesson.advantages, lesson.spread, c.sample.group_size
        ).batches(
            c.train.updates_per_epoch, c.sample.batch_size, mesh_lib.batch_shards(self.run.mesh)
        )
        updates = [chosen for chosen in updates if chosen.valid.any()]
        levels = flow_matching.noise_levels(
            method,
            c.seed,
            epoch,
            self.s.videos,
            self.parts[i].expert,
            self.parts,
            self.windows.quotas,
            self.run.schedule,
            self.boundary,
        )
        for chosen in updates:
            texts = [self.texts(sampled.prompt_of[r]) for r in chosen.videos]
            number = int(self.states[name].updates) + 1
            yield (
                chosen.numbers,
                flow_matching.stack(
                    chosen, sampled.finished, texts, levels, sampled.key, self.run.mesh
                ),
                *method.old_kept(number, chosen is updates[-1]),
            )


def summary(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """What several updates measured: of each KEY the mean, and KEY_min and KEY_max over the
    updates. The ratio's bounds are those of all updates; its error, which only an expert's first
    update of an epoch measures, is the largest.
    """
    record = {"updates": len(updates)}
    for key in dict.fromkeys(key for values in updates for key in values):
        found = [values[key] for values in updates if key in values]
        if key in BOUNDS:
            record[key] = BOUNDS[key](found)
        else:
            record |= {
                key: sum(found) / len(found),
                f"{key}_min": min(found),
                f"{key}_max": max(found),
            }
    return record


def check_finite(values: dict[str, float], epoch: int, checkpoints: Checkpoints):
    bad = {k: v for k, v in values.items() if not math.isfinite(v)}
    if bad:
        raise UserError(
            f"epoch {epoch}: the update is not finite "
            f"({', '.join(f'{k}={v}' for k, v in bad.items())}). Nothing was saved; the last good "
            f"checkpoint is {checkpoints.path(checkpoints.latest())}. Lower "
            "--config.train.learning_rate, or raise --config.train.kl_weight, in a new run_dir"
        )


def check_ratio(error: float, tolerance: float, epoch: int):
    if error > tolerance:
        raise UserError(
            f"epoch {epoch}: the first update's ratio differs from 1 by {error:.2e}, more than "
            f"train.ratio_tolerance={tolerance:g}: rollout and update disagree, gradients would be "
            "wrong"
        )


def clip_warning(record: dict, train: ml_collections.ConfigDict) -> str | None:
    """Where rounding alone moves the ratio as far as the clip range. record: an epoch's; train: the
    recipe's.
    """
    error, clip = record.get("ratio_max_error", 0.0), min(train.clip_low, train.clip_high)
    if train.objective == "dppo" or error < clip:
        return None
    return (
        f"warning: the first update's ratio differs from 1 by {error:.1e}, the clip range is "
        f"{clip:g}: rounding alone is clipped, and learning is slower for it. Raise "
        "--config.train.clip_low and clip_high, or set --config.model.dtype=float32"
    )
