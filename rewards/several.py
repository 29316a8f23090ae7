"""Several rewards on the same videos, scored together and kept apart."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rewards.base import Asked, Reward, Score
from rewards.text_match import Normaliser, similarity


def stability(score: Score) -> float:
    """How much the text read in a frame is that of the frame before, 0 to 1: mean similarity of neighbouring judged
    frames, 0 for a pair that is not both legible. A picture has 1 where anything is read, and 0 else.
    """
    texts = [Normaliser()(text) for text in score.frame_texts]
    if len(texts) == 1:
        return float(bool(texts[0]))
    return float(np.mean([similarity(a, b) if a and b else 0.0 for a, b in itertools.pairwise(texts)]))


DERIVED: dict[str, Callable[[Score], float]] = {"stability": stability}  # from the first reward's score


class SeveralRewards:
    """The first reward's score, with every reward's value in `Score.parts`.

    A reward that fails after the first one leaves nan under its own name and the others alone; when the first one
    fails, so does the score. makers: {name: factory}, the first one is the main one, or None for one of `DERIVED`.
    The record may be an `Asked`, which those see that have `asks_prompt`; the others see its targets.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Reward]]):
        self.rewards = {name: make and make() for name, make in makers.items()}

    def close(self) -> None:
        """Ends the waiting of those that wait for others."""
        for reward in self.rewards.values():
            getattr(reward, "close", lambda: None)()

    def score(self, frames: np.ndarray, record: Any) -> Score:
        (main, first), *others = self.rewards.items()
        targets = record.targets if isinstance(record, Asked) else record
        score = first.score(frames, targets)
        parts = [(main, score.value)]
        for name, reward in others:
            try:
                seen = record if getattr(reward, "asks_prompt", False) else targets
                parts.append((name, reward.score(frames, seen).value if reward else DERIVED[name](score)))
            except Exception:  # whatever it is, it concerns this reward alone
                parts.append((name, float("nan")))
        return Score(score.value, score.text, score.frames, score.frame_values, score.frame_texts, tuple(parts))
