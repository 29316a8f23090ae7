"""The PyTorch peer: Diffusers' Wan transformer and VAE, PEFT LoRA, driven as Flow-GRPO's Wan script
drives them.

    python -m benchmarks.peer --task=steps --mode=autocast --size=1.3b [--height 512 ... as
    full_size] [--json FILE] python -m benchmarks.peer --task=decode --mode=autocast|bf16 --height
    480 --width 832 --frames 81 --batch 1 python -m benchmarks.peer --task=epoch --mode=autocast
    --guidance 4.5 --kl 0.004 [--groups 3 --group_size 12]

Modes: `autocast`, what that script does: weights in fp32 under bf16 autocast. `bf16`: weights and
adapters in bf16, but what Diffusers keeps in fp32, without autocast. `bf16-compile`: the same with
every block through `torch.compile`. `fp32`: without autocast, for checks against ours. All: LoRA
rank 32 on to_q, to_k, to_v, to_out.0, gradient checkpointing, two forward passes for guidance, the
reference by switching the adapters off, one SDE step trained at a time with a backward pass each,
gradient clipping, AdamW. Weights are random and drawn on the device.

steps: a rollout step (forward, SDE step, log-prob) and an update over two trained steps, divided by
two. decode: latents to uint8 frames on the host, VAE in fp32, or in bf16 with cuDNN's search for
the fastest convolutions. epoch: sample all steps, decode in fp32, score, advantages, update. As in
the script, a batch's scores are computed by one of 8 threads while the next batch samples, every
fourth frame, and awaited before the update. Text encoding is left out, and so are its moving
average and its logging. Medians after a warm-up; the epoch once, after a short one.
"""

import contextlib
import dataclasses
import functools
import math
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from absl import app, flags
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from peft import LoraConfig, get_peft_model

from benchmarks import workload
from benchmarks.workload import Record, Stage
from wan_jax.diffusion.schedule import Schedule, flow_sigmas
from wan_jax.models.config import TransformerConfig

MODES = ("autocast", "bf16", "bf16-compile", "fp32")
CLIP, ADVANTAGE_CLIP, MAX_NORM = 1e-3, 5.0, 1.0


@dataclasses.dataclass(frozen=True)
class Kept:
    """One stochastic step of a batch, as the rollout left it: fp32 [B, C, F, H, W] and [B]."""

    step: int
    x: torch.Tensor
    x_next: torch.Tensor
    log_prob: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Text:
    """[B, 512, text_dim], rows past the prompt zero."""

    embeddings: torch.Tensor
    negative: torch.Tensor


