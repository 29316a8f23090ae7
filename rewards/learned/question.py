"""Any question to a vision-language model as a reward, and the pattern that reads its answer.

    python -m rewards.server --name=style --workers=4 --reward=rewards.learned.question:Question \\
      --options='{"urls": ["http://gpu1:8000"], "pattern": "Score: *(\\\\d+)",
        "question": "These are frames of a video. Is it an oil painting? End with Score: N, 0 to 10."}'

The model is behind an OpenAI-compatible endpoint (`urls`), or a folder or Hugging Face repository
that this process loads (`path`). An answer that the pattern does not match is a failed score, which
is tried again, masked and counted; it is never 0.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewards.base import PromptRecord, RewardError, Score, check_frames
from rewards.judge import VisionEndpoint
from rewards.ocr.rules import even_frames

_FIELD = re.compile(r"\{(\w+)\}")


class Question:
    """A number that is read from a model's answer about a video. The record must be a
    `PromptRecord`.

    question: what is asked after the frames; {prompt}, {targets} (the quoted texts) and {NAME} of the
        prompt's metadata stand for those. Other braces stay.
    pattern: a regular expression; its last match in the answer counts. Its first group is the
        value; named groups, (?P<look>...), are parts, of which the value is the sum.
    values: {text: value} of the groups, in any case. None: the group is a number.
    bounds: smallest and largest number of the scale, which become 0 and 1; a number outside has
        failed.
    max_frames: frames that are shown, evenly spread, with the first and the last.
    urls, model: as for `rewards.judge.VisionEndpoint`, with the token in the environment variable
        `token_env` and `options` such as timeout. path: the model's folder or repository instead,
        with `options` of `rewards.learned.local_model.LocalModel`.

    Raises `RewardError` for settings that cannot work.
    """

    needs_prompt = True

    def __init__(
        self,
        question: str,
        pattern: str,
        *,
        values: Mapping[str, float] | None = None,
        bounds: Sequence[float] = (0, 10),
        max_frames: int = 9,
        urls: Sequence[str] = (),
        model: str = "",
        token_env: str = "REWARD_TOKEN",
        path: str = "",
        **options,
    ):
        if bool(urls) == bool(path):
            raise RewardError(
                f"Question: urls={list(urls)} and path={path!r}: give the URLs of an endpoint, or "
                "the folder of a model"
            )
        if max_frames < 2:
            raise RewardError(f"Question: max_frames={max_frames} must be 2 or more")
        self.reader = AnswerReader(pattern, values, bounds)
        self.question, self.max_frames = question, max_frames
        if urls:
            token = os.environ.get(token_env, "").strip()
            setting = "the option model"
            self.judge: Any = VisionEndpoint(urls, model, setting=setting, token=token, **options)
        else:
            from rewards.learned.local_model import LocalModel

            self.judge = LocalModel(path, **options)

    def score(self, video: np.ndarray, request: Any) -> Score:
        """Score a video uint8 [T, H, W, 3] RGB; the score's text is the answer. Raises
        `RewardError` without a usable answer.
        """
        check_frames(video)
        if not isinstance(request, PromptRecord):
            raise RewardError(f"Question needs the prompt, got {request!r}")
        indices = even_frames(len(video), self.max_frames)
        answer = self.judge.ask(fill(self.question, request), video[list(indices)])
        parts = self.reader(answer)
        value = math.fsum(parts.values())
        named = tuple(parts.items()) if "" not in parts else ()
        return Score(value, answer, indices, parts=named)

    def close(self) -> None:
        """Close the endpoint."""
        self.judge.close()


def fill(question: str, request: PromptRecord) -> str:
    """Return the question with its places filled; what is filled in is not searched again. Raises
    `RewardError` where the video's prompt has no such metadata.
    """
    targets = " and ".join(json.dumps(t, ensure_ascii=False) for t in request.targets)
    known = {**request.metadata, "prompt": request.prompt, "targets": targets}

    def place(match: re.Match) -> str:
        if match[1] not in known:
            raise RewardError(
                f"the question asks for {match[0]}, which this prompt does not have: {request.prompt!r}"
            )
        return str(known[match[1]])

    return _FIELD.sub(place, question)


class AnswerReader:
    """Reads a number, or parts by name, from a model's answer. Arguments and errors: `Question`."""

    def __init__(self, pattern: str, values: Mapping[str, float] | None, bounds: Sequence[float]):
        try:
            self.pattern = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise RewardError(f"Question: pattern={pattern!r} is malformed: {error}") from error
        if not self.pattern.groups:
            raise RewardError(
                f"Question: pattern={pattern!r} has no group: put the part that is the value into "
                "parentheses"
            )
        self.names = tuple(self.pattern.groupindex)
        try:
            self.values = {k.casefold(): float(v) for k, v in values.items()} if values else None
            self.low, self.high = map(float, bounds)
        except (AttributeError, TypeError, ValueError):
            raise RewardError(
                f"Question: values={values!r} must be numbers by text, and bounds={bounds!r} two "
                "numbers"
            ) from None
        numbers = [self.low, self.high, *(self.values or {}).values()]
        if not self.low < self.high or not all(map(math.isfinite, numbers)):
            raise RewardError(
                f"Question: bounds={list(bounds)} must be a smaller and a larger number, and the "
                "values finite"
            )

    def __call__(self, answer: str) -> dict[str, float]:
        """Return the parts by name; "" is the name of the only one of a pattern without names.
        Raises `RewardError`.
        """
        match = None
        for match in self.pattern.finditer(answer):  # noqa: B007  (the last one)
            pass
        if match is None:
            raise RewardError(
                f"the answer does not match {self.pattern.pattern!r}: {answer[-200:]!r}"
            )
        if self.names:
            return {name: self._value(match[name], answer) for name in self.names}
        return {"": self._value(match[1], answer)}

    def _value(self, text: str | None, answer: str) -> float:
        text = (text or "").strip()
        if self.values is not None:
            if text.casefold() not in self.values:
                raise RewardError(
                    f"{text!r} is none of {', '.join(self.values)} in the answer {answer[-200:]!r}"
                )
            return self.values[text.casefold()]
        try:
            number = float(text)
        except ValueError:
            raise RewardError(f"{text!r} is no number in the answer {answer[-200:]!r}") from None
        if not self.low <= number <= self.high:
            raise RewardError(
                f"{text} is not from {self.low:g} to {self.high:g} in the answer {answer[-200:]!r}"
            )
        return (number - self.low) / (self.high - self.low)
