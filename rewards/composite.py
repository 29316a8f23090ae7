"""A composite reward: several rewards of the same video, each with a value of its own."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from rewards.base import (
    NOT_REACHED,
    CompositeScore,
    PromptRecord,
    Reward,
    Score,
    check_score,
    describe,
)
from rewards.ocr.text_match import normalise, similarity


def stability(score: Score) -> float:
    """Return how similar the text of each judged frame is to that of the frame before, in [0, 1].

    The mean similarity over pairs of neighbouring judged frames; a pair without text in both frames
    counts as 0. An image gets 1 where any text was read, else 0.
    """
    texts = [normalise(text) for text in score.frame_texts]
    if len(texts) == 1:
        return float(bool(texts[0]))
    return float(
        np.mean([similarity(a, b) if a and b else 0.0 for a, b in itertools.pairwise(texts)])
    )


# values that are computed from the main reward's score instead of the frames
DERIVED: dict[str, Callable[[Score], float]] = {"stability": stability}


class CompositeReward:
    """The main reward's score, with the value of every reward in `Score.parts`.

    When the main reward fails, the whole score fails. A secondary reward that fails is tried once
    more; if it fails again, its part is nan and its error is in `CompositeScore.failed`.

    factories: {name: factory of the reward}. The first is the main reward; None stands for a
        value of `DERIVED`.

    The record of a video may be a `PromptRecord`. Rewards with the attribute `needs_prompt` get it
    whole, the others get its targets.
    """

    def __init__(self, factories: Mapping[str, Callable[[], Reward] | None]):
        self.rewards = {
            name: None if factory is None else factory() for name, factory in factories.items()
        }

    def close(self) -> None:
        """Close the rewards that wait for other machines, which ends the waiting."""
        for reward in self.rewards.values():
            getattr(reward, "close", lambda: None)()

    def score(self, frames: np.ndarray, record: Any) -> CompositeScore:
        """Score a video uint8 [T, H, W, 3] with all rewards."""
        *_, score = self.scores(frames, record)
        return score

    def scores(self, frames: np.ndarray, record: Any) -> Iterator[CompositeScore]:
        """Yield the score as it stands after each reward; the last one is complete.

        In the others, rewards that were not reached count as failed. So the values that exist
        survive when a reward ends the process.
        """
        (main, main_reward), *secondary = self.rewards.items()
        targets = record.targets if isinstance(record, PromptRecord) else record
        assert main_reward is not None  # the main reward is none of DERIVED
        main_score = main_reward.score(frames, targets)
        check_score(main_score)
        values = dict.fromkeys(self.rewards, math.nan) | {main: main_score.value}
        failed, retried = {name: NOT_REACHED for name, _ in secondary}, []

        def current() -> CompositeScore:
            fields = {
                field.name: getattr(main_score, field.name) for field in dataclasses.fields(Score)
            }
            fields["parts"] = tuple(values.items())
            return CompositeScore(**fields, failed=tuple(failed.items()), retried=tuple(retried))

        for name, reward in secondary:
            yield current()
            reward_record = record if getattr(reward, "needs_prompt", False) else targets
            for attempt in (0, 1):
                try:
                    if reward is None:
                        score = Score(DERIVED[name](main_score))
                    else:
                        score = reward.score(frames, reward_record)
                    check_score(score)
                    values[name] = score.value
                    del failed[name]
                    break
                # Any error concerns this reward alone: the other rewards keep their values.
                except Exception as error:
                    failed[name] = describe(error)
                    if attempt == 0:
                        retried.append(name)
        yield current()
