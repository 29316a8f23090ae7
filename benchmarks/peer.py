"""Measures the PyTorch peer: Diffusers' Wan transformer and VAE with PEFT LoRA.

    python -m benchmarks.peer --task=steps --mode=autocast --size=1.3b --json FILE
    python -m benchmarks.peer --task=decode --mode=bf16 --height 480 --width 832 --frames 81
    python -m benchmarks.peer --task=epoch --mode=autocast --guidance 4.5 --kl 0.004

The peer does what Flow-GRPO's Wan script does, in one of four modes:

    autocast       as the script: weights in fp32 under bf16 autocast
    bf16           weights and adapters in bf16, except what Diffusers keeps in fp32; no autocast
    bf16-compile   the same, with every block compiled by `torch.compile`
    fp32           no autocast, for tests against our side

All modes have LoRA of rank 32 on to_q, to_k, to_v and to_out.0, gradient checkpointing, two forward
passes for guidance, the reference by disabling the adapters, a backward pass for every SDE step,
gradient clipping and AdamW. Weights are random and drawn on the device.

Tasks:

    steps     a rollout step (forward pass, SDE step, log-prob), and an update over two trained
              steps, divided by two
    decode    latents to uint8 frames on the host; VAE in fp32, or in bf16 with cuDNN's search for
              the fastest convolutions
    epoch     sampling, decoding in fp32, scoring, advantages, update
    parts     what `benchmarks.parts` measures of ours

As in the script, one of 8 threads scores every fourth frame of a batch while the next batch is
sampled, and the update waits for the scores. Text encoding, the script's moving average and its
logging are left out. Times are medians after a warm-up; an epoch runs once, after a short one.
"""

import functools
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from absl import app, flags
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from benchmarks import workload
from benchmarks.peer_policy import (
    Policy,
    Text,
    Transition,
    drawn_as,
    make_transformer,
    weight_dtype,
)
from benchmarks.workload import Record, Stage
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.models.config import TransformerConfig

MODES = ("autocast", "bf16", "bf16-compile", "fp32")
ADVANTAGE_CLIP = 5.0


# ---- measuring -----------------------------------------------------------------------------------
def wait(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function, repeats: int, device: str) -> float:
    """Return the median seconds of a call until the device is done, after one warm-up call."""
    seconds = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def peak_bytes(device: str) -> int | None:
    """Return the peak memory of PyTorch's allocator so far, or None on the CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def random_text(config: TransformerConfig, batch: int, device: str) -> Text:
    """Return normal numbers in the prompts' rows and zeros in the padding.

    The negative prompt is repeated for the batch.
    """
    rows = torch.zeros(batch + 1, workload.TEXT_ROWS, config.text_dim, device=device)
    rows[:, : workload.TEXT] = torch.randn(batch + 1, workload.TEXT, config.text_dim, device=device)
    return Text(rows[:batch], rows[batch:].repeat(batch, 1, 1))


def latents(settings, device: str) -> torch.Tensor:
    """Return noise [B, C, F, H, W] for the videos that the flags describe."""
    frames, height, width, channels = workload.shape_of_latents(settings)
    return torch.randn(settings.batch, channels, frames, height, width, device=device)


def make_policy(settings, config: TransformerConfig, device: str, steps: int) -> Policy:
    """Return a policy with random weights in the mode of the flags."""
    transformer = make_transformer(config, weight_dtype(settings.mode), device)
    if settings.attention:
        transformer.set_attention_backend(settings.attention)
    return Policy(
        transformer,
        settings.mode,
        flow_sigmas(steps, workload.SHIFT),
        settings.guidance,
        settings.compiler,
    )


def measure_steps(settings, device: str) -> tuple[dict[str, Stage], tuple[float, float]]:
    """Return the stages of a rollout step and of a trained step, and the first update's ratios."""
    config = workload.transformer_config(settings.size)
    policy = make_policy(settings, config, device, workload.STEPS)
    text, x = random_text(config, settings.batch, device), latents(settings, device)
    flops = workload.batch_flops(
        config, workload.shape_of_latents(settings), settings.batch, settings.guidance
    )
    policy.model.eval()
    stages = {
        "rollout": Stage.of(
            timed(lambda: policy.sample(x, 3, text), settings.repeats, device),
            peak_bytes(device),
            flops,
        )
    }
    print(f"rollout step: {stages['rollout']}", flush=True)
    transitions = [policy.sample(x, i, text) for i in workload.TRAINED]
    batches = [(transitions, text, torch.randn(settings.batch, device=device))]
    ratios = []
    seconds = timed(
        lambda: ratios.append(policy.update(batches, settings.kl)), settings.repeats, device
    )
    stages["update"] = Stage.of(seconds / len(transitions), peak_bytes(device), 3 * flops)
    print(f"update of 1 x {len(transitions)} steps, each: {stages['update']}", flush=True)
    return stages, (float(ratios[0].min()), float(ratios[0].max()))


