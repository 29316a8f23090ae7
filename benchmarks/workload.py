"""Sizes, FLOP counts, scored pictures and records shared by both sides of a comparison.

This module imports neither JAX nor PyTorch, so that each side runs in a process without the other.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from absl import flags

from wan_jax.models.config import TransformerConfig

SIZES: dict[str, dict[str, Any]] = {
    "1.3b": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "14b": dict(num_attention_heads=40, ffn_dim=13824, num_layers=40),
    # the transformer of assets/tiny-wan
    "small": dict(
        num_attention_heads=4, ffn_dim=768, num_layers=8, attention_head_dim=64, text_dim=192
    ),
    "tiny": dict(num_attention_heads=2, ffn_dim=512, num_layers=2),
}
TEXT = 64  # rows of a prompt
TEXT_ROWS = 512  # rows of a prompt with its padding
STEPS, SHIFT = 20, 3.0  # denoising steps, and shift of their schedule
RANK, ALPHA = 32, 64  # of LoRA
TRAINED = (2, 17)  # steps of a timed update
# bf16 TFLOP/s of an H200: NVIDIA's figure for dense products, and a measured large product
NOMINAL, MEASURED = 989.0, 790.0
PROMPTS = pathlib.Path(__file__).parents[1] / "assets" / "prompts" / "ocr_train.txt"


def transformer_config(size: str) -> TransformerConfig:
    """Return the configuration of Wan's transformer. size: a key of `SIZES`."""
    heads: dict[str, Any] = {"attention_head_dim": 128, "text_dim": 4096}
    return TransformerConfig(**heads | SIZES[size])


def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (F, H, W, C) of a video's latents in Wan 2.1's VAE."""
    return (frames - 1) // 4 + 1, height // 8, width // 8, 16


def shape_of_latents(settings) -> tuple[int, int, int, int]:
    """Return (F, H, W, C) of the latents of the videos that the flags describe."""
    return latent_shape(settings.frames, settings.height, settings.width)


def describe_shape(settings) -> str:
    """Return the videos that the flags describe as 'batch x frames x height x width'."""
    return f"{settings.batch} x {settings.frames} x {settings.height} x {settings.width}"


def forward_flops(config: TransformerConfig, tokens: int) -> float:
    """Return the FLOPs of the matrix products in one video's forward pass.

    All padded text rows together count as one.
    """
    width, text = config.num_attention_heads * config.attention_head_dim, TEXT + 1
    # q, k, v and o of self-attention, q and o of cross-attention, both layers of the FFN
    block = tokens * (6 * 2 * width**2 + 2 * 2 * width * config.ffn_dim)
    block += text * 2 * 2 * width**2  # k and v of cross-attention
    block += 4 * tokens * (tokens + text) * width  # both attentions
    return config.num_layers * block


def batch_flops(
    config: TransformerConfig, shape: tuple[int, ...], batch: int, guidance: float
) -> float:
    """Return the FLOPs of a rollout step: a forward pass for each video, or two with guidance.

    shape: (F, H, W, C) of the latents. An update counts three times that.
    """
    tokens = shape[0] * shape[1] * shape[2] // 4
    return batch * forward_flops(config, tokens) * (2 if guidance > 1 else 1)


def define_flags(guidance: float, kl: float) -> None:
    """Define the flags of a workload, with the defaults that differ between benchmarks."""
    flags.DEFINE_enum("size", "1.3b", list(SIZES), "size of the transformer")
    flags.DEFINE_integer("height", 512, "height in pixels")
    flags.DEFINE_integer("width", 512, "width in pixels")
    flags.DEFINE_integer("frames", 1, "frames of a video")
    flags.DEFINE_integer("batch", 9, "videos of a batch")
    flags.DEFINE_float("guidance", guidance, "scale of classifier-free guidance")
    flags.DEFINE_float("kl", kl, "weight of the KL to the reference, one more forward pass")
    flags.DEFINE_integer("repeats", 5, "number of timed calls")
    flags.DEFINE_string("json", None, "file to write the figures to")


def define_epoch_flags() -> None:
    """Define the further flags of a whole epoch."""
    flags.DEFINE_integer("groups", 3, "prompts of an epoch")
    flags.DEFINE_integer("group_size", 12, "videos of a prompt")
    flags.DEFINE_integer("steps", STEPS, "denoising steps")
    flags.DEFINE_integer("trained", STEPS - 1, "number of trained steps, the first ones")
    flags.DEFINE_integer("updates", 2, "optimiser steps of an epoch")


def epoch_rows(groups: int, group_size: int, batch: int, updates: int) -> list[np.ndarray]:
    """Return the numbers of each batch's videos.

    Raises ValueError when the videos do not divide into batches, or the batches into updates.
    """
    videos = groups * group_size
    if videos % batch or (videos // batch) % updates:
        raise ValueError(
            f"groups={groups} x group_size={group_size} videos do not fill a multiple of "
            f"updates={updates} batches of batch={batch}; change one of them"
        )
    return [np.arange(start, start + batch) for start in range(0, videos, batch)]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The measurement of one stage on one side."""

    ms: float
    peak_gib: float | None = (
        None  # of the device until then; None if the backend does not report it
    )
    tflops: float | None = None  # model FLOPs a second

    @classmethod
    def of(cls, seconds: float, peak_bytes: int | None, work: float | None = None) -> "Stage":
        """Make a stage from its seconds, the device's peak memory and its work in model FLOPs."""
        return cls(
            1000 * seconds,
            peak_bytes / 2**30 if peak_bytes else None,
            work / seconds / 1e12 if work else None,
        )

    def mfu(self, peak: float) -> float | None:
        """Return the share of `peak` TFLOP/s, or None without a count of FLOPs."""
        return self.tflops / peak if self.tflops else None

    def __str__(self) -> str:
        rate = ""
        if self.tflops:
            rate = f", {self.tflops:.0f} TFLOP/s (model), MFU {self.tflops / NOMINAL:.2f}"
        peak = "unknown" if self.peak_gib is None else f"{self.peak_gib:.1f} GiB"
        return f"{self.ms:.1f} ms{rate}, peak memory so far {peak}"


