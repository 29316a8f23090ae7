"""A composite reward: several rewards of the same video, each with a value of its own."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rewards.base import (
    NOT_REACHED,
    CompositeScore,
    PromptRecord,
    Reward,
    RewardError,
    Score,
    Traits,
    check_score,
    describe,
)
from rewards.boxes import union_area
from rewards.ocr.text_match import normalise, similarity


def stability(score: Score) -> float:
    """Return how similar the text of each judged frame is to that of the frame before, in [0, 1].

    The mean similarity over pairs of neighbouring judged frames; a pair without text in both frames
    counts as 0. An image gets 1 where any text was read, else 0.
    """
    texts = [normalise(text) for text in score.frame_texts]
    if not texts:
        raise RewardError("no frames were read")
    if len(texts) == 1:
        return float(bool(texts[0]))
    return float(
        np.mean([similarity(a, b) if a and b else 0.0 for a, b in itertools.pairwise(texts)])
    )


def text_area(score: Score) -> float:
    """Return the share of the frame that the boxes of the text cover, in [0, 1]: the area of their
    union, as a mean over the judged frames. 0 where no text was read.
    """
    if not score.frames or len(score.boxes) != len(score.frames):
        raise RewardError("the boxes of the text were not kept")
    return float(np.mean([union_area(boxes) for boxes in score.boxes]))


READER = "ocr"  # the reward whose texts are logged, and from which `DERIVED` values are computed
# values that are computed from the score of `READER` instead of the frames
DERIVED: dict[str, Callable[[Score], float]] = {"stability": stability, "text_area": text_area}


class CompositeReward:
    """The main reward's score, with the value of every reward in `Score.parts`.

    When the main reward fails, the whole score fails. A secondary reward that fails is tried once
    more; if it fails again, its part is nan and its error is in `CompositeScore.failed`.

    factories: {name: factory of the reward}. The first is that of the main reward; None stands for
        a value of `DERIVED`.
    main: the name of the main value: the first reward's own name, or NAME.PART for one of its
        parts. None: no reward is the main one, so none fails the score, and its value is 0.

    A reward with parts of its own (`rewards.own`) adds NAME.PART for each to `Score.parts`. The texts
    are those of the reward `READER`, or else of the first one. The record of a video may be a
    `PromptRecord`. Rewards with the attribute `needs_prompt` get it whole, the others get its
    targets. With a groupwise reward the videos of a prompt are scored by `score_group`.
    """

    def __init__(self, factories: Mapping[str, Callable[[], Reward] | None], main: str | None = ""):
        self.rewards = {
            name: None if factory is None else factory() for name, factory in factories.items()
        }
        first = next(iter(self.rewards))
        self.main = first if main == "" else main
        self.required = None if self.main is None else first
        self.reader = READER if READER in self.rewards else first
        self.groupwise = any(Traits.of(reward).groupwise for reward in self.rewards.values())
        self.needs_prompt = True

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
        video = _Video(self, frames)
        for name in self.rewards:
            if name != self.required:
                yield video.score()
            self._measure(name, [video], record)
            if name == self.required and video.error is not None:
                raise video.error
        yield video.score()

    def score_group(
        self, videos: Sequence[np.ndarray], record: Any
    ) -> list[CompositeScore | Exception]:
        """Score the videos of one prompt; the error of the main reward where that failed."""
        group = [_Video(self, frames) for frames in videos]
        for name in self.rewards:
            self._measure(name, group, record)
        # a `RewardError`, which can be sent to another process
        return [
            video.score() if video.error is None else RewardError(describe(video.error))
            for video in group
        ]

    def _measure(self, name: str, videos: "list[_Video]", record: Any) -> None:
        """Compute one reward of the videos of one prompt."""
        reward = self.rewards[name]
        if not Traits.of(reward).needs_prompt and isinstance(record, PromptRecord):
            record = record.targets
        for attempt in (0, 1):
            tried = [video for video in videos if video.lacks(name)]
            if not tried:
                break
            results: Sequence[Score | Exception]
            try:
                if reward is None:
                    results = [Score(DERIVED[name](video.reading)) for video in tried]
                elif Traits.of(reward).groupwise:
                    tried = videos  # a group is compared as a whole
                    results = reward.score_group([v.frames for v in videos], record)  # type: ignore
                else:
                    results = [_attempt(reward, video.frames, record) for video in tried]
            # Any error concerns this reward alone: the other rewards keep their values.
            except Exception as error:
                results = [error] * len(tried)
            for video, result in zip(tried, results):
                video.take(name, result, again=attempt == 0)
            if name == self.required:
                break  # the caller repeats it


def _attempt(reward: Reward, frames: np.ndarray, record: Any) -> Score | Exception:
    """Return the reward's score of a video, or its error."""
    try:
        return reward.score(frames, record)
    except Exception as error:  # it concerns this video and this reward alone
        return error


class _Video:
    """The values of one video so far. error: of the required reward, which fails the score."""

    def __init__(self, composite: CompositeReward, frames: np.ndarray):
        self.frames, self._composite = frames, composite
        self.error: Exception | None = None
        self.reading = Score(0.0)
        self._values = dict.fromkeys(composite.rewards, math.nan)
        self._failed = {
            name: NOT_REACHED for name in composite.rewards if name != composite.required
        }
        self._retried: list[str] = []
        self._missing = set(composite.rewards)

    def lacks(self, name: str) -> bool:
        """Return whether the reward has to be computed, for the first time or once more."""
        return name in self._missing

    def take(self, name: str, result: Score | Exception, again: bool) -> None:
        """Add a reward's result. again: whether a reward that failed will be computed once more."""
        required = name == self._composite.required
        try:
            if isinstance(result, Exception):
                raise result
            check_score(result)
            values = {f"{name}.{part}": value for part, value in result.parts}
            if required:
                main = self._composite.main
                value = ({name: result.value} | values).get(main or "", math.nan)
                if not math.isfinite(value):
                    raise RewardError(
                        f"the main reward {main} has no finite value; reward {name} returned "
                        f"{ {name: result.value} | dict(result.parts) }"
                    )
        except Exception as error:
            if required:
                self.error = error
                return
            self._failed[name] = describe(error)
            if again:
                self._retried.append(name)
            return
        self._missing.discard(name)
        self._failed.pop(name, None)
        self._values |= {name: result.value} | values
        for part, value in ({name: result.value} | values).items():
            if not math.isfinite(value):
                self._failed[part] = f"reward {part} is not finite"
        if name == self._composite.reader:
            self.reading = result

    def score(self) -> CompositeScore:
        """Return the score as it stands."""
        fields = {
            field.name: getattr(self.reading, field.name) for field in dataclasses.fields(Score)
        }
        main = self._composite.main
        fields["value"] = 0.0 if main is None else self._values[main]
        fields["parts"] = tuple(self._values.items())
        return CompositeScore(
            **fields, failed=tuple(self._failed.items()), retried=tuple(self._retried)
        )
