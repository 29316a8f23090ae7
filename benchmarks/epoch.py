"""Measures the stages of one epoch of training with random weights, as `grpo.train` runs it.

    python -m benchmarks.epoch --size 1.3b --groups 3 --group_size 12 --batch 9 --workers 14
    python -m benchmarks.epoch --size tiny --json FILE

Counted: sampling with guidance over all steps, `--trained` of them stochastic; the VAE's decoding
to frames on the host; OCR in worker processes while the next batch is sampled; advantages; the
update over all stochastic steps with the KL to the reference, clipping, AdamW and the moving
average. Not counted: encoding the prompts, logging, checkpoints. Drawn signs of the videos' size
are scored (`workload.signs`), since random weights draw no text. The figures are those of the last
epoch; earlier epochs compile. `benchmarks.peer --task=epoch` measures the same in PyTorch.
"""

import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import workload
from benchmarks.decode import random_vae
from benchmarks.full_size import RandomPolicy, peak_bytes, software
from benchmarks.workload import Record, Stage
from grpo.learning.optimiser import OptimiserConfig, init_state, make_update
from grpo.learning.policy_gradient import make_gradient, stack_batches
from grpo.learning.policy_loss import LossConfig
from grpo.learning.step_table import StepTable
from grpo.rollout import initial_noise, make_step, rollout_batches
from grpo.scoring.advantages import group_advantages
from grpo.scoring.scores import gather_scores, submit
from rewards.ocr.rules import OCRReward
from rewards.pool import RewardPool
from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.diffusion.sde import SDEConfig
from wan_jax.inference import pipeline
from wan_jax.models.transformer import REMAT_POLICIES


class Clock:
    """Adds up the seconds of stages. It is called after each stage with the arrays to wait for."""

    def __init__(self):
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, arrays=None) -> None:
        jax.block_until_ready(arrays)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now


class Epoch:
    """What an epoch needs, on the device. A call runs one epoch and returns its stages' seconds.

    As in training the host is one batch ahead of the device, so the decoding of a batch includes
    part of the sampling of the next one. `ratio` is (least, largest) ratio of the first update.
    """

    def __init__(self, settings, pool: RewardPool):
        self.settings = settings  # the flags
        self.pool = pool
        self.ratio = (math.nan, math.nan)
        self.policy = RandomPolicy.draw(settings.size, settings.dtype, settings.remat)
        table = StepTable.make(
            flow_sigmas(settings.steps, workload.SHIFT), SDEConfig("flow_grpo_wan")
        )
        optimiser = OptimiserConfig()
        self.step = make_step(self.policy.policy, table, settings.guidance)
        policy, loss = self.policy.policy, LossConfig(kl_beta=settings.kl)
        gradient = make_gradient(policy, table, settings.guidance, loss)
        self.update = make_update(gradient, policy, optimiser, self.policy.mesh)
        self.state = init_state(self.policy.trainable, optimiser)
        graph, self.vae = random_vae(settings.size, jnp.float32)
        self.decode = pipeline.make_decoder(graph)
        self.targets = [
            target
            for _, target in workload.prompts(settings.groups)
            for _ in range(settings.group_size)
        ]
        self.rows = workload.epoch_rows(
            settings.groups, settings.group_size, settings.batch, settings.updates
        )
        self.texts = [self.policy.random_text(settings.batch) for _ in self.rows]
        self.pictures = [
            workload.signs(
                [self.targets[i] for i in r], settings.frames, settings.height, settings.width, b
            )
            for b, r in enumerate(self.rows)
        ]
        self.shape = workload.latent_shape(settings.frames, settings.height, settings.width)

    def __call__(self, number: int) -> dict[str, float]:
        settings, key, clock = self.settings, jax.random.key(number), Clock()
        trajectories, pending = [], []
        samples = [self.policy.placed(jnp.asarray(rows, jnp.int32)) for rows in self.rows]
        noise = [initial_noise(key, numbers, self.shape) for numbers in samples]
        batches = rollout_batches(
            [self.step],
            lambda _: (self.state.trainable, self.policy.frozen),
            noise,
            self.texts,
            key=key,
            samples=samples,
            parts=[Segment(0, range(settings.steps))],
            windows=[np.arange(settings.trained)],
        )
        decoding = ((*batch, self.decode(self.vae, batch[2])) for batch in batches)
        for _, b, x, trajectory, video in pipeline.one_ahead(decoding):
            trajectories.append(trajectory)
            clock("sample", x)
            video()
            clock("decode")
            pending.append(
                submit(
                    self.pool,
                    self.rows[b],
                    pipeline.Videos(self.pictures[b], np.ones(settings.batch, bool)),
                    [self.targets[i] for i in self.rows[b]],
                )
            )
        scores = gather_scores(pending, len(self.targets))
        clock("score wait")
        groups = np.repeat(np.arange(settings.groups), settings.group_size)
        advantages = group_advantages(scores.values, groups, scores.valid, std="group", clip=5.0)
        size = len(self.rows) // settings.updates
        for first in range(0, len(self.rows), size):
            part = slice(first, first + size)
            batch = stack_batches(
                trajectories[part],
                advantages.reshape(-1, settings.batch)[part],
                scores.valid.reshape(-1, settings.batch)[part],
            )
            self.state, metrics, _ = self.update(self.state, self.policy.frozen, batch)
            if first == 0 and number == 0:
                averages = metrics.averages()
                self.ratio = averages["ratio_min"], averages["ratio_max"]
        clock("update", self.state.trainable)
        return clock.seconds


def measure(settings) -> Record:
    """Return the figures of the last epoch. settings: the flags."""
    with RewardPool(
        functools.partial(OCRReward, rule="flow_grpo_video"), workers=settings.workers
    ) as pool:
        epoch, kind = Epoch(settings, pool), jax.devices()[0].device_kind
        seconds: dict[str, float] = {}
        for number in range(settings.epochs):
            seconds = epoch(number)
            print(
                f"epoch {number + 1}: " + ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()),
                flush=True,
            )
    seconds = {"epoch": sum(seconds.values())} | seconds
    stages = {
        name: Stage.of(value / len(epoch.targets), peak_bytes()) for name, value in seconds.items()
    }
    for name, stage in stages.items():
        print(f"{name}, per video: {stage}")
    print(f"ratio of the first update: {epoch.ratio[0]:.7f} to {epoch.ratio[1]:.7f}")
    return Record("ours", stages, kind, software(), epoch.ratio)


def main(_):
    measure(flags.FLAGS).write(flags.FLAGS.json)


if __name__ == "__main__":
    workload.define_flags(guidance=4.5, kl=0.004)
    workload.define_epoch_flags()
    flags.DEFINE_string("dtype", "bfloat16", "data type of weights and matrix products")
    flags.DEFINE_enum(
        "remat",
        "save_matmuls",
        list(REMAT_POLICIES),
        "activations that the backward pass recomputes",
    )
    flags.DEFINE_integer("epochs", 2, "number of epochs; the last one is reported")
    flags.DEFINE_integer("workers", 14, "scoring processes")
    app.run(main)