@contextlib.contextmanager
def drawn_as(dtype: torch.dtype, device: str):
    """Parameters made inside lie on the device in this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def weight_dtype(mode: str) -> torch.dtype:
    return torch.bfloat16 if mode.startswith("bf16") else torch.float32


def make_transformer(
    config: TransformerConfig, dtype: torch.dtype, device: str
) -> WanTransformer3DModel:
    """Random weights in the types that `from_pretrained(torch_dtype=dtype)` gives them."""
    with drawn_as(dtype, device):
        model = WanTransformer3DModel(**dataclasses.asdict(config))
    for name, parameter in model.named_parameters():
        if set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    return model


class Policy:
    """The transformer with adapters in one of the modes, and its steps through the schedule."""

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        mode: str,
        schedule: Schedule,
        guidance: float,
        compiler: str = "inductor",
    ):
        transformer.requires_grad_(False)
        self.model = get_peft_model(
            transformer,
            LoraConfig(
                r=workload.RANK,
                lora_alpha=workload.ALPHA,
                init_lora_weights="gaussian",
                target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            ),
            autocast_adapter_dtype=False,
        )
        transformer.enable_gradient_checkpointing()
        if mode == "bf16-compile":
            for block in transformer.blocks:
                block.compile(backend=compiler)
        self.mode, self.guidance, self.device = mode, guidance, transformer.device.type
        self.dtype = weight_dtype(mode)
        self.sigmas, self.timesteps = schedule.sigmas.tolist(), schedule.timesteps.tolist()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=1e-4)

    def velocity(self, x, i: int, text: Text):
        """fp32; with guidance v_u + guidance (v_c - v_u), a forward pass each."""

        def forward(embeddings):
            t = torch.full((len(x),), self.timesteps[i], device=x.device).long()
            return self.model(
                hidden_states=x.to(self.dtype),
                timestep=t,
                encoder_hidden_states=embeddings.to(self.dtype),
                return_dict=False,
            )[0].float()

        with torch.autocast(self.device, torch.bfloat16, enabled=self.mode == "autocast"):
            conditional = forward(text.embeddings)
            if self.guidance <= 1:
                return conditional
            unconditional = forward(text.negative)
        return unconditional + self.guidance * (conditional - unconditional)

    def gaussian(self, x, v, i: int):
        """Mean and deviation of step i, with Flow-GRPO's noise for Wan, g = sigma_1 sigma."""
        s, dt = self.sigmas[i], self.sigmas[i + 1] - self.sigmas[i]
        g = self.sigmas[1] * s
        return x + v * dt + g * g / (2 * s) * dt * (x + (1 - s) * v), g * math.sqrt(-dt)

    @torch.no_grad()
    def sample(self, x, i: int, text: Text) -> Kept:
        mean, std = self.gaussian(x, self.velocity(x, i, text), i)
        x_next = mean + std * torch.randn_like(x)
        return Kept(i, x, x_next, log_prob(x_next, mean, std))

    def loss(self, kept: Kept, text: Text, advantages, kl: float):
        """The clipped objective plus the KL to the reference, and the ratios [B]."""
        mean, std = self.gaussian(kept.x, self.velocity(kept.x, kept.step, text), kept.step)
        ratio = torch.exp(log_prob(kept.x_next, mean, std) - kept.log_prob)
        clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
        if kl > 0:
            with torch.no_grad(), self.model.disable_adapter():
                reference, _ = self.gaussian(
                    kept.x, self.velocity(kept.x, kept.step, text), kept.step
                )
            loss = loss + kl * ((mean - reference) ** 2).mean() / (2 * std**2)
        return loss, ratio.detach()

    def update(self, batches: list[tuple[list[Kept], Text, torch.Tensor]], kl: float):
        """One optimiser step over batches of (steps, text, advantages [B]); returns all ratios."""
        self.model.train()
        ratios, count = [], sum(len(steps) for steps, _, _ in batches)
        for steps, text, advantages in batches:
            for kept in steps:
                loss, ratio = self.loss(kept, text, advantages, kl)
                (loss / count).backward()
                ratios.append(ratio)
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return torch.cat(ratios)


def log_prob(x_next, mean, std: float):
    """[B], the mean over all other dimensions."""
    z = ((x_next - mean) / std).flatten(1)
    return -0.5 * (z * z).mean(1) - math.log(std) - 0.5 * math.log(2 * math.pi)


