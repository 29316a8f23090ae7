"""Held-out evaluation: the deployment sampler, fixed prompts and seeds, OCR rewards with a
confidence interval.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import numpy as np

from grpo.data.prompts import PromptSet
from grpo.records.statistics import LEAST_VALUES, bootstrap_interval
from grpo.rollout import initial_noise
from grpo.scoring.reward_combination import base_statistics
from grpo.scoring.scores import format_failures, gather_scores, submit
from rewards.workers import RewardPool
from wan_jax.diffusion.experts import Segment
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import multihost
from wan_jax.inference.pipeline import TextTable, one_ahead, sample_ode


@dataclasses.dataclass(frozen=True)
class Evaluation:
    # what evals.jsonl holds; reward, low and high are nan where fewer than two videos were scored
    record: dict
    videos: np.ndarray | None  # uint8 [n, T, H, W, 3], the first samples
    why: str  # why videos have no score

    @property
    def warning(self) -> str | None:
        """What to print where the evaluation has no result."""
        if math.isfinite(self.record["reward"]):
            return None
        return (
            f"warning: the evaluation after epoch {self.record['epoch']} has no result: "
            f"{self.record['num']} of {len(self.record['rewards'])} videos were scored, and an "
            f"interval needs 2; {self.why}"
        )


def said(record: dict) -> str:
    """An evaluation's record in one line."""
    alone = f"; without guidance: {said(record['unguided'])}" if "unguided" in record else ""
    result = (
        f"{record['reward']:.3f} [{record['low']:.3f}, {record['high']:.3f}]"
        if math.isfinite(record["reward"])
        else "unknown"
    )
    failures = format_failures(record["failed_scores"], record)
    return (
        f"OCR reward {result} on {record['num']} prompts{f' ({failures})' if failures else ''}, "
        f"{record['seconds']:.1f} s{alone}"
    )


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Everything that stays fixed between the evaluations of a run; call it with the weights to
    judge.
    """

    prompts: PromptSet
    table: TextTable
    solver: object
    steps: tuple  # one `pipeline.make_ode_step` an expert
    parts: tuple[Segment, ...]  # the schedule's steps by expert
    decode: object  # `pipeline.make_decoder`
    vae_state: object
    pool: RewardPool
    mesh: jax.sharding.Mesh
    shape: tuple[int, ...]  # latents of one video
    batch_size: int
    seed: int
    previews: int
    unguided: tuple = ()  # as `steps`, without guidance: evaluated as well

    def __call__(self, arrays: Callable, epoch: int, progress=lambda x, **_: x) -> Evaluation:
        """arrays(expert): what its step takes first. One sample a prompt, its noise from (seed,
        number). Every process scores the videos on its own devices; the result is the same on all.
        """
        start, pending, kept = time.monotonic(), [], []
        total, key = len(self.prompts), jax.random.key(self.seed)
        replicated, sharded = mesh_lib.replicated(self.mesh), mesh_lib.batch_sharding(self.mesh)
        firsts = range(0, total, self.batch_size)
        # the last wraps: one shape
        rows = [np.arange(first, first + self.batch_size) % total for first in firsts]
        batches = [
            (
                initial_noise(key, mesh_lib.place(index.astype(np.int32), sharded), self.shape),
                self.table.batch(index, sharded, replicated),
            )
            for index in rows
        ]
        latents = sample_ode(self.steps, arrays, self.parts, self.solver, batches)
        mine = multihost.my_rows(sharded, self.batch_size)
        decoding = ((first, self.decode(self.vae_state, x)) for first, x in zip(firsts, latents))
        for first, video in progress(one_ahead(decoding), total=len(rows)):
            multihost.stage(
                f"evaluation after epoch {epoch}: videos {first} to {first + self.batch_size - 1}"
            )
            real = mine < total - first  # not those that wrapped
            videos, numbers = video()[real], first + mine[real]
            if len(numbers):
                pending.append(
                    submit(self.pool, numbers, videos, [self.prompts.targets[i] for i in numbers])
                )
            kept += zip(numbers[numbers < self.previews].tolist(), videos.frames)
        multihost.stage(f"evaluation after epoch {epoch}: scores")
        scores = gather_scores(pending, total)
        shown = dict(video for part in multihost.gather(kept) for video in part)
        rewards = scores.values
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
            "failed_scores": scores.failures,
            **scores.counts(),
            "rewards": [float(r) for r in rewards],
            "prompts": list(self.prompts.prompts),
            "texts": scores.texts,
            "seconds": time.monotonic() - start,
        }
        if scores.parts:
            record["measures"] = base_statistics(scores.parts)
        if self.unguided:
            alone = dataclasses.replace(self, steps=self.unguided, unguided=(), previews=0)
            record["unguided"] = alone(arrays, epoch, progress).record
            del record["unguided"]["prompts"], record["unguided"]["epoch"]
        return Evaluation(
            record,
            np.stack([shown[number] for number in sorted(shown)]) if shown else None,
            scores.why(),
        )
