"""What every reward looks like.

A reward is an object with one method, `score(frames, record)`: the frames of one video and whatever
the reward needs to know of its prompt (for `OCRReward` the tuple of target strings). It is built by
a picklable factory, so that every worker of a `RewardPool` can build its own. `rewards.composite`
scores several rewards together; `grpo.scoring.reward_combination` adds them up.
"""

import dataclasses
import math
import numbers
import traceback
from typing import Any, Protocol

import numpy as np

NOT_REACHED = "not measured yet"  # in `CombinedScore.failed`


class RewardError(RuntimeError):
    """A reward that could not be built or computed."""


@dataclasses.dataclass(frozen=True)
class Score:
    """The worth of one video, and what it was judged by."""

    value: float  # higher is better
    text: str = ""  # what was read in the video, for logs and previews
    frames: tuple[int, ...] = ()  # indices of the frames that were judged
    frame_values: tuple[float, ...] = ()  # one value per judged frame
    frame_texts: tuple[str, ...] = ()  # one text per judged frame
    # of several rewards, each one's value; nan where it failed
    parts: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class CombinedScore(Score):
    """The main reward's score, with what became of the others beside it (`rewards.composite`)."""

    # the others that failed: (name, `describe` of the error)
    failed: tuple[tuple[str, str], ...] = ()
    retried: tuple[str, ...] = ()  # the others that were tried a second time


@dataclasses.dataclass(frozen=True)
class Asked:
    """The record of a video where a reward needs more than the texts it should show."""

    targets: tuple[str, ...]
    prompt: str


class Reward(Protocol):
    """Anything that can judge one video. It must be deterministic: the same frames always get the
    same score.
    """

    def score(self, frames: np.ndarray, record: Any) -> Score:
        """`frames` uint8 [T, H, W, 3] RGB; `record` says what the video was asked to show."""
        ...


def describe(error: BaseException) -> str:
    """Return the message of a `RewardError`, which says all, or the traceback of an unexpected
    error. Never empty.
    """
    text = (
        str(error) if isinstance(error, RewardError) else "".join(traceback.format_exception(error))
    )
    return text.strip() or type(error).__name__


def last_line(error: str) -> str:
    """Return the line of a `describe` text that names the error."""
    return error.strip().splitlines()[-1]


def check_score(score: Any) -> None:
    """Raise `RewardError` if `score` is not a `Score` with a finite value. Values of `parts` may be
    nan.
    """
    if not isinstance(score, Score):
        raise RewardError(f"the reward returned {type(score).__name__} instead of a Score")
    if not isinstance(score.value, numbers.Real) or not math.isfinite(score.value):
        raise RewardError(f"the reward is not finite: {score}")
    try:
        well_formed = isinstance(score.text, str) and all(
            isinstance(name, str) and isinstance(value, numbers.Real) for name, value in score.parts
        )
    except (TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise RewardError(f"the reward returned a malformed Score: {str(score)[:200]}")


def check_frames(frames: np.ndarray) -> None:
    """Raises if `frames` is not a video as `Reward.score` takes it."""
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        found = getattr(frames, "dtype", type(frames).__name__)
        raise ValueError(
            f"frames must be a uint8 numpy array, got {found}; "
            f"convert decoded video x in [-1, 1] with ((x + 1) * 127.5).round().clip(0, 255)"
        )
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames must be [T, H, W, 3] with no empty axis, got {list(frames.shape)}; "
            f"an image is a video with T = 1"
        )