# ---- measuring -----------------------------------------------------------------------------------
def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function, repeats: int, device: str) -> float:
    """Median seconds of a call until the device is done, after one warm-up call."""
    seconds = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def peak_bytes(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def random_text(config: TransformerConfig, batch: int, device: str) -> Text:
    """Normal numbers in the prompts' rows, zeros in the padding; the negative prompt is repeated
    for the batch.
    """
    rows = torch.zeros(batch + 1, workload.TEXT_ROWS, config.text_dim, device=device)
    rows[:, : workload.TEXT] = torch.randn(batch + 1, workload.TEXT, config.text_dim, device=device)
    return Text(rows[:batch], rows[batch:].repeat(batch, 1, 1))


def latents(f, device: str) -> torch.Tensor:
    frames, height, width, channels = workload.latent_shape(f.frames, f.height, f.width)
    return torch.randn(f.batch, channels, frames, height, width, device=device)


def make_policy(f, config: TransformerConfig, device: str, steps: int) -> Policy:
    transformer = make_transformer(config, weight_dtype(f.mode), device)
    if f.attention:
        transformer.set_attention_backend(f.attention)
    return Policy(transformer, f.mode, flow_sigmas(steps, workload.SHIFT), f.guidance, f.compiler)


def measure_steps(f, device: str) -> tuple[dict[str, Stage], tuple[float, float]]:
    """Seconds and peak memory of a rollout step and of a trained step, and the first update's
    ratio.
    """
    config = workload.transformer_config(f.size)
    policy = make_policy(f, config, device, workload.STEPS)
    text, x = random_text(config, f.batch, device), latents(f, device)
    flops = workload.batch_flops(
        config, workload.latent_shape(f.frames, f.height, f.width), f.batch, f.guidance
    )
    policy.model.eval()
    stages = {
        "rollout": Stage.of(
            timed(lambda: policy.sample(x, 3, text), f.repeats, device), peak_bytes(device), flops
        )
    }
    print(f"rollout step: {stages['rollout']}", flush=True)
    kept = [policy.sample(x, i, text) for i in workload.TRAINED]
    batches = [(kept, text, torch.randn(f.batch, device=device))]
    ratios = []
    seconds = timed(lambda: ratios.append(policy.update(batches, f.kl)), f.repeats, device)
    stages["update"] = Stage.of(seconds / len(kept), peak_bytes(device), 3 * flops)
    print(f"update of 1 x {len(kept)} steps, each: {stages['update']}", flush=True)
    return stages, (float(ratios[0].min()), float(ratios[0].max()))


# ---- decoding ------------------------------------------------------------------------------------
def make_decoder(dtype: torch.dtype, device: str, **settings):
    """latents fp32 [B, C, F, H, W] -> uint8 [B, T, H, W, 3] on the host, with random weights;
    settings of the VAE.
    """
    with drawn_as(dtype, device):
        vae = AutoencoderKLWan(**settings).eval().requires_grad_(False)
    mean, std = (
        torch.tensor(v, device=device).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )

    @torch.no_grad()
    def decode(x) -> np.ndarray:
        video = vae.decode((x * std + mean).to(dtype), return_dict=False)[0].float()
        video = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return video.permute(0, 2, 3, 4, 1).cpu().numpy()

    return decode


def measure_decode(f, device: str) -> dict[str, Stage]:
    dtype = weight_dtype(f.mode)
    torch.backends.cudnn.benchmark = dtype == torch.bfloat16
    decode = make_decoder(dtype, device, **vae_settings(f.size))
    x = latents(f, device)
    stage = Stage.of(timed(lambda: decode(x), f.repeats, device), peak_bytes(device))
    print(f"decode: {stage}", flush=True)
    return {"decode": stage}


def vae_settings(size: str) -> dict:
    return {"base_dim": 8, "num_res_blocks": 1} if size == "tiny" else {}


# ---- the epoch -----------------------------------------------------------------------------------
class Scorer:
    """Threads, each with a reader of its own; a batch is one thread's task."""

    def __init__(self, threads: int):
        from rewards.ocr.rules import OCRReward

        self.make = functools.partial(OCRReward, rule="flow_grpo_video")
        self.local, self.threads = threading.local(), ThreadPoolExecutor(threads)

    def score(self, videos: np.ndarray, targets) -> list[float]:
        if not hasattr(self.local, "reward"):
            self.local.reward = self.make()
        return [
            self.local.reward.score(video, target).value for video, target in zip(videos, targets)
        ]

    def submit(self, videos: np.ndarray, targets):
        return self.threads.submit(self.score, videos, targets)


def measure_epoch(f, device: str) -> dict[str, Stage]:
    """One epoch's seconds by stage. Drawn signs are scored in place of the decoded videos
    (`workload.signs`).
    """
    config = workload.transformer_config(f.size)
    policy, scorer = make_policy(f, config, device, f.steps), Scorer(f.readers)
    decode = make_decoder(torch.float32, device, **vae_settings(f.size))
    targets = [target for _, target in workload.prompts(f.groups) for _ in range(f.group_size)]
    rows = workload.epoch_rows(f.groups, f.group_size, f.batch, f.updates)
    pictures = [
        workload.signs([targets[i] for i in r], f.frames, f.height, f.width, b)
        for b, r in enumerate(rows)
    ]
    texts = [random_text(config, f.batch, device) for _ in rows]

    def sample(text, steps: int) -> list[Kept]:
        policy.model.eval()
        kept = [policy.sample(latents(f, device), 0, text)]
        for i in range(1, steps):
            kept.append(policy.sample(kept[-1].x_next, i, text))
        return kept

    kept = sample(texts[0], 2)  # the warm-up; every thread builds its reader
    decode(kept[-1].x_next)
    list(
        scorer.threads.map(
            lambda _: (scorer.score(pictures[0][:1], targets[:1]), time.sleep(0.5)),
            range(f.readers),
        )
    )
    policy.update([(kept, texts[0], torch.randn(f.batch, device=device))], f.kl)
    wait(device)

    clock = Clock(device)
    batches, pending = [], []
    for text, r, picture in zip(texts, rows, pictures):
        batches.append(sample(text, f.steps))
        clock("sample")
        decode(batches[-1][-1].x_next)
        clock("decode")
        pending.append(scorer.submit(picture, [targets[i] for i in r]))
    rewards = np.concatenate([scores.result() for scores in pending]).reshape(
        f.groups, f.group_size
    )
    clock("score wait")
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)
    advantages = torch.tensor(
        advantages.clip(-ADVANTAGE_CLIP, ADVANTAGE_CLIP), dtype=torch.float32, device=device
    )
    work = [
        (kept[: f.trained], text, advantages.flatten()[r.tolist()])
        for kept, text, r in zip(batches, texts, rows)
    ]
    size = len(work) // f.updates
    for first in range(0, len(work), size):
        policy.update(work[first : first + size], f.kl)
    clock("update")
    return clock.stages(len(targets), peak_bytes(device))


