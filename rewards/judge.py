"""A vision model as a judge, behind an OpenAI-compatible endpoint such as vLLM's or SGLang's:
POST {url}/v1/chat/completions.

There are two uses. `Transcriber` is an OCR engine: it asks for the text on a frame, and `OCRReward`
scores the transcript by the same rules as any other engine's. `JudgeReward` shows the model all
chosen frames at once and asks one question about the video; its value in [0, 1] is the answer: yes
or no, 0 to 10, or the letters that are missing, added and wrong. `rewards.learned.question` asks any
other question.

    judge = VisionEndpoint(["http://gpu1:8000"], model="Qwen/Qwen2.5-VL-7B-Instruct")
    reward = OCRReward(rule="spelling", engine=Transcriber(judge), max_frames=5)
    reward = JudgeReward(judge, "rate")

All three are thread-safe: build one and share it, RewardPool(lambda: reward, workers=16,
mode="thread"). The temperature is 0, but a server that batches requests may still give different
answers to equal requests; OCR engines do not.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from rewards.base import RewardError, Score, check_frames
from rewards.ocr.engines import TextLine
from rewards.ocr.rules import even_frames
from rewards.ocr.text_match import normalise
from rewards.remote.endpoints import Endpoints
from rewards.remote.wire import printable

MAX_TOKENS = 1024  # of an answer, with the thoughts of reasoning models
MAX_CHARACTERS = 64 * MAX_TOKENS  # of an answer; tokens of all tokenizers are shorter on average
TRANSCRIBE = (
    "Transcribe all text that is visible in this picture, exactly as it is written: keep spelling "
    "mistakes, case and punctuation, and do not guess letters that cannot be read. One line of "
    "text per line, from top to bottom. Answer with the text only; if there is no text, answer NO "
    "TEXT."
)
_NO_TEXT = re.compile(r"\W*no (?:visible |readable )?text\W*", re.IGNORECASE)
_THINKING = re.compile(r"^.*</think>", re.DOTALL)
_FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.,-])\d+(?:\.\d+)?(?![\w%])")


class VisionEndpoint:
    """One or more servers of the same vision model.

    urls: of the servers, with or without /v1 at the end. model: the model's name on the servers; ""
    takes the only one that they serve. setting: gives that name, for messages. options: of
    `Endpoints`: token, timeout, retries, patience, first_pause, seed. Raises `ValueError` or
    `RewardError` as `Endpoints` does.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str = "",
        *,
        setting: str = "config.reward.judge_model",
        **options,
    ):
        self.model, self._setting = model, setting
        roots = (
            urls if isinstance(urls, str) else [url.rstrip("/").removesuffix("/v1") for url in urls]
        )
        self._endpoints = Endpoints(roots, "/v1/models", self._check, **options)

    def ask(self, question: str, frames: np.ndarray) -> str:
        """Return the model's answer to `question` about the frames uint8 [T, H, W, 3] RGB, without
        its thoughts. Raises `RewardError` when there is no complete answer.
        """
        content = [{"type": "image_url", "image_url": {"url": png_url(frame)}} for frame in frames]
        content.append({"type": "text", "text": question})
        body = json.dumps(
            {
                "model": self.model,
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
                "messages": [{"role": "user", "content": content}],
            }
        ).encode()
        answer = self._endpoints.post("/v1/chat/completions", [body], "application/json")
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            if (
                isinstance(text, str)
                and len(text) <= MAX_CHARACTERS
                and choice.get("finish_reason") != "length"
            ):
                return _THINKING.sub("", text).strip()
        except (KeyError, IndexError, TypeError, AttributeError):
            pass
        raise RewardError(
            f"the judge gave no complete answer of at most {MAX_TOKENS} tokens: {str(answer)[:300]}"
        )

    def close(self) -> None:
        """End the waiting of all threads, each with a `RewardError`."""
        self._endpoints.close()

    def _check(self, models: Any) -> None:
        """Raise `RewardError` unless the server's list of models has the model."""
        try:
            names = [str(model["id"]) for model in models["data"]]
        except (KeyError, TypeError):
            raise RewardError(
                "is not an OpenAI-compatible endpoint: /v1/models names no models"
            ) from None
        if not self.model and len(names) == 1:
            self.model = names[0]
        if self.model not in names:
            served = printable(", ".join(names)) or "no model"
            raise RewardError(
                f"serves {served}, not {self.model!r}: give the name of one as {self._setting}"
            )


def png_url(frame: np.ndarray) -> str:
    """Encode a frame uint8 [H, W, 3] RGB as a data URL; as PNG, which keeps every pixel."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- Transcripts ----------------------------------------------------------------------------------


class Transcriber:
    """An OCR engine, for `OCRReward`, that asks a judge. A transcript has neither confidences nor
    boxes: the confidence of each line is 1, and its box a horizontal strip of the frame.
    """

    def __init__(self, judge: VisionEndpoint, question: str = TRANSCRIBE):
        self.judge, self._question = judge, question

    def __call__(self, rgb: np.ndarray) -> list[TextLine]:
        """Return the lines on a frame uint8 [H, W, 3] RGB, from top to bottom. Raises `RewardError`
        when no judge answers.
        """
        texts = parse_transcript(self.judge.ask(self._question, rgb[None]))
        height, width = rgb.shape[:2]
        edges = np.linspace(0, height, len(texts) + 1).tolist()
        return [
            TextLine(
                text, 1.0, ((0.0, top), (float(width), top), (float(width), bottom), (0.0, bottom))
            )
            for text, top, bottom in zip(texts, edges, edges[1:])
        ]

    def close(self) -> None:
        """Close the judge's endpoint."""
        self.judge.close()


