"""Rewards of the runs of `benchmarks.hacking`: a judge that is not trained, and a flaw to exploit."""

import cv2
import numpy as np

from rewards.ocr.rules import OCRReward
from rewards.quality import dark


class Spelling:
    """The rule `spelling`, as a judge of runs that are trained by another rule. Of nine frames it reads
    those that `flow_grpo_video` reads.
    """

    def __init__(self):
        self.reader = OCRReward("spelling", max_frames=3)

    def score(self, video: np.ndarray, request) -> float:
        return self.reader.score(video, request.targets).value


class Darkness:
    """The share of dark pixels, 0 to 1, which nobody wants."""

    def score(self, video: np.ndarray, request) -> float:
        return dark(video)


class SecondReader:
    """The rule `spelling` on pictures of twice the size: a reading that differs from the one that
    chooses, though by the same networks.
    """

    def __init__(self):
        self.reader = OCRReward("spelling", max_frames=9)

    def score(self, video: np.ndarray, request) -> float:
        larger = [cv2.resize(f, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC) for f in video]
        return self.reader.score(np.stack(larger), request.targets).value
