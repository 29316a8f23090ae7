"""A text reward by two readers: each frame has the lower one of their values.

A policy that is trained on one OCR engine finds letters that this engine takes for the right ones
and people do not. Letters that fool two engines are harder to find, but a policy trained on both
will look for them: keep a third reader for judging (`config.reward.second_engine`, or a vision
model), which training never sees.
"""

import numpy as np

from rewards.base import Score
from rewards.ocr.engines import Engine
from rewards.ocr.rules import OCRReward

PARTS = ("reader_one", "reader_two", "difference")


class TwoReaderReward:
    """The smaller of the values that a rule gives to what two engines read, frame by frame. The
    record is the tuple of targets.

    engine, reader_two: names for `make_engine`, or engines. rule, max_frames, boxes: as for
    `OCRReward`. Text and boxes are those of `engine`. The parts are the value of each reader alone,
    and the first less the second: where it moves away from 0 in training, one of them is being
    fooled.
    """

    def __init__(
        self,
        rule: str = "confident",
        engine: str | Engine = "rapidocr",
        reader_two: str | Engine = "rapidocr_v4",
        max_frames: int = 17,
        boxes: bool = False,
    ):
        if engine == reader_two:
            raise ValueError(f"both readers are {engine!r}: choose two that differ")
        self.first = OCRReward(rule, engine, max_frames=max_frames, boxes=boxes)
        self.second = OCRReward(rule, reader_two, max_frames=max_frames)

    def score(self, frames: np.ndarray, targets) -> Score:
        """Score a video uint8 [T, H, W, 3] RGB, as `OCRReward.score`."""
        first, second = self.first.score(frames, targets), self.second.score(frames, targets)
        values = tuple(map(min, first.frame_values, second.frame_values))
        difference = first.value - second.value
        return Score(
            self.first.rule.combine(values),
            first.text,
            first.frames,
            values,
            first.frame_texts,
            tuple(zip(PARTS, (first.value, second.value, difference))),
            first.boxes,
        )
