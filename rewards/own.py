"""Rewards that users write: a class or a function in a module of theirs, `module:factory`.

The factory, called without arguments, returns an object with at least one of

    score(video, request)           the score of one video
    score_group(videos, request)    K scores of the K videos of one prompt, e.g. how many of the
                                    others each one beats
    score_batch(videos, requests)   B scores of B videos of any prompts, in one call; used by
                                    `python -m rewards.server --batch`

video: uint8 [T, H, W, 3] RGB, a copy; videos: a list of them. request: a `PromptRecord` with
`prompt`, `targets`, `metadata` and `fps`. A score is a number, a dict of parts by name (their sum is
then the value; a part that is nan has failed for this video) or a `rewards.base.Score`.
docs/howto/own_rewards.md has examples. The factory runs in the scoring processes, never in the trainer;
a function or an object that is given in Python (`grpo.api`) scores in the process that has it
(`adapted`).
"""

import importlib
import math
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rewards.base import RewardError, Score, check_frames

TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
METHODS = ("score", "score_group", "score_batch")


class OwnReward:
    """A user's reward as a `rewards.base.Reward`.

    name: for messages. target: 'module:factory'. folders: searched for the module before the
    packages that are installed. options: keyword arguments of the factory. Raises `RewardError`, in
    one line, when the reward cannot be built.
    """

    needs_prompt = True

    def __init__(
        self,
        name: str,
        target: str,
        folders: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ):
        self._adapt(name, build(f"reward {name}={target}", target, folders, options or {}))

    @classmethod
    def of(cls, name: str, make: Callable[[], Any]) -> "OwnReward":
        """Adapt the object that `make` returns."""
        reward = cls.__new__(cls)
        reward._adapt(name, make())
        return reward

    def _adapt(self, name: str, reward: Any) -> None:
        self.name, self._reward = name, reward
        found = [method for method in METHODS if callable(getattr(reward, method, None))]
        if not found:
            raise RewardError(
                f"reward {name}: {type(reward).__name__} has none of the methods "
                f"{', '.join(METHODS)}: write score(self, video, request)"
            )
        self.groupwise, self.batched = "score_group" in found, "score_batch" in found
        self._single = "score" in found

    def score(self, frames: np.ndarray, record: Any) -> Score:
        """Score one video. Raises `RewardError` unless the result is a score."""
        check_frames(frames)
        if self._single:
            return as_score(self._reward.score(frames.copy(), record), self.name)
        if self.groupwise:
            return self.score_group([frames], record)[0]
        return self.score_batch([frames], [record])[0]

    def score_group(self, videos: Sequence[np.ndarray], record: Any) -> list[Score]:
        """Score the K videos of one prompt. Raises `RewardError` unless there are K scores."""
        return self._several(self._reward.score_group([v.copy() for v in videos], record), videos)

    def score_batch(self, videos: Sequence[np.ndarray], records: Sequence[Any]) -> list[Score]:
        """Score B videos with their records. Raises `RewardError` unless there are B scores."""
        results = self._reward.score_batch([v.copy() for v in videos], list(records))
        return self._several(results, videos)

    def _several(self, results: Any, videos: Sequence[np.ndarray]) -> list[Score]:
        try:
            results = list(results)
        except TypeError:
            results = [results]
        if len(results) != len(videos):
            raise RewardError(
                f"reward {self.name} returned {len(results)} scores for {len(videos)} videos: "
                "return one for each"
            )
        return [as_score(result, self.name) for result in results]

    def close(self) -> None:
        """Close the user's object, where it has a `close`."""
        getattr(self._reward, "close", lambda: None)()


def adapted(name: str, reward: Any) -> OwnReward:
    """Return a reward that exists in this process as an `OwnReward`: a function (video, request) ->
    score, an object with one of `METHODS`, or the class of one. Raises `RewardError`.
    """
    if isinstance(reward, type):
        reward = reward()
    if not any(hasattr(reward, method) for method in METHODS) and callable(reward):
        reward = types.SimpleNamespace(score=reward)
    return OwnReward.of(name, lambda: reward)


def build(what: str, target: str, folders: Sequence[str], options: Mapping[str, Any]) -> Any:
    """Import `target`, call its factory and return the object. what: begins the messages of the
    `RewardError`s, which name the failing line.
    """
    module_name, _, attribute = target.partition(":")
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            places = ", ".join(folders) or "the working directory"
            raise RewardError(
                f"{what}: there is no module {module_name!r} in {places} and no installed package "
                "of that name: put the file there, or install it"
            ) from None
        raise RewardError(f"{what}: importing {module_name} failed: {_summary(error)}") from error
    factory: Any = module
    for part in attribute.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise RewardError(
            f"{what}: {getattr(module, '__file__', None) or module_name} has no class or function "
            f"{attribute!r}"
        )
    try:
        return factory(**options)
    except Exception as error:  # of the user's code
        raise RewardError(f"{what}: {attribute}() failed: {_summary(error)}") from error


def _summary(error: Exception) -> str:
    """Return an error of the user's code in one line, with the innermost line of code."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, SyntaxError):
        return text  # names its file and line
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename != __file__
    ]
    if not frames:
        return text
    return f"{text} ({os.path.relpath(frames[-1].filename)}, line {frames[-1].lineno})"


def as_score(result: Any, name: str) -> Score:
    """Return what a user's reward returned as a `Score`: a number, a dict of parts, or a `Score`.

    The value of a dict is the sum of its parts, nan where one of them is not finite; such parts are
    nan. Raises `RewardError` for anything else.
    """
    if isinstance(result, Score):
        return result
    if isinstance(result, Mapping):
        if not result or not all(
            isinstance(part, str) and _NAME.fullmatch(part) for part in result
        ):
            raise RewardError(
                f"reward {name} returned a dict with the keys {list(result)!r:.200}: name each "
                "part by letters, digits and _"
            )
        parts = {part: _number(value, f"{name}.{part}") for part, value in result.items()}
        parts = {part: v if math.isfinite(v) else math.nan for part, v in parts.items()}
        return Score(sum(parts.values()), parts=tuple(parts.items()))
    return Score(_number(result, name))


_NAME = re.compile(r"[A-Za-z_]\w*")


def _number(value: Any, name: str) -> float:
    """Return a number, also one of NumPy or PyTorch with a single element, as a float."""
    try:
        if not isinstance(value, str | bytes) and value is not None:
            return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise RewardError(
        f"reward {name} returned {type(value).__name__} {value!r:.100}: return a number, a dict of "
        "numbers by name, or a rewards.base.Score"
    )