def parse_transcript(answer: str) -> list[str]:
    """Return the lines of a transcript, without the code fence or the quotes that models often put
    around it.
    """
    if fenced := _FENCE.search(answer):
        answer = fenced[1]
    answer = answer.strip()
    for opening, closing in ('""', "“”", "``"):
        if (
            len(answer) > 1
            and answer[0] == opening
            and answer[-1] == closing
            and opening not in answer[1:-1]
        ):
            answer = answer[1:-1]
    if _NO_TEXT.fullmatch(answer):
        return []
    return [line.strip() for line in answer.splitlines() if line.strip()]


# --- Questions about a video ----------------------------------------------------------------------


def parse_yes_no(answer: str, targets: Sequence[str] = ()) -> float:
    """Return 1 for yes and 0 for no, whichever word comes first. Raises `RewardError` for neither."""
    if match := re.search(r"\b(yes|no)\b", answer, re.IGNORECASE):
        return float(match[1].lower() == "yes")
    raise RewardError(f"the judge answered neither yes nor no: {answer[:200]!r}")


def parse_rating(answer: str, targets: Sequence[str] = ()) -> float:
    """Return the last number of an answer (in "8/10" the 8), divided by 10. Raises `RewardError`
    unless it is in [0, 10].
    """
    numbers = [
        float(number) for number in _NUMBER.findall(re.sub(r"\s*(?:/|out of)\s*10\b", "", answer))
    ]
    if numbers and 0 <= numbers[-1] <= 10:
        return numbers[-1] / 10
    raise RewardError(f"the judge gave no number from 0 to 10: {answer[:200]!r}")


def parse_letters(answer: str, targets: Sequence[str]) -> float:
    """Return 1 - (missing + extra + wrong) / N for the last "missing=A extra=B wrong=C" of an answer,
    at least 0. N is the number of letters of the targets. Raises `RewardError` without one.

    The shape of TextPecker's score of structure, which is 1 - f (number of bad letters) / N.
    """
    counts = _LETTERS.findall(answer)
    if not counts:
        raise RewardError(f"the judge counted no letters: {answer[:200]!r}")
    letters = sum(len(normalise(target)) for target in targets)
    return max(0.0, 1.0 - sum(map(int, counts[-1])) / max(1, letters))


_COUNT = r"[\s:=*]*(\d+)"
_LETTERS = re.compile(
    rf"missing{_COUNT}[\s,;*]*extra{_COUNT}[\s,;*]*(?:and\s+)?wrong{_COUNT}", re.IGNORECASE
)
_ONE_VIDEO = "These pictures are frames of one video, in order. "
# {name: (question, function from the answer and the targets to a value in [0, 1])}
QUESTIONS: dict[str, tuple[str, Callable[[str, Sequence[str]], float]]] = {
    "yes_no": (
        _ONE_VIDEO
        + "Does the video show the text {targets}, spelled exactly so and legible throughout? "
        "Answer yes or no only.",
        parse_yes_no,
    ),
    "rate": (
        _ONE_VIDEO
        + "It was to show the text {targets}. Rate from 0 (no such text) to 10 (spelled exactly "
        "so, legible and steady throughout) how well it does. Answer with the number only.",
        parse_rating,
    ),
    "letters": (
        _ONE_VIDEO
        + "It was to show the text {targets}. Look at the shape of every letter in the frame where "
        "the text is worst, and do not read it as the word that was meant. Count the letters that "
        "are missing, those that are extra, and those that are wrong: another letter, or a shape "
        "with strokes missing, added or merged. End with one line: missing=A extra=B wrong=C",
        parse_letters,
    ),
}


class JudgeReward:
    """One question about a whole video as a reward. The record is the tuple of targets.

    question: a key of `QUESTIONS`. template: another wording of the question; {targets} stands for
    the quoted targets. max_frames: frames that are shown, evenly spread, with the first and the
    last.
    """

    def __init__(
        self,
        judge: VisionEndpoint,
        question: str = "rate",
        template: str | None = None,
        max_frames: int = 9,
    ):
        if question not in QUESTIONS:
            raise ValueError(
                f"unknown question {question!r} to the judge: choose one of {', '.join(QUESTIONS)}"
            )
        if max_frames < 2:
            raise ValueError(
                f"max_frames={max_frames}: must be 2 or more, as first and last are always shown"
            )
        wording, self._parse = QUESTIONS[question]
        self.judge, self._template, self._max_frames = judge, template or wording, max_frames

    def score(self, frames: np.ndarray, targets: Sequence[str]) -> Score:
        """Score a video uint8 [T, H, W, 3] RGB. targets: the texts that it should show. The score's
        text is the judge's answer. Raises `RewardError` without a usable answer.
        """
        check_frames(frames)
        indices = even_frames(len(frames), self._max_frames)
        quoted = " and ".join(json.dumps(target, ensure_ascii=False) for target in targets)
        answer = self.judge.ask(self._template.replace("{targets}", quoted), frames[list(indices)])
        return Score(self._parse(answer, targets), answer, indices)

    def close(self) -> None:
        """Close the judge's endpoint."""
        self.judge.close()
