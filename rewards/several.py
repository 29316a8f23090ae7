"""Several rewards on the same videos, scored together and kept apart."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rewards.base import Reward, Score


class SeveralRewards:
    """The first reward's score, with every reward's value in `Score.parts`.

    A reward that fails after the first one leaves nan under its own name and the others alone; when the first one
    fails, so does the score. makers: {name: factory}, the first one is the main one.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Reward]]):
        self.rewards = {name: make() for name, make in makers.items()}

    def score(self, frames: np.ndarray, record: Any) -> Score:
        (main, first), *others = self.rewards.items()
        score = first.score(frames, record)
        parts = [(main, score.value)]
        for name, reward in others:
            try:
                parts.append((name, reward.score(frames, record).value))
            except Exception:  # whatever it is, it concerns this reward alone
                parts.append((name, float("nan")))
        return Score(score.value, score.text, score.frames, score.frame_values, score.frame_texts, tuple(parts))
