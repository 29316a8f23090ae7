"""The interface of a reward, the score that it returns, and the errors that it raises.

A reward is an object with one method, `score(frames, record)`: `frames` is one video, `record` what
the reward has to know about the video's prompt. For `OCRReward`, the record is the tuple of texts
that the video should show. A picklable factory builds the reward, so that every worker of a
`RewardPool` can build its own. `rewards.composite` computes several rewards of one video;
`grpo.scoring.reward_combination` adds them up.
"""

import dataclasses
import math
import numbers
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

# left, top, right and bottom of a rectangle, in shares of the frame's width and height, 0 to 1
Box = tuple[float, float, float, float]
NOT_REACHED = "not measured yet"  # an error text in `CompositeScore.failed`
# Messages of the dynamic linker and the kernel. A full static TLS block is another fault, which
# more memory does not remedy.
_OUT_OF_MEMORY = re.compile(
    r"failed to map|cannot map|cannot allocate memory(?! in static TLS)|bad_alloc", re.IGNORECASE
)


class RewardError(RuntimeError):
    """A reward that cannot be built or computed. The message alone explains the failure."""


@dataclasses.dataclass(frozen=True)
class Score:
    """The value of one video, and the readings that it was computed from."""

    value: float  # higher is better
    text: str = ""  # the text that was read in the video, for logs and previews
    frames: tuple[int, ...] = ()  # indices of the frames that were judged
    frame_values: tuple[float, ...] = ()  # one value per judged frame
    frame_texts: tuple[str, ...] = ()  # one text per judged frame
    # (name, value) of each reward of a composite; nan where that reward failed
    parts: tuple[tuple[str, float], ...] = ()
    # the boxes of the text read in each judged frame; () where the reward does not keep them
    boxes: tuple[tuple[Box, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class CompositeScore(Score):
    """The score of the main reward, with the values and failures of the secondary rewards
    (`rewards.composite`).
    """

    # (name, `describe` of the error) of each secondary reward that failed
    failed: tuple[tuple[str, str], ...] = ()
    retried: tuple[str, ...] = ()  # names of the secondary rewards that were computed twice


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """A record for rewards that need more than the texts to be shown; a user's reward gets it as
    `request`.
    """

    targets: tuple[str, ...]  # texts to be shown; () where the prompt has none
    prompt: str
    # the other fields of the prompt's line in a .jsonl file
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fps: float = 16.0  # frames per second of the video; Wan's videos have 16, TI2V-5B's 24


@dataclasses.dataclass(frozen=True)
class Traits:
    """What a reward can do besides `score`, from its attributes of the same names."""

    groupwise: bool = False  # score_group(videos, record): the videos of one prompt together
    batched: bool = False  # score_batch(videos, records): videos of any prompts in one call
    needs_prompt: bool = False  # its record is a `PromptRecord`, not only the targets

    @classmethod
    def of(cls, reward: Any) -> "Traits":
        """Return the traits of a reward."""
        return cls(
            **{f.name: bool(getattr(reward, f.name, False)) for f in dataclasses.fields(cls)}
        )


class Reward(Protocol):
    """Anything that can judge one video. It must be deterministic: equal frames and records get
    equal scores.

    A reward may also have:
        close()         ends its waiting for other machines; the pool calls it
        scores()        yields partial scores, as `rewards.composite.CompositeReward.scores`
        groupwise, batched, needs_prompt    see `Traits`
    """

    def score(self, frames: np.ndarray, record: Any, /) -> Score:
        """Judge the video `frames`, uint8 [T, H, W, 3] RGB. `record` describes its prompt."""
        ...


def describe(error: BaseException) -> str:
    """Return the message of a `RewardError`, or the traceback of any other error. Never empty."""
    if isinstance(error, RewardError):
        text = str(error)
    else:
        text = "".join(traceback.format_exception(error))
    return text.strip() or type(error).__name__


def last_line(error: str) -> str:
    """Return the line of a `describe` text that names the error."""
    return error.strip().splitlines()[-1]


def import_problem(user: str, error: ImportError, fix: str) -> str:
    """Explain in one sentence why a package cannot be imported: missing, broken, or out of memory.

    user: the part that needs the package, e.g. "OCR engine 'x'". fix: the command that installs it.
    """
    if _OUT_OF_MEMORY.search(str(error)):
        return (
            f"{user} cannot load its packages because there is not enough memory ({error}): free "
            "some, or raise the limit of the process (ulimit -v)"
        )
    if isinstance(error, ModuleNotFoundError):
        return f"{user} needs a package that is missing ({error}): {fix}"
    return f"{user} needs a package that cannot be loaded ({error}): {fix}"


def check_score(score: Any) -> None:
    """Raise `RewardError` unless `score` is a `Score` with a finite value. The values of `parts`
    may be nan, and where some but not all of them are, so may the value.
    """
    if not isinstance(score, Score):
        raise RewardError(f"the reward returned {type(score).__name__} instead of a Score")
    if not isinstance(score.value, numbers.Real) or not (
        math.isfinite(score.value) or (math.isnan(score.value) and _failed_in_part(score.parts))
    ):
        raise RewardError(f"the reward is not finite: {score}")
    try:
        well_formed = isinstance(score.text, str) and all(
            isinstance(name, str) and isinstance(value, numbers.Real) for name, value in score.parts
        )
        well_formed = well_formed and len(score.boxes) in (0, len(score.frames))
        well_formed = well_formed and all(len(box) == 4 for found in score.boxes for box in found)
    except (TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise RewardError(f"the reward returned a malformed Score: {str(score)[:200]}")


def _failed_in_part(parts: Sequence) -> bool:
    """Return whether some but not all of the parts are nan."""
    try:
        failed = [math.isnan(value) for _, value in parts]
    except (TypeError, ValueError):
        return False
    return any(failed) and not all(failed)


def check_frames(frames: np.ndarray) -> None:
    """Raise `ValueError` unless `frames` is a video as `Reward.score` takes it."""
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        kind = getattr(frames, "dtype", type(frames).__name__)
        raise ValueError(
            f"frames must be a uint8 numpy array, got {kind}; "
            f"convert decoded video x in [-1, 1] with ((x + 1) * 127.5).round().clip(0, 255)"
        )
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames must be [T, H, W, 3] with no empty axis, got {list(frames.shape)}; "
            f"an image is a video with T = 1"
        )
