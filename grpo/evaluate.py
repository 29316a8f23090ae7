"""Held-out evaluation: the deployment sampler, fixed prompts and seeds, OCR rewards with a confidence interval."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from grpo.prompts import PromptSet
from grpo.rollout import initial_noise
from grpo.statistics import bootstrap_interval
from rewards.workers import RewardPool
from wan_jax import mesh as mesh_lib
from wan_jax.experts import Segment
from wan_jax.pipeline import TextTable, sample_ode


@dataclasses.dataclass(frozen=True)
class Evaluation:
    record: dict  # what evals.jsonl holds
    videos: np.ndarray  # uint8 [n, T, H, W, 3], the first samples


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Everything that stays fixed between the evaluations of a run; call it with the weights to judge."""

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

    def __call__(self, arrays: Callable, epoch: int, progress=lambda x, **_: x) -> Evaluation:
        """arrays(expert): what its step takes first. One sample a prompt, its noise from (seed, number)."""
        start, pending, kept = time.time(), [], []
        total, key = len(self.prompts), jax.random.key(self.seed)
        replicated, sharded = mesh_lib.replicated(self.mesh), mesh_lib.batch_sharding(self.mesh)
        firsts = range(0, total, self.batch_size)
        rows = [np.arange(first, first + self.batch_size) % total for first in firsts]  # the last wraps: one shape
        batches = [(initial_noise(key, jax.device_put(jnp.asarray(index, jnp.int32), sharded), self.shape),
                    self.table.batch(index, sharded, replicated)) for index in rows]
        latents = sample_ode(self.steps, arrays, self.parts, self.solver, batches)
        for first, index, x in progress(zip(firsts, rows, latents), total=len(rows)):
            real = min(self.batch_size, total - first)
            videos = np.asarray(self.decode(self.vae_state, x))
            pending.append(self.pool.submit(videos[:real], [self.prompts.targets[i] for i in index[:real]]))
            if first < self.previews:
                kept.append(videos[: min(real, self.previews - first)])
        scores = [p.result() for p in pending]
        rewards = np.concatenate([s.values for s in scores])
        mean, low, high = bootstrap_interval(rewards, seed=self.seed)
        record = {"epoch": epoch, "reward": mean, "low": low, "high": high, "num": int(np.isfinite(rewards).sum()),
                  "failed_scores": sum(s.failures for s in scores), "rewards": [float(r) for r in rewards],
                  "prompts": list(self.prompts.prompts), "texts": [t for s in scores for t in s.texts],
                  "seconds": time.time() - start}
        return Evaluation(record, np.concatenate(kept))
