"""Trains a recipe of Flow-GRPO in PyTorch, as Flow-GRPO's own loop does, for `benchmarks.race`.

    python -m benchmarks.peer_training --config=configs/tiny_grpo.py --config.run_dir=OUT \\
        --model=assets/tiny-wan --precision=autocast

The model is read from Diffusers' layout; transformer and VAE are Diffusers', the adapters PEFT's. An
epoch samples batch after batch, one denoising step after the other, keeps latents and log-probs of the
stochastic steps, decodes, and scores a batch while the next one is sampled. Then it takes a forward
and a backward pass for every batch and stochastic step, adds up the gradients, clips them, and steps
AdamW and the moving average. Precisions:

    autocast   weights in fp32 under bf16 autocast, as the script's `mixed_precision`
    fp32       without autocast; products in TF32, as the script allows

Prompts, stochastic steps and the noise of evaluations are drawn as `grpo.train` draws them, on the
CPU, and the same processes score. Where the script is slower or wrong, the loop is not: prompts are
encoded once, the average moves in every update, and guidance takes one forward pass unless
`--nojoined`. Activations are kept where the recipe has model.remat=none.

OUT/start.json has the seconds of the warm-up, which the epochs leave out; metrics.jsonl and evals.jsonl
have the keys of `grpo.train` that the race reads.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time

import jax
import numpy as np
import torch
from absl import flags
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from ml_collections import config_flags
from transformers import UMT5EncoderModel

from benchmarks import workload
from benchmarks.peer import Clock, decoder_of, wait
from benchmarks.peer_policy import Average, Options, Policy, Text, Transition
from grpo.data.prompts import PromptSet, epoch_prompts
from grpo.learning.method import kl_weight
from grpo.learning.sde_windows import sde_window
from grpo.methods.grpo import GRPO
from grpo.records import json_lines, run_log
from grpo.records.clock import timestamp
from grpo.records.statistics import bootstrap_interval
from grpo.rollout import initial_noise
from grpo.scoring.reward_pool import open_pool
from grpo.scoring.scored_prompts import load_scored_prompts
from grpo.settings import parse
from grpo.settings.budget import Spent
from grpo.settings.reference import FLAG_HELP
from grpo.settings.schema import Recipe
from wan_jax.command_line import cli
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.errors import UserError
from wan_jax.models.tokenizer import Tokenizer

PRECISIONS = ("autocast", "fp32")  # modes of `peer_policy`
START = "start.json"
# what the loop does: any other value of these settings is refused
REQUIRED = {
    "train.method": "grpo",
    "train.objective": "clip",
    "train.advantage_std": "group",
    "train.kl_as": "loss",
    "train.credit": "none",
    "train.zero_advantages": "keep",
    "train.warmup_updates": 0,
    "sample.ode_solver": "euler",
    "sample.sde_window": "any",
    "sample.untrained_noise": False,
    "sample.shared_noise": False,
    "eval.solver": "euler",
}
ENCODER_BATCH = 64


def check(recipe: Recipe) -> None:
    """Raise `UserError` where a setting asks for what the loop does not do."""
    for key, value in REQUIRED.items():
        section, name = key.split(".")
        found = getattr(getattr(recipe, section), name)
        if found != value:
            raise UserError(f"config.{key}={found} is not in the PyTorch loop; it has {value}")
    if recipe.sample.sde not in ("flow_grpo_wan", "flow_sde"):
        raise UserError(
            f"config.sample.sde={recipe.sample.sde} is not in the PyTorch loop; it has "
            "flow_grpo_wan and flow_sde"
        )


# ---- the recipe in PyTorch -----------------------------------------------------------------------
def flow_sde(sigmas, level: float) -> tuple[float, ...]:
    """Return g = level sqrt(s / (1 - s)) of every step, where the first one's 1 - s is that of the
    second, and g sqrt(-dt) at most 1. sigmas: [T + 1].
    """
    s = np.asarray(sigmas, np.float64)
    g = level * np.sqrt(s[:-1] / (1 - np.append(s[1], s[1:-1])))
    return tuple(np.minimum(g, 1 / np.sqrt(s[:-1] - s[1:])).tolist())


def options_of(recipe: Recipe, joined: bool) -> Options:
    """Return the settings of the policy and its optimiser."""
    train, sample = recipe.train, recipe.sample
    sigmas = flow_sigmas(sample.steps, sample.shift, sample.schedule).sigmas
    level = 0.7 if sample.noise_level is None else sample.noise_level
    return Options(
        rank=recipe.lora.rank,
        alpha=recipe.lora.alpha,
        targets=recipe.lora.targets,
        learning_rate=train.learning_rate,
        betas=(train.adam_b1, train.adam_b2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        clip=(train.clip_low, train.clip_high),
        max_norm=train.max_grad_norm,
        noise=flow_sde(sigmas, level) if sample.sde == "flow_sde" else None,
        checkpointing=recipe.model.remat != "none",
        joined=joined,
    )


def load(kind, folder: pathlib.Path, device: str):
    """Return a part of the pipeline of a class, in fp32 on the device."""
    return kind.from_pretrained(folder).eval().float().to(device)


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Embeddings of prompts [P, R, D] and of the negative prompt [R, D], on the device."""

    prompts: torch.Tensor
    negative: torch.Tensor

    @classmethod
    @torch.no_grad()
    def encode(cls, folder: pathlib.Path, prompts, negative: str, device: str) -> "Embeddings":
        """Encode by the model's tokenizer and text encoder in fp32; rows after a prompt are 0."""
        tokenizer = Tokenizer.load(folder / "tokenizer")
        texts = [*prompts, negative]
        rows = min(max(tokenizer.lengths(texts)), workload.TEXT_ROWS)
        encoder = load(UMT5EncoderModel, folder / "text_encoder", device)
        parts = []
        for first in range(0, len(texts), ENCODER_BATCH):
            ids, mask = (
                torch.from_numpy(array).long().to(device)
                for array in tokenizer(texts[first : first + ENCODER_BATCH], rows)
            )
            hidden = encoder(ids, attention_mask=mask).last_hidden_state
            parts.append(hidden * mask[..., None])
        table = torch.cat(parts)
        return cls(table[:-1], table[-1])

    def text(self, indices) -> Text:
        """Return the embeddings of prompts [B] with all the rows that Wan attends to."""
        after = (0, 0, 0, workload.TEXT_ROWS - self.prompts.shape[1])
        pad = functools.partial(torch.nn.functional.pad, pad=after)
        negative = pad(self.negative)[None].repeat(len(indices), 1, 1)
        return Text(pad(self.prompts[list(indices)]), negative)