def measure_parts(settings, device: str) -> tuple[dict[str, Stage], tuple[float, float]]:
    """Return the stages of `benchmarks.parts`, and the first update's ratios. The VAE is in fp32."""
    config, repeats = workload.transformer_config(settings.size), settings.repeats
    policy = make_policy(settings, config, device, workload.STEPS)
    text, x = random_text(config, settings.batch, device), latents(settings, device)
    flops = workload.batch_flops(config, workload.shape_of_latents(settings), settings.batch, 1)
    stages = {}

    def show(name: str, function, work: float, steps: int = 1) -> None:
        stages[name] = Stage.of(timed(function, repeats, device) / steps, peak_bytes(device), work)
        print(f"{name}: {stages[name]}", flush=True)

    # Rollout steps
    policy.model.eval()
    for name, guidance, passes in (("rollout", 1.0, 1), ("guided rollout", settings.guidance, 2)):
        policy.guidance = guidance
        show(name, lambda: policy.sample(x, 3, text), passes * flops)
    # Updates: Flow-GRPO's with guidance, DiffusionNFT's without
    transitions = [policy.sample(x, i, text) for i in workload.TRAINED]
    batches = [(transitions, text, torch.randn(settings.batch, device=device))]
    ratios, count = [], len(transitions)
    show(
        "grpo update",
        lambda: ratios.append(policy.update(batches, settings.kl)),
        6 * flops,
        count,
    )
    policy.guidance = 1.0
    policy.keep_behaviour()
    weight = torch.rand(settings.batch, device=device)
    rows = [(x, i, text, weight) for i in workload.TRAINED]
    show("nft update", lambda: policy.update_nft(rows), 3 * flops, count)
    # Decoding
    torch.backends.cudnn.benchmark = settings.mode != "autocast"
    decode = make_decoder(torch.float32, device, **vae_settings(settings.size))
    stages["decode"] = Stage.of(timed(lambda: decode(x), repeats, device), peak_bytes(device))
    print(f"decode: {stages['decode']}", flush=True)
    return stages, (float(ratios[0].min()), float(ratios[0].max()))


# ---- decoding ------------------------------------------------------------------------------------
def make_decoder(dtype: torch.dtype, device: str, **settings):
    """Return `decoder_of` a VAE with random weights. settings: those of the VAE."""
    with drawn_as(dtype, device):
        return decoder_of(AutoencoderKLWan(**settings))


def decoder_of(vae: AutoencoderKLWan):
    """Return a function from latents to uint8 frames on the host.

    It maps fp32 [B, C, F, H, W] to uint8 [B, T, H, W, 3].
    """
    vae, device, dtype = vae.eval().requires_grad_(False), vae.device, vae.dtype
    mean, std = (
        torch.tensor(vae.config[name], device=device).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )

    @torch.no_grad()
    def decode(x) -> np.ndarray:
        video = vae.decode((x * std + mean).to(dtype), return_dict=False)[0].float()
        video = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return video.permute(0, 2, 3, 4, 1).cpu().numpy()

    return decode


def measure_decode(settings, device: str) -> dict[str, Stage]:
    """Return the stage of decoding."""
    dtype = weight_dtype(settings.mode)
    torch.backends.cudnn.benchmark = dtype == torch.bfloat16
    decode = make_decoder(dtype, device, **vae_settings(settings.size))
    x = latents(settings, device)
    stage = Stage.of(timed(lambda: decode(x), settings.repeats, device), peak_bytes(device))
    print(f"decode: {stage}", flush=True)
    return {"decode": stage}


def vae_settings(size: str) -> dict:
    """Return the settings of the VAE that goes with a size of the transformer."""
    base = {"tiny": 8, "small": 24}
    return {"base_dim": base[size], "num_res_blocks": 1} if size in base else {}


# ---- the epoch -----------------------------------------------------------------------------------
class Scorer:
    """Threads that score, each with its own OCR engine; a batch is the task of one thread."""

    def __init__(self, threads: int):
        from rewards.ocr.rules import OCRReward

        self.make = functools.partial(OCRReward, rule="flow_grpo_video")
        self.local, self.threads = threading.local(), ThreadPoolExecutor(threads)

    def score(self, videos: np.ndarray, targets) -> list[float]:
        """Return the scores of videos [B, T, H, W, 3] in the calling thread."""
        if not hasattr(self.local, "reward"):
            self.local.reward = self.make()
        return [
            self.local.reward.score(video, target).value for video, target in zip(videos, targets)
        ]

    def submit(self, videos: np.ndarray, targets):
        """Return the future of the videos' scores."""
        return self.threads.submit(self.score, videos, targets)


