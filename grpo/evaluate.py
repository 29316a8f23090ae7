"""Held-out evaluation: the deployment sampler, fixed prompts and seeds, OCR rewards with a confidence interval."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from grpo.prompts import PromptSet
from grpo.rollout import initial_noise
from grpo.statistics import bootstrap_interval
from rewards.workers import RewardPool
from wan_jax import mesh as mesh_lib
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
    step: object  # `pipeline.make_ode_step`
    decode: object  # `pipeline.make_decoder`
    vae_state: object
    pool: RewardPool
    mesh: jax.sharding.Mesh
    shape: tuple[int, ...]  # latents of one video
    batch_size: int
    seed: int
    previews: int

    def __call__(self, arrays: tuple, epoch: int, progress=lambda x: x) -> Evaluation:
        """arrays: what `step` takes before the solver's state. One sample a prompt, its noise from (seed, number)."""
        start, pending, kept = time.time(), [], []
        total, key = len(self.prompts), jax.random.key(self.seed)
        replicated, sharded = mesh_lib.replicated(self.mesh), mesh_lib.batch_sharding(self.mesh)
        for first in progress(range(0, total, self.batch_size)):
            index = np.arange(first, first + self.batch_size) % total  # the last batch wraps: one compiled shape
            real = min(self.batch_size, total - first)
            noise = initial_noise(key, jax.device_put(jnp.asarray(index, jnp.int32), sharded), self.shape)
            text = self.table.batch(index, sharded, replicated)
            videos = np.asarray(self.decode(self.vae_state, sample_ode(self.step, arrays, self.solver, noise, text)))
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
