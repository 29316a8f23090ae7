"""Properties of a video that need no model: what training could spoil while it learns to spell.

    name              what                                                          spoilt by
    sharpness         log of the variance of the luma's Laplacian                   blur, and noise
                      or ringing
    exposure          mean luma                                                     black or white
                      pictures
    contrast          standard deviation of the luma                                grey or
                      posterised pictures
    compressibility   bits a pixel of the frames as JPEG, quality 90                flat pictures,
                      and noise
    flicker           mean absolute second difference of a pixel in time            flicker, noise
    motion            mean length of the optical flow between frames, in % of the   frozen videos
                      frame's diagonal

The values are plain measurements, without good or bad: `grpo.scoring.reward_combination` compares
them with those of the model that training started from. Luma is Rec. 601 on 0..255. Videos of one
frame have flicker and motion 0.
"""

import itertools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from rewards.base import Score, check_frames

FLOW_HEIGHT = 128  # pixels; frames are scaled to it before the optical flow


def luma(frames: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] RGB -> float32 [T, H, W], 0..255."""
    return frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def sharpness(frames: np.ndarray) -> float:
    return float(np.mean([np.log(cv2.Laplacian(y, cv2.CV_32F).var() + 1e-3) for y in luma(frames)]))


def exposure(frames: np.ndarray) -> float:
    return float(luma(frames).mean())


def contrast(frames: np.ndarray) -> float:
    return float(luma(frames).std(axis=(1, 2)).mean())


def compressibility(frames: np.ndarray) -> float:
    sizes = [
        len(cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1])
        for frame in frames
    ]
    return float(8 * np.mean(sizes) / (frames.shape[1] * frames.shape[2]))


def flicker(frames: np.ndarray) -> float:
    return float(np.abs(np.diff(luma(frames), n=2, axis=0)).mean()) if len(frames) > 2 else 0.0


def motion(frames: np.ndarray) -> float:
    if len(frames) < 2:
        return 0.0
    h, w = frames.shape[1:3]
    size = (max(16, round(w * FLOW_HEIGHT / h)), FLOW_HEIGHT)
    small = [
        cv2.resize(y, size, interpolation=cv2.INTER_AREA).round().astype(np.uint8)
        for y in luma(frames)
    ]
    lengths = [
        np.linalg.norm(
            cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0), axis=-1
        ).mean()
        for a, b in itertools.pairwise(small)
    ]
    return float(100 * np.mean(lengths) / np.hypot(*size))


MEASURES: dict[str, Callable[[np.ndarray], float]] = {
    f.__name__: f for f in (sharpness, exposure, contrast, compressibility, flicker, motion)
}


class QualityReward:
    """One of `MEASURES` as a reward; the record is not looked at."""

    def __init__(self, name: str):
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r}: choose one of {', '.join(MEASURES)}")
        self.measure = MEASURES[name]

    def score(self, frames: np.ndarray, record: Any = None) -> Score:
        check_frames(frames)
        return Score(self.measure(frames))