def measure_epoch(settings, device: str) -> dict[str, Stage]:
    """Return the stages of one epoch, which scores drawn signs instead of the decoded videos."""
    config = workload.transformer_config(settings.size)
    policy, scorer = make_policy(settings, config, device, settings.steps), Scorer(settings.readers)
    decode = make_decoder(torch.float32, device, **vae_settings(settings.size))
    targets = [
        target
        for _, target in workload.prompts(settings.groups)
        for _ in range(settings.group_size)
    ]
    rows = workload.epoch_rows(
        settings.groups, settings.group_size, settings.batch, settings.updates
    )
    pictures = [
        workload.signs([targets[i] for i in r], settings.frames, settings.height, settings.width, b)
        for b, r in enumerate(rows)
    ]
    texts = [random_text(config, settings.batch, device) for _ in rows]

    def sample(text, steps: int) -> list[Transition]:
        policy.model.eval()
        transitions = [policy.sample(latents(settings, device), 0, text)]
        for i in range(1, steps):
            transitions.append(policy.sample(transitions[-1].x_next, i, text))
        return transitions

    # Warm-up of every stage; each thread builds its OCR engine
    warm_up = sample(texts[0], 2)
    decode(warm_up[-1].x_next)
    list(
        scorer.threads.map(
            lambda _: (scorer.score(pictures[0][:1], targets[:1]), time.sleep(0.5)),
            range(settings.readers),
        )
    )
    policy.update([(warm_up, texts[0], torch.randn(settings.batch, device=device))], settings.kl)
    wait(device)

    # Rollout; scores are computed while the next batch is sampled
    clock = Clock(device)
    batches, pending = [], []
    for text, r, picture in zip(texts, rows, pictures):
        batches.append(sample(text, settings.steps))
        clock("sample")
        decode(batches[-1][-1].x_next)
        clock("decode")
        pending.append(scorer.submit(picture, [targets[i] for i in r]))
    # Advantages and update
    rewards = np.concatenate([scores.result() for scores in pending]).reshape(
        settings.groups, settings.group_size
    )
    clock("score wait")
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)
    advantages = torch.tensor(
        advantages.clip(-ADVANTAGE_CLIP, ADVANTAGE_CLIP), dtype=torch.float32, device=device
    )
    work = [
        (transitions[: settings.trained], text, advantages.flatten()[r.tolist()])
        for transitions, text, r in zip(batches, texts, rows)
    ]
    size = len(work) // settings.updates
    for first in range(0, len(work), size):
        policy.update(work[first : first + size], settings.kl)
    clock("update")
    return clock.stages(len(targets), peak_bytes(device))


class Clock:
    """Adds up the seconds of stages. It is called after each stage with its name."""

    def __init__(self, device: str):
        self.device, self.last = device, time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str) -> None:
        wait(self.device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now

    def stages(self, videos: int, peak: int | None) -> dict[str, Stage]:
        """Return the time of every stage and of the whole epoch, divided by the videos."""
        total = {"epoch": sum(self.seconds.values())} | self.seconds
        stages = {name: Stage.of(seconds / videos, peak) for name, seconds in total.items()}
        for name, stage in stages.items():
            print(f"{name}, per video: {stage}", flush=True)
        return stages


def measure(settings) -> Record:
    """Return the figures of one task. settings: the flags."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True  # as the script
    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(
        f"peer {settings.task}: {settings.size}, {settings.mode}, {workload.describe_shape(settings)}, "
        f"guidance {settings.guidance}, {kind}, torch {torch.__version__}",
        flush=True,
    )
    ratio = None
    if settings.task in ("steps", "parts"):
        measured = measure_steps if settings.task == "steps" else measure_parts
        stages, ratio = measured(settings, device)
        print(f"ratio of the first update: {ratio[0]:.7f} to {ratio[1]:.7f}")
    else:
        stages = {"decode": measure_decode, "epoch": measure_epoch}[settings.task](settings, device)
    return Record(f"peer {settings.mode}", stages, kind, f"torch {torch.__version__}", ratio)


def main(_):
    measure(flags.FLAGS).write(flags.FLAGS.json)


if __name__ == "__main__":
    workload.define_flags(guidance=1.0, kl=0.0)
    workload.define_epoch_flags()
    flags.DEFINE_enum("task", "steps", ["steps", "decode", "epoch", "parts"], "stages to measure")
    flags.DEFINE_enum("mode", "autocast", MODES, "data types and compilation")
    flags.DEFINE_integer("readers", 8, "threads that score; Flow-GRPO's script has 8")
    flags.DEFINE_string(
        "attention",
        None,
        "Diffusers' attention backend, e.g. _native_cudnn; None: PyTorch's choice",
    )
    flags.DEFINE_string("compiler", "inductor", "backend of torch.compile")
    app.run(main)
