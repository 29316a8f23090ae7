"""Prepares the pictures of a report: the first prompts' samples, before and after training."""

import dataclasses
import hashlib
import math

import numpy as np

from grpo.records.run_log import PAIRS
from grpo.report.run_records import BETWEEN, RunRecords
from rewards.ocr.targets import TargetError, parse_targets
from wan_jax.storage import media

MEDIA_BYTES = 7_000_000  # of all embedded pictures together, so that the page stays below 10 MB
FPS = 16
VISIBLE = 192  # pixels: smaller pictures are enlarged to about this height
CRFS = (media.CRF, 26, 34)  # qualities of a video, best first
PICTURES = ((1, None), (1, 92), (1, 80), (2, 80), (4, 80))  # (shrink by, JPEG quality; None: PNG)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A sample as the page embeds it."""

    kind: str  # "video", "image", or "none" if no encoding is small enough
    size: str  # "height x width" of the sample in pixels
    width: int  # pixels on the page
    enlarged: bool  # whether each of its pixels is shown as several
    uri: str = ""


_encoded: dict[tuple, Embedded] = {}


def write_pairs(run: RunRecords) -> None:
    """Write side_by_side/000.png (or .mp4) and so on into the run's folder.

    Each file shows the sample of one prompt and noise in the first evaluation on the left, in the
    last one on the right. Nothing is written if there are no two evaluations to compare.
    """
    videos = [videos for _, videos in run.previews]
    if len(videos) < 2 or videos[0].shape[1:] != videos[1].shape[1:]:
        return
    frames, height = videos[0].shape[1:3]
    folder = run.folder / PAIRS
    folder.mkdir(exist_ok=True)
    for i, (before, after) in enumerate(zip(*videos)):
        media.write(
            folder / f"{i:03d}.{'mp4' if frames > 1 else 'png'}",
            media.side_by_side(before, after),
            min(FPS, frames),
            max(1, -(-VISIBLE // height)),
        )


def samples(run: RunRecords) -> list[dict]:
    """Return the first prompts with their samples: `sides` of the first and the last evaluation, and
    `between` of some between them.
    """
    if not run.previews:
        return []
    prompts = run.previews[0][0]["prompts"]
    everything = [*run.previews, *run.between]
    count = min([len(prompts), *(len(videos) for _, videos in everything)])
    # few values, so that the pages of a run share what is encoded
    budget = MEDIA_BYTES // (count * (2 if len(everything) <= 2 else 2 + BETWEEN + 1))

    def side(i: int, evaluation: dict, videos: np.ndarray) -> dict:
        return {
            "epoch": evaluation["epoch"],
            "reward": format_reward(evaluation["rewards"][i]),
            "text": evaluation["texts"][i],
            "picture": embed(videos[i], budget),
        }

    return [
        {
            "prompt": prompt,
            "target": _target(prompt),
            "sides": [side(i, *shown) for shown in run.previews],
            "between": [side(i, *shown) for shown in run.between],
        }
        for i, prompt in enumerate(prompts[:count])
    ]


def format_reward(value: float) -> str:
    return "not scored" if math.isnan(value) else f"{value:.2f}"


def _target(prompt: str) -> str:
    try:
        return ", ".join(f"“{target}”" for target in parse_targets(prompt))
    except TargetError:
        return "no quoted text"


def embed(video: np.ndarray, budget: int) -> Embedded:
    """Return `encode` of a sample, which is made once for all pages of this process."""
    key = hashlib.sha256(video.tobytes()).digest(), video.shape, budget
    if key not in _encoded:
        if len(_encoded) >= 256:
            _encoded.clear()
        _encoded[key] = encode(video, budget)
    return _encoded[key]


def encode(video: np.ndarray, budget: int) -> Embedded:
    """Encode a sample in the best quality that fits.

    Args:
      video: uint8 [T, H, W, 3].
      budget: largest number of characters of the data URI.
    """
    frames, height, width, _ = video.shape
    scale = max(1, -(-VISIBLE // height))
    picture = Embedded("none", f"{height} x {width}", width * scale, scale > 1)
    if frames > 1:
        fps = min(FPS, frames)  # a short video lasts a second
        for crf in CRFS:
            uri = media.mp4_data_uri(video, fps, min(scale, 2), crf=crf)
            if len(uri) <= budget:
                return dataclasses.replace(picture, kind="video", uri=uri)
    for factor, quality in PICTURES:
        frame = media.shrink(video[frames // 2], factor)
        uri = media.jpeg_data_uri(frame, quality) if quality else media.png_data_uri(frame)
        if len(uri) <= budget:
            return dataclasses.replace(picture, kind="image", uri=uri)
    return picture