class Clock:
    """Adds up the seconds of stages; called after each with its name."""

    def __init__(self, device: str):
        self.device, self.last, self.seconds = device, time.perf_counter(), {}

    def __call__(self, stage: str) -> None:
        wait(self.device)
        before, self.last = self.last, time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self.last - before

    def stages(self, videos: int, peak: int | None) -> dict[str, Stage]:
        """Of one video each, and of all stages together."""
        total = {"epoch": sum(self.seconds.values())} | self.seconds
        stages = {name: Stage.of(seconds / videos, peak) for name, seconds in total.items()}
        for name, stage in stages.items():
            print(f"{name}, per video: {stage}", flush=True)
        return stages


def measure(f) -> Record:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True  # as the script
    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(
        f"peer {f.task}: {f.size}, {f.mode}, {f.batch} x {f.frames} x {f.height} x {f.width}, "
        f"guidance {f.guidance}, {kind}, torch {torch.__version__}",
        flush=True,
    )
    ratio = None
    if f.task == "steps":
        stages, ratio = measure_steps(f, device)
        print(f"first update's ratio: {ratio[0]:.7f} to {ratio[1]:.7f}")
    else:
        stages = {"decode": measure_decode, "epoch": measure_epoch}[f.task](f, device)
    return Record(f"peer {f.mode}", stages, kind, f"torch {torch.__version__}", ratio)


def main(_):
    measure(flags.FLAGS).write(flags.FLAGS.json)


if __name__ == "__main__":
    workload.define_flags(guidance=1.0, kl=0.0)
    workload.define_epoch_flags()
    flags.DEFINE_enum("task", "steps", ["steps", "decode", "epoch"], "what to measure")
    flags.DEFINE_enum("mode", "autocast", MODES, "weights and compilation")
    flags.DEFINE_integer("readers", 8, "threads that score; the script has 8")
    flags.DEFINE_string(
        "attention",
        None,
        "Diffusers' attention backend, e.g. _native_cudnn; None: PyTorch's choice",
    )
    flags.DEFINE_string("compiler", "inductor", "backend of torch.compile")
    app.run(main)