@dataclasses.dataclass(frozen=True)
class Record:
    """The measurements of one process."""

    side: str
    stages: dict[str, Stage]
    device: str
    software: str
    ratio: tuple[float, float] | None = None  # smallest and largest ratio of the first update

    def write(self, path: str | None) -> None:
        """Write the record as JSON, unless `path` is None."""
        if path:
            pathlib.Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def from_dict(cls, values: dict) -> "Record":
        """Return the record that `write` wrote as JSON."""
        stages = {name: Stage(**stage) for name, stage in values["stages"].items()}
        return cls(**{**values, "stages": stages})


def prompts(number: int) -> list[tuple[str, tuple[str, ...]]]:
    """Return the first training prompts, each with the texts that it asks for."""
    from rewards.ocr.targets import parse_targets

    lines = [line.strip() for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [(line, parse_targets(line)) for line in lines if line and not line.startswith("#")][
        :number
    ]


def misspelt(text: str, rng: np.random.Generator) -> str:
    """Return the text with up to half of its letters replaced, so that scores of a group differ."""
    letters = list(text)
    for i in rng.choice(len(letters), rng.integers(len(letters) // 2 + 1), replace=False):
        letters[i] = chr(ord("A") + rng.integers(26))
    return "".join(letters)


def signs(
    targets: list[tuple[str, ...]], frames: int, height: int, width: int, seed: int
) -> np.ndarray:
    """Return uint8 videos [B, T, H, W, 3], each with its misspelt target in large letters.

    They are scored instead of the decoded videos: random weights draw noise, where OCR finds no
    text and skips its second network.
    """
    import cv2

    rng, videos = np.random.default_rng(seed), []
    for target in targets:
        picture = np.full((height, width, 3), 235, np.uint8)
        text = misspelt(" ".join(target), rng)
        unit, _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 2)
        scale = min(0.9 * width / unit[0], 0.3 * height / unit[1])
        cv2.putText(
            picture,
            text,
            (int(0.05 * width), height // 2),
            cv2.FONT_HERSHEY_SIMPLEX,
            scale,
            (20, 20, 20),
            max(1, round(2 * scale)),
            cv2.LINE_AA,
        )
        videos.append(np.repeat(picture[None], frames, 0))
    return np.stack(videos)