def sample(policy: Policy, x, text: Text, window) -> tuple[torch.Tensor, list[Transition]]:
    """Return the final latents of a batch from the noise x, and its stochastic steps. window: their
    indices.
    """
    transitions = []
    for i in range(len(policy.timesteps)):
        if i in window:
            transitions.append(policy.sample(x, i, text))
            x = transitions[-1].x_next
        else:
            x = policy.ode(x, i, text)
    return x, transitions


def group_advantages(rewards: np.ndarray, clip: float | None) -> np.ndarray:
    """Return (r - mean) / (std + 1e-4) within every group, clipped, fp32. rewards: [groups, K]."""
    centred = rewards - rewards.mean(1, keepdims=True)
    advantages = centred / (rewards.std(1, keepdims=True) + 1e-4)
    bound = math.inf if clip is None else clip
    return advantages.clip(-bound, bound).astype(np.float32)


Batch = tuple[list[Transition], Text, torch.Tensor]  # stochastic steps, text, advantages [B]


# ---- the loop ------------------------------------------------------------------------------------
class Training:
    """A run in PyTorch: the policy, its average, prompts and scoring processes."""

    def __init__(self, recipe: Recipe, folder: pathlib.Path, mode: str, joined: bool, device: str):
        self.recipe, self.device = recipe, device
        settings, sampling = parse.settings_of(recipe), recipe.sample
        self.weights, self.kl = settings.weights, kl_weight(GRPO, recipe)
        self.prompts, self.heldout = (
            load_scored_prompts(path, recipe.reward, settings.weights, limit)
            for path, limit in (
                (recipe.prompts.train, None),
                (recipe.prompts.heldout, recipe.eval.num_prompts),
            )
        )
        # Embeddings of both sets, the held-out ones last
        self.table = Embeddings.encode(
            folder,
            (*self.prompts.prompts, *self.heldout.prompts),
            recipe.prompts.negative,
            device,
        )
        torch.manual_seed(recipe.seed)  # of the adapters and of the rollouts
        transformer = load(WanTransformer3DModel, folder / "transformer", device)
        schedule = flow_sigmas(sampling.steps, sampling.shift, sampling.schedule)
        self.policy = Policy(
            transformer, mode, schedule, sampling.guidance, options=options_of(recipe, joined)
        )
        self.average = Average(self.policy, recipe.train.ema_decay)
        self.decode = decoder_of(load(AutoencoderKLWan, folder / "vae", device))
        frames, height, width, channels = workload.latent_shape(
            sampling.frames, sampling.height, sampling.width
        )
        self.shape = channels, frames, height, width

    def noise(self, count: int) -> torch.Tensor:
        """Return the noise from which a batch starts."""
        return torch.randn(count, *self.shape, device=self.device)

    def submit(self, pool, x, prompts: PromptSet, indices):
        """Decode latents, and start to score them."""
        return pool.submit(self.decode(x), [prompts.targets[i] for i in indices])

    def warm_up(self) -> float:
        """Run every stage once without a change of the weights. Returns its seconds."""
        began, size = time.perf_counter(), self.recipe.sample.batch_size
        text, x = self.table.text([0] * size), self.noise(size)
        transition = self.policy.sample(x, 0, text)
        self.decode(self.policy.ode(x, 1, text))
        self.policy.accumulate([([transition], text, torch.zeros(size, device=self.device))], 0.0)
        self.policy.optimiser.zero_grad()
        wait(self.device)
        return time.perf_counter() - began

    def rollout(self, number: int, pool, clock: Clock) -> tuple[list[Batch], np.ndarray]:
        """Return the batches of an epoch, counted from 1, and the rewards [groups, group_size]. A
        batch is scored while the next one is sampled.
        """
        recipe, sampling = self.recipe, self.recipe.sample
        drawn = sde_window(recipe.seed, number, sampling.sde_steps, *sampling.sde_range)
        window, count = set(drawn.tolist()), len(self.prompts)
        chosen = epoch_prompts(recipe.seed, number - 1, count, sampling.groups)
        prompt_of = np.repeat(chosen, sampling.group_size)
        self.policy.model.eval()
        work, pending = [], []
        for rows in np.split(prompt_of, len(prompt_of) // sampling.batch_size):
            text = self.table.text(rows)
            x, transitions = sample(self.policy, self.noise(len(rows)), text, window)
            clock("sample")
            pending.append(self.submit(pool, x, self.prompts, rows))
            work.append((transitions, text))
            clock("decode")
        scored = np.concatenate([scores.result().values for scores in pending])
        clock("score_wait")
        # a video without a score counts as 0, as in the script
        rewards = np.nan_to_num(scored).reshape(sampling.groups, sampling.group_size)
        advantages = group_advantages(rewards, recipe.train.advantage_clip).flatten()
        parts = torch.from_numpy(advantages).to(self.device).split(sampling.batch_size)
        return [(*batch, part) for batch, part in zip(work, parts)], rewards

    def update(self, batches: list[Batch]) -> torch.Tensor:
        """Take the optimiser steps of an epoch. Returns the ratios of the first one."""
        size, ratios = len(batches) // self.recipe.train.updates_per_epoch, []
        for first in range(0, len(batches), size):
            ratios.append(self.policy.update(batches[first : first + size], self.kl))
            self.average.update()
        return ratios[0]

    def epoch(self, number: int, pool) -> dict:
        """Run an epoch, counted from 1, and return its record."""
        clock = Clock(self.device)
        batches, rewards = self.rollout(number, pool, clock)
        ratios = self.update(batches)
        clock("update")
        return {
            "epoch": number,
            "time": timestamp(),
            "reward_mean": float(rewards.mean()),
            "ratio_max_error": float((ratios - 1).abs().max()),
            "evaluations": rewards.size * self.recipe.sample.steps,
            "seconds": clock.seconds | {"total": sum(clock.seconds.values())},
        }

    def evaluate(self, epoch: int, pool) -> dict:
        """Return the record of an evaluation of the average: Euler's steps, one video a held-out
        prompt, from the noise of `grpo.train`.
        """
        began, recipe, first = time.monotonic(), self.recipe, len(self.prompts)
        channels, *rest = self.shape
        key, pending = jax.random.key(recipe.eval.seed), []
        numbers = np.arange(len(self.heldout))
        policy, own = self.policy, self.policy.guidance
        schedule = flow_sigmas(recipe.eval.steps, recipe.sample.shift, recipe.sample.schedule)
        trained_on = policy.sigmas, policy.timesteps
        with self.average.in_use():
            policy.model.eval()
            policy.guidance = own if recipe.eval.guidance is None else recipe.eval.guidance
            policy.sigmas, policy.timesteps = (
                schedule.sigmas.tolist(),
                schedule.timesteps.tolist(),
            )
            for rows in np.array_split(numbers, -(-len(numbers) // recipe.sample.batch_size)):
                noise = np.moveaxis(np.asarray(initial_noise(key, rows, (*rest, channels))), -1, 1)
                x = torch.from_numpy(noise.copy()).to(self.device)
                x, _ = sample(policy, x, self.table.text(rows + first), ())
                pending.append(self.submit(pool, x, self.heldout, rows))
            policy.guidance, (policy.sigmas, policy.timesteps) = own, trained_on
        scored = [scores.result() for scores in pending]
        rewards = np.concatenate([scores.values for scores in scored])
        mean, low, high = bootstrap_interval(rewards, seed=recipe.eval.seed)
        return {
            "epoch": epoch,
            "reward": mean,
            "low": low,
            "high": high,
            "num": int(np.isfinite(rewards).sum()),
            "rewards": rewards.tolist(),
            "prompts": list(self.heldout.prompts),
            "texts": [text for scores in scored for text in scores.texts],
            "seconds": time.monotonic() - began,
            "time": timestamp(),
        }


def train(recipe: Recipe, folder: pathlib.Path, mode: str, joined: bool, device: str) -> None:
    """Train by a recipe until its epochs or its budget are over, and write the records into its
    run_dir.
    """
    out = pathlib.Path(recipe.run_dir)
    out.mkdir(parents=True, exist_ok=True)

    def add(name: str, record: dict) -> None:
        with (out / name).open("a") as file:
            file.write(json.dumps(json_lines.plain(record)) + "\n")

    run, spent = Training(recipe, folder, mode, joined, device), Spent()
    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    start = {"compile": run.warm_up(), "device": kind, "software": f"torch {torch.__version__}"}
    (out / START).write_text(json.dumps(start) + "\n")
    with open_pool(recipe.reward, run.weights) as pool:
        add(run_log.EVALUATIONS, run.evaluate(0, pool))
        for number in range(1, recipe.epochs + 1):
            record = run.epoch(number, pool)
            spent += Spent(record["evaluations"], record["seconds"]["total"])
            add(run_log.METRICS, record | {"spent_seconds": spent.seconds})
            print(f"epoch {number}: reward {record['reward_mean']:.3f}, {record['seconds']}")
            ending = cli.asked_to_end.is_set()
            last = ending or number == recipe.epochs or recipe.budget.reached(spent)
            if not ending and (last or number % recipe.eval.every == 0):
                evaluated = run.evaluate(number, pool)
                add(run_log.EVALUATIONS, evaluated)
                print(f"epoch {number}: held-out {evaluated['reward']:.3f}", flush=True)
            if last:
                break


def main(_):
    FLAGS = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # draws alone
    torch.backends.cuda.matmul.allow_tf32 = True  # as the script
    recipe = parse.recipe_from_config(FLAGS.config)
    check(recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(recipe, pathlib.Path(FLAGS.model), FLAGS.precision, FLAGS.joined, device)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, FLAG_HELP, lock_config=True)
    flags.DEFINE_string("model", "assets/tiny-wan", "folder in Diffusers' layout")
    flags.DEFINE_enum("precision", "autocast", PRECISIONS, "data types")
    flags.DEFINE_bool("joined", True, "one forward pass for guidance, not two")
    flags.mark_flag_as_required("config")
    cli.run(main)
