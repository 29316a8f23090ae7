"""Held-out evaluation: the deployment sampler with fixed prompts and seeds, and the mean reward with
its confidence interval.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import numpy as np

from grpo.data.prompts import PromptSet
from grpo.records.run_log import reward_name
from grpo.records.statistics import LEAST_VALUES, bootstrap_interval
from grpo.rollout import initial_noise
from grpo.scoring import guard
from grpo.scoring.best_of import format_best, report_best
from grpo.scoring.reward_combination import MAIN, base_statistics
from grpo.scoring.scores import format_failures, gather_scores, submit
from rewards.pool_set import Pool
from wan_jax.diffusion.experts import Segment
from wan_jax.distributed import multihost
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.inference.pipeline import TextTable, one_ahead, sample_ode


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation."""

    # a line of evals.jsonl; reward, low and high are nan where fewer than two videos were scored
    record: dict
    videos: np.ndarray | None  # uint8 [n, T, H, W, 3], the previews; None without any
    why: str  # why videos have no score

    @property
    def warning(self) -> str | None:
        """The message to print where the evaluation has no result, else None."""
        if math.isfinite(self.record["reward"]):
            return None
        return (
            f"warning: the evaluation after epoch {self.record['epoch']} has no result: "
            f"{self.record['num']} of {len(self.record['rewards'])} videos were scored, and an "
            f"interval needs 2; {self.why}"
        )


def format_evaluation(record: dict) -> str:
    """Return an evaluation's record as one line of text."""
    unguided = ""
    if "unguided" in record:
        unguided = f"; without guidance: {format_evaluation(record['unguided'])}"
    best = format_best(record["best_of"]) if "best_of" in record else ""
    result = "unknown"
    if math.isfinite(record["reward"]):
        result = f"{record['reward']:.3f} [{record['low']:.3f}, {record['high']:.3f}]"
    failures = format_failures(record["failed_scores"], record)
    return (
        f"{reward_name(record)} {result} on {record['num']} prompts{f' ({failures})' if failures else ''}, "
        f"{record['seconds']:.1f} s{best}{unguided}"
    )


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates weights: everything that is the same in all evaluations of a run, and a call with
    the weights.
    """

    prompts: PromptSet
    table: TextTable  # embeddings of the prompts
    solver: object
    steps: tuple  # `pipeline.make_ode_step` of each expert
    parts: tuple[Segment, ...]  # the schedule's steps of each expert
    decode: Callable  # `pipeline.make_decoder`
    vae_state: object
    pool: Pool
    mesh: jax.sharding.Mesh
    shape: tuple[int, ...]  # of the latents of one video
    batch_size: int
    seed: int  # of the initial noise and of the interval's bootstrap samples
    previews: int  # number of videos to return
    unguided: tuple = ()  # as `steps` but without guidance, which is then evaluated as well
    main: str = MAIN  # the name of the main reward
    best_of: int = 1  # videos of each prompt, of which the one with the best main reward counts

    def __call__(self, arrays: Callable, epoch: int, progress=lambda x, **_: x) -> Evaluation:
        """Sample one video per prompt, or `best_of`, score them, and return the evaluation after
        `epoch`.

        arrays(expert): the first arguments of the expert's step, i.e. its weights. progress: wraps
        an iterable to show how far it is. The noise of a video is a function of (seed, number of
        the prompt). Every process scores the videos on its own devices; the result is the same on
        all processes.
        """
        start = time.monotonic()
        count, key = len(self.prompts), jax.random.key(self.seed)
        total = count * self.best_of  # video n is of prompt n % count
        replicated, sharded = (
            sharding_lib.replicated(self.mesh),
            sharding_lib.batch_sharding(self.mesh),
        )

        # 1. Sample latents, batch by batch. The last batch wraps around, so that all have one shape.
        firsts = range(0, total, self.batch_size)
        rows = [np.arange(first, first + self.batch_size) % total for first in firsts]
        batches = [
            (
                initial_noise(key, sharding_lib.place(index.astype(np.int32), sharded), self.shape),
                self.table.batch(index % count, sharded, replicated),
            )
            for index in rows
        ]
        latents = sample_ode(self.steps, arrays, self.parts, self.solver, batches)

        # 2. Decode them, and score this process's videos.
        pending, previews = [], []
        own_rows = multihost.my_rows(sharded, self.batch_size)
        decoding = ((first, self.decode(self.vae_state, x)) for first, x in zip(firsts, latents))
        for first, video in progress(one_ahead(decoding), total=len(rows)):
            multihost.stage(
                f"evaluation after epoch {epoch}: videos {first} to {first + self.batch_size - 1}"
            )
            in_range = own_rows < total - first  # not the rows that wrapped around
            videos, numbers = video()[in_range], first + own_rows[in_range]
            if len(numbers):
                pending.append(
                    submit(
                        self.pool,
                        numbers,
                        videos,
                        [self.prompts.targets[i % count] for i in numbers],
                    )
                )
            previews += [
                (number, frames)
                for number, frames in zip(numbers.tolist(), videos.frames)
                if number % count < self.previews
            ]

        # 3. Gather the scores and the previews of all processes.
        multihost.stage(f"evaluation after epoch {epoch}: scores")
        scores = gather_scores(pending, total, self.main)
        shown = dict(video for process in multihost.gather(previews) for video in process)
        best = None
        if self.best_of > 1:
            scores, best, rows = report_best(scores, count)
            shown = {number: shown[number] for number in rows.tolist() if number in shown}
            shown = {number % count: frames for number, frames in shown.items()}
        rewards, main = scores.values, scores.main
        num = int(scores.valid.sum())
        mean, low, high = (
            bootstrap_interval(rewards, seed=self.seed) if num >= LEAST_VALUES else [math.nan] * 3
        )
        record = {
            "epoch": epoch,
            "reward": mean,
            "low": low,
            "high": high,
            "num": num,
            **guard.halves(rewards, self.seed),
            "failed_scores": scores.failures,
            **scores.counts(),
            "rewards": [float(reward) for reward in rewards],
            "prompts": list(self.prompts.prompts),
            "texts": scores.texts,
            "seconds": time.monotonic() - start,
        }
        if best is not None:
            record["best_of"] = best
        if main != MAIN:
            record["main"] = main
        if scores.parts:
            record["measures"] = base_statistics(scores.parts, main)
        if self.unguided:
            unguided = dataclasses.replace(self, steps=self.unguided, unguided=(), previews=0)
            record["unguided"] = unguided(arrays, epoch, progress).record
            del record["unguided"]["prompts"], record["unguided"]["epoch"]
        return Evaluation(
            record,
            np.stack([shown[number] for number in sorted(shown)]) if shown else None,
            scores.why(),
        )
