"""Several rewards on the same videos, scored together and kept apart."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rewards.base import NOT_REACHED, Asked, CombinedScore, Reward, Score, check_score, describe
from rewards.ocr.text_match import Normaliser, similarity


def stability(score: Score) -> float:
    """How much the text read in a frame is that of the frame before, 0 to 1: mean similarity of
    neighbouring judged frames, 0 for a pair that is not both legible. A picture has 1 where
    anything is read, and 0 else.
    """
    texts = [Normaliser()(text) for text in score.frame_texts]
    if len(texts) == 1:
        return float(bool(texts[0]))
    return float(
        np.mean([similarity(a, b) if a and b else 0.0 for a, b in itertools.pairwise(texts)])
    )


# from the first reward's score
DERIVED: dict[str, Callable[[Score], float]] = {"stability": stability}


class SeveralRewards:
    """The first reward's score, with every reward's value in `Score.parts`.

    When the first reward fails, so does the score. Any other reward that fails is tried once more;
    if it fails again it leaves nan under its own name and its error in `CombinedScore.failed`.
    makers: {name: factory}, the first one is the main one, or None for one of `DERIVED`. The record
    may be an `Asked`, which those see that have `asks_prompt`; the others see its targets.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Reward]]):
        self.rewards = {name: make and make() for name, make in makers.items()}

    def close(self) -> None:
        """Ends the waiting of those that wait for others."""
        for reward in self.rewards.values():
            getattr(reward, "close", lambda: None)()

    def score(self, frames: np.ndarray, record: Any) -> CombinedScore:
        *_, score = self.scores(frames, record)
        return score

    def scores(self, frames: np.ndarray, record: Any) -> Iterator[CombinedScore]:
        """The score as it stands after each reward. The last one is whole; in the others the
        rewards that were not reached yet count as failed. So what was measured is not lost when a
        reward ends the process.
        """
        (main, first), *others = self.rewards.items()
        targets = record.targets if isinstance(record, Asked) else record
        score = first.score(frames, targets)
        check_score(score)
        values = dict.fromkeys(self.rewards, math.nan) | {main: score.value}
        failed, retried = {name: NOT_REACHED for name, _ in others}, []
        for name, reward in others:
            yield combined(score, values, failed, retried)
            seen = record if getattr(reward, "asks_prompt", False) else targets
            for attempt in (0, 1):
                try:
                    found = reward.score(frames, seen) if reward else Score(DERIVED[name](score))
                    check_score(found)
                    values[name] = found.value
                    del failed[name]
                    break
                # it concerns this reward alone: the other rewards keep their values
                except Exception as error:
                    failed[name] = describe(error)
                    if attempt == 0:
                        retried.append(name)
        yield combined(score, values, failed, retried)


def combined(
    score: Score, values: Mapping[str, float], failed: Mapping[str, str], retried: Sequence[str]
) -> CombinedScore:
    return CombinedScore(
        score.value,
        score.text,
        score.frames,
        score.frame_values,
        score.frame_texts,
        tuple(values.items()),
        tuple(failed.items()),
        tuple(retried),
    )
