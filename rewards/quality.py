"""Measures of a video's quality that need no model: properties that training could degrade while
the model learns to spell.

    measure           definition                                         degraded by
    sharpness         log of the variance of the luma's Laplacian        blur; noise or ringing
    exposure          mean luma                                          black or white frames
    contrast          standard deviation of the luma                     grey or posterised frames
    compressibility   bits per pixel of the frames as JPEG, quality 90   flat frames; noise
    flicker           mean absolute second difference of a pixel's       flicker, noise
                      luma in time
    motion            mean length of the optical flow between frames,    frozen videos
                      in % of the frame's diagonal
    dark              share of pixels with a luma below 0.15 x 255       black frames
    edges             share of pixels on an edge, by Canny's detector    clutter; blur
    colours           entropy of the colours in 8 x 8 x 8 cells, bits    posterised or grey frames

The values are plain measurements, neither good nor bad. `grpo.scoring.reward_combination` compares
them with those of the model that training started from. Luma is Rec. 601, 0 to 255. For videos of
one frame, flicker and motion are 0.
"""

import itertools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from rewards.base import Score, check_frames

FLOW_HEIGHT = 128  # pixels; frames are scaled to it before the optical flow
DARK = 0.15 * 255  # luma below which a pixel is dark
CANNY = 100, 200  # thresholds of the gradient where an edge goes on, and where it begins
COLOUR_CELLS = 8  # per channel


def luma(frames: np.ndarray) -> np.ndarray:
    """Return the luma of uint8 [T, H, W, 3] RGB frames, float32 [T, H, W] from 0 to 255."""
    return frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def sharpness(frames: np.ndarray) -> float:
    """Return the mean over frames of log(variance of the Laplacian of the luma + 0.001)."""
    return float(np.mean([np.log(cv2.Laplacian(y, cv2.CV_32F).var() + 1e-3) for y in luma(frames)]))


def exposure(frames: np.ndarray) -> float:
    """Return the mean luma, 0 to 255."""
    return float(luma(frames).mean())


def contrast(frames: np.ndarray) -> float:
    """Return the mean over frames of the standard deviation of the luma."""
    return float(luma(frames).std(axis=(1, 2)).mean())


def compressibility(frames: np.ndarray) -> float:
    """Return the size of the frames as JPEG of quality 90, in bits per pixel."""
    sizes = [
        len(cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1])
        for frame in frames
    ]
    return float(8 * np.mean(sizes) / (frames.shape[1] * frames.shape[2]))


def flicker(frames: np.ndarray) -> float:
    """Return the mean absolute second difference in time of the luma; 0 for fewer than 3 frames."""
    return float(np.abs(np.diff(luma(frames), n=2, axis=0)).mean()) if len(frames) > 2 else 0.0


def motion(frames: np.ndarray) -> float:
    """Return the mean length of Farneback's optical flow, in % of the frame's diagonal."""
    if len(frames) < 2:
        return 0.0
    height, width = frames.shape[1:3]
    size = (max(16, round(width * FLOW_HEIGHT / height)), FLOW_HEIGHT)
    small = [
        cv2.resize(y, size, interpolation=cv2.INTER_AREA).round().astype(np.uint8)
        for y in luma(frames)
    ]
    new: Any = None  # OpenCV allocates the flow, which its stubs do not allow
    lengths = [
        np.linalg.norm(
            cv2.calcOpticalFlowFarneback(before, after, new, 0.5, 3, 15, 3, 5, 1.2, 0), axis=-1
        ).mean()
        for before, after in itertools.pairwise(small)
    ]
    return float(100 * np.mean(lengths) / np.hypot(*size))


def dark(frames: np.ndarray) -> float:
    """Return the share of pixels with a luma below `DARK`, 0 to 1."""
    return float((luma(frames) < DARK).mean())


def edges(frames: np.ndarray) -> float:
    """Return the share of pixels that Canny's detector marks as edges, 0 to 1."""
    grey = luma(frames).round().astype(np.uint8)
    return float(np.mean([(cv2.Canny(frame, *CANNY) > 0).mean() for frame in grey]))


def colours(frames: np.ndarray) -> float:
    """Return the entropy in bits of the histogram of all pixels over `COLOUR_CELLS` cells a channel,
    0 for one colour to 9.
    """
    red, green, blue = np.moveaxis(frames // (256 // COLOUR_CELLS), -1, 0).astype(np.int64)
    counts = np.bincount(((red * COLOUR_CELLS + green) * COLOUR_CELLS + blue).ravel())
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum() + 0.0)


MEASURES: dict[str, Callable[[np.ndarray], float]] = {
    measure.__name__: measure
    for measure in (
        sharpness,
        exposure,
        contrast,
        compressibility,
        flicker,
        motion,
        dark,
        edges,
        colours,
    )
}


class QualityReward:
    """One of `MEASURES` as a reward. It ignores the record."""

    def __init__(self, name: str):
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r}: choose one of {', '.join(MEASURES)}")
        self.measure = MEASURES[name]

    def score(self, frames: np.ndarray, record: Any = None) -> Score:
        """Measure a video uint8 [T, H, W, 3] RGB."""
        check_frames(frames)
        return Score(self.measure(frames))
