"""What both sides of a comparison share: sizes, the count of FLOPs, the pictures to score, the
record of a measurement.

Imports neither JAX nor PyTorch, so that each side runs in a process without the other.
"""

import dataclasses
import json
import pathlib

import numpy as np
from absl import flags

from wan_jax.models.config import TransformerConfig

SIZES = {
    "1.3b": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "14b": dict(num_attention_heads=40, ffn_dim=13824, num_layers=40),
    "tiny": dict(num_attention_heads=2, ffn_dim=512, num_layers=2),
}
TEXT, TEXT_ROWS = 64, 512  # rows of a prompt, and with its padding
STEPS, SHIFT = 20, 3.0
RANK, ALPHA = 32, 64.0
TRAINED = (2, 17)  # the steps of a timed update
# bf16 TFLOP/s of an H200: NVIDIA's figure for dense products, and a large product as measured
NOMINAL, MEASURED = 989.0, 790.0
PROMPTS = pathlib.Path(__file__).parents[1] / "assets" / "prompts" / "ocr_train.txt"


def transformer_config(size: str) -> TransformerConfig:
    return TransformerConfig(**SIZES[size], attention_head_dim=128, text_dim=4096)


def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(F, H, W, C) of a video's latents in Wan 2.1's VAE."""
    return (frames - 1) // 4 + 1, height // 8, width // 8, 16


def forward_flops(c: TransformerConfig, tokens: int) -> float:
    """Matrix-product FLOPs of one video's forward pass, the padded text rows counted once."""
    d = c.num_attention_heads * c.attention_head_dim
    # q k v o, cross q o, FFN; self
    block = tokens * (6 * 2 * d * d + 2 * 2 * d * c.ffn_dim) + 4 * tokens**2 * d
    block += (TEXT + 1) * 2 * 2 * d * d + 4 * tokens * (TEXT + 1) * d  # cross k v; cross attention
    return c.num_layers * block


def batch_flops(
    config: TransformerConfig, shape: tuple[int, ...], batch: int, guidance: float
) -> float:
    """Of a rollout step's forward passes: two for each video with guidance. An update counts three
    times that.
    """
    return (
        batch
        * forward_flops(config, shape[0] * shape[1] * shape[2] // 4)
        * (2 if guidance > 1 else 1)
    )


def define_flags(guidance: float, kl: float) -> None:
    """The flags of a workload, with the defaults that differ between works."""
    flags.DEFINE_enum("size", "1.3b", list(SIZES), "configuration")
    flags.DEFINE_integer("height", 512, "pixels")
    flags.DEFINE_integer("width", 512, "pixels")
    flags.DEFINE_integer("frames", 1, "pixel frames")
    flags.DEFINE_integer("batch", 9, "videos")
    flags.DEFINE_float("guidance", guidance, "classifier-free guidance")
    flags.DEFINE_float("kl", kl, "weight of the KL to the reference, one more forward pass")
    flags.DEFINE_integer("repeats", 5, "timed calls")
    flags.DEFINE_string("json", None, "file to write the figures to")


def define_epoch_flags() -> None:
    flags.DEFINE_integer("groups", 3, "prompts of the epoch")
    flags.DEFINE_integer("group_size", 12, "videos of a prompt")
    flags.DEFINE_integer("steps", STEPS, "denoising steps")
    flags.DEFINE_integer("trained", STEPS - 1, "how many of them are trained, the first ones")
    flags.DEFINE_integer("updates", 2, "optimiser steps")


def epoch_rows(groups: int, group_size: int, batch: int, updates: int) -> list[np.ndarray]:
    """The numbers of each batch's videos. Raises ValueError where batches or updates do not come
    out even.
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
    """One timed thing of one side."""

    ms: float
    peak_gib: float | None = None  # of the device until then; None where the backend does not count
    tflops: float | None = None  # model FLOPs a second

    @classmethod
    def of(cls, seconds: float, peak_bytes: int | None, work: float | None = None) -> "Stage":
        """work: model FLOPs."""
        return cls(
            1000 * seconds,
            peak_bytes / 2**30 if peak_bytes else None,
            work and work / seconds / 1e12,
        )

    def mfu(self, peak: float) -> float:
        """Share of `peak` TFLOP/s."""
        return self.tflops / peak

    def __str__(self) -> str:
        rate = (
            f", {self.tflops:.0f} TFLOP/s (model), MFU {self.mfu(NOMINAL):.2f}"
            if self.tflops
            else ""
        )
        peak = "unknown" if self.peak_gib is None else f"{self.peak_gib:.1f} GiB"
        return f"{self.ms:.1f} ms{rate}, peak memory so far {peak}"


@dataclasses.dataclass(frozen=True)
class Record:
    """What one process measured."""

    side: str
    stages: dict[str, Stage]
    device: str
    software: str
    ratio: tuple[float, float] | None = None  # least and largest of the first update

    def write(self, path: str | None) -> None:
        if path:
            pathlib.Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def from_dict(cls, values: dict) -> "Record":
        stages = {name: Stage(**stage) for name, stage in values["stages"].items()}
        return cls(**values | {"stages": stages})


def prompts(number: int) -> list[tuple[str, tuple[str, ...]]]:
    """The first training prompts and what each asks to write."""
    from rewards.ocr.targets import parse_targets

    lines = [line.strip() for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [(line, parse_targets(line)) for line in lines if line and not line.startswith("#")][
        :number
    ]


def misspelt(text: str, rng: np.random.Generator) -> str:
    """The text with up to half of its letters replaced, so that scores differ inside a group."""
    letters = list(text)
    for i in rng.choice(len(letters), rng.integers(len(letters) // 2 + 1), replace=False):
        letters[i] = chr(ord("A") + rng.integers(26))
    return "".join(letters)


def signs(
    targets: list[tuple[str, ...]], frames: int, height: int, width: int, seed: int
) -> np.ndarray:
    """uint8 [B, T, H, W, 3]: each video shows its target, misspelt, as large as fits.

    Scored in place of what a random VAE decodes: on noise OCR finds no text and skips its second
    network.
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
