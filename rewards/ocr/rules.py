"""Rules for spelling: is the text in the video the text that the prompt asked for?

A rule chooses the frames to read, gives each frame a value from the lines that were read on it, and
combines the values.

| rule              | frames read            | value of a frame                          | video     |
|-------------------|------------------------|-------------------------------------------|-----------|
| `spelling`        | even, first, last      | similarity; other text costs up to half   | mean      |
| `confident`       | even, first, last      | the same, letters count by confidence     | mean      |
| `flow_grpo_image` | the only one           | 1 if contained, else clipped distance     | the frame |
| `flow_grpo_video` | every fourth           | clipped distance; other text costs all    | mean > 0  |

Train with `spelling`, or with `confident`, which also pays for the shape of letters that are right
but hard to read. The other two are Flow-GRPO's own rules with their weaknesses, for
comparison. Text that flashes up in one frame of nine earns full marks under `flow_grpo_video`. A
legible target in a scene with other signs earns 1.0 under `flow_grpo_image` but 0.3 under
`flow_grpo_video`. Both use only the first target.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rewards.base import Score, check_frames
from rewards.boxes import around
from rewards.ocr.characters import readable_characters
from rewards.ocr.engines import Engine, TextLine, make_engine
from rewards.ocr.text_match import (
    Window,
    best_window,
    confident_similarity,
    edit_distance,
    flow_grpo_normalise,
    normalise,
    normalised_confidences,
    similarity,
)

# what a perfectly written target still earns in a frame full of other text
CREDIT_AMONG_OTHER_TEXT = 0.5


# --- The default rule -----------------------------------------------------------------------------


def spelling(lines: Sequence[TextLine], targets: Sequence[str]) -> float:
    """Return the value in [0, 1] of one frame: 1 if and only if it shows the targets and nothing
    else, 0 if it shows no text.

    For one target t and the whole text R of the frame (lines joined in reading order, so that a
    target may be broken over lines), with sim(a, b) = 1 - Levenshtein(a, b) / max(|a|, |b|):

        alone  = sim(t, R)                              does the frame show t and nothing else?
        within = max over parts w of R of sim(t, w)     how well is t written anywhere in the frame?
        value  = alone + 1/2 max(0, (2 within - 1) - alone)

    - Every correct letter counts, also in a word that is mostly wrong: `alone` is dense.
    - Additional text costs, but at most half. A perfect target with s additional characters has
      alone = |t| / (|t| + s), so its value is 1 - s / (2 (|t| + s)). A second copy of the target is
      additional text: 0.75.
    - A part earns something only if it is more right than wrong (within > 1/2). Otherwise it would
      pay to fill the frame with letters, because some part of them always resembles the target.
      Measured, mean over five targets: 5 random letters earn 0.12, 20 earn 0.15, 40 earn 0.11, 200
      earn 0.07.

    Several targets: each gets the part that is most similar to it, the best pair first, and no part
    is used twice. The R of a target is the text without the parts of the others. The value is the
    mean over the targets. Raises `ValueError` for blank targets.
    """
    text = "".join(normalise(line.text) for line in lines)
    return _spelling(
        lines, targets, lambda goal, places: similarity(goal, "".join(text[at] for at in places))
    )


def confident_spelling(lines: Sequence[TextLine], targets: Sequence[str]) -> float:
    """Return the value of one frame by `spelling`, with `text_match.confident_similarity` instead of
    the similarity: a right letter counts as much as the reader is sure of it.

    The confidences are those of the characters, `TextLine.confidences`, or of the line where an
    engine has no others. 1 only for the targets and nothing else, read without doubt.
    """
    text = "".join(normalise(line.text) for line in lines)
    sure = [
        confidence
        for line in lines
        for confidence in normalised_confidences(line.text, line.confidences, line.confidence)
    ]
    return _spelling(
        lines,
        targets,
        lambda goal, places: confident_similarity(
            goal, "".join(text[at] for at in places), [sure[at] for at in places]
        ),
    )


def _spelling(
    lines: Sequence[TextLine],
    targets: Sequence[str],
    compare: Callable[[str, Sequence[int]], float],
) -> float:
    """Return the value of one frame as `spelling` describes it. compare: the similarity of a
    normalised target and the characters at some places of the joined normalised lines.
    """
    goals = _normalised(targets)
    line_texts = [normalise(line.text) for line in lines]
    length = sum(map(len, line_texts))
    windows = _assign(goals, line_texts)
    values = []
    for i, (goal, own) in enumerate(zip(goals, windows)):
        taken = {
            at
            for j, window in enumerate(windows)
            if window and j != i
            for at in range(window.start, window.end)
        }
        alone = compare(goal, [at for at in range(length) if at not in taken])
        within = compare(goal, range(own.start, own.end)) if own else 0.0
        values.append(alone + CREDIT_AMONG_OTHER_TEXT * max(0.0, (2 * within - 1) - alone))
    return float(np.mean(values))


def make_readable_check(engine: str) -> Callable[[Sequence[str]], None] | None:
    """Return a function that raises `ValueError` for targets with characters that the engine
    cannot read; None where the engine's characters are not known.

    Differences that the comparison ignores, such as case and width, do not matter.
    """
    characters = readable_characters(engine)
    if characters is None:
        return None
    known = _normalised_characters(characters)

    def check(targets: Sequence[str]) -> None:
        for target in targets:
            unknown = [char for char in dict.fromkeys(target) if not set(normalise(char)) <= known]
            # checked again as a whole: a letter and its accent may form one known character
            if unknown and not set(normalise(target)) <= known:
                raise ValueError(
                    f"the OCR engine {engine} cannot read {', '.join(unknown)} of {target!r}"
                )

    return check


@functools.lru_cache(maxsize=4)
def _normalised_characters(characters: frozenset[str]) -> frozenset[str]:
    """Return the characters of the normalised characters. Kept, because an engine has many thousands
    and every file of prompts asks.
    """
    return frozenset("".join(map(normalise, characters)))


def _normalised(targets: Sequence[str]) -> list[str]:
    """Normalise the targets. Raises `ValueError` unless they are one or more texts, none blank."""
    if isinstance(targets, str):
        raise ValueError(
            f"targets must be a sequence of strings, got one string: pass ({targets!r},)"
        )
    goals = [normalise(target) for target in targets]
    if not goals or "" in goals:
        raise ValueError(
            f"targets must be one or more texts that are not blank, got {list(targets)!r}; "
            f"parse_targets(prompt) checks this when the prompts are loaded"
        )
    return goals


def _assign(goals: list[str], lines: list[str]) -> list[Window | None]:
    """Assign each goal a part of the joined lines of its own; None if nothing is left for it.

    First, a goal that equals a whole line takes that line. (Otherwise, for the goals SALE and SALES
    on the lines SALE and SALES, the goal SALES could take "SALE" and the next S.) Then the best pair
    of a goal and a free part is taken, again and again.
    """
    text = "".join(lines)
    windows: list[Window | None] = [None] * len(goals)
    free: list[tuple[int, int]] = []  # spans (start, end) of the text that no goal has taken
    position = 0
    for line in lines:
        end = position + len(line)
        whole = next(
            (i for i, goal in enumerate(goals) if goal == line and windows[i] is None), None
        )
        if whole is not None:
            windows[whole] = Window(position, end, 1.0)
        elif free and free[-1][1] == position:
            free[-1] = (free[-1][0], end)
        else:
            free.append((position, end))
        position = end
    while free and None in windows:
        # of equally similar pairs: the longest goal, then the first goal, then the first span
        candidates = [
            (window.similarity, len(goals[i]), -i, -start, (start, end), window)
            for i in range(len(goals))
            if windows[i] is None
            for start, end in free
            for window in [best_window(goals[i], text[start:end])]
        ]
        value, _, minus_i, _, (start, end), window = max(candidates, key=lambda item: item[:4])
        if value == 0:
            break
        taken = windows[-minus_i] = Window(start + window.start, start + window.end, value)
        free.remove((start, end))
        free += [span for span in ((start, taken.start), (taken.end, end)) if span[0] < span[1]]
    return windows


# --- Flow-GRPO's rules ----------------------------------------------------------------------------


def flow_grpo_image(lines: Sequence[TextLine], targets: Sequence[str]) -> float:
    """Return the value of an image by Flow-GRPO's `ocr` reward: 1 if the text contains the target,
    else 1 - min(distance, |target|) / |target|.
    """
    text, target = _flow_grpo_texts(lines, targets)
    return 1.0 if target in text else _clipped(text, target)


def flow_grpo_video_frame(lines: Sequence[TextLine], targets: Sequence[str]) -> float:
    """Return the value of one frame by Flow-GRPO's `video_ocr` reward: 1 - min(distance, |target|)
    / |target|, also where the text contains the target.
    """
    return _clipped(*_flow_grpo_texts(lines, targets))


def flow_grpo_video_mean(frame_values: Sequence[float]) -> float:
    """Combine frame values as Flow-GRPO's `video_ocr` reward: the mean of those above 0; 0 if there
    are none.
    """
    positive = [value for value in frame_values if value > 0]
    return float(np.mean(positive)) if positive else 0.0


def _flow_grpo_texts(lines: Sequence[TextLine], targets: Sequence[str]) -> tuple[str, str]:
    """Return the joined lines and the first target, normalised as in Flow-GRPO."""
    _normalised(targets)  # raises for blank targets, with which Flow-GRPO divides by zero
    text = "".join(line.text for line in lines if line.confidence > 0)
    return flow_grpo_normalise(text), flow_grpo_normalise(targets[0])


def _clipped(text: str, target: str) -> float:
    return 1.0 - min(edit_distance(text, target), len(target)) / len(target)


# --- Choice of frames -----------------------------------------------------------------------------


def even_frames(frames: int, max_frames: int) -> tuple[int, ...]:
    """Return the indices of all frames, or of `max_frames` evenly spread ones that include the
    first and the last.
    """
    if frames <= max_frames:
        return tuple(range(frames))
    return tuple(int(i) for i in np.linspace(0, frames - 1, max_frames).round())


def every_fourth_frame(frames: int, max_frames: int) -> tuple[int, ...]:
    """Return the indices that Flow-GRPO chooses in videos, whatever `max_frames` is."""
    return tuple(range(0, frames, 4))


def only_frame(frames: int, max_frames: int) -> tuple[int, ...]:
    """Return the index of an image. Raises `ValueError` for a video of several frames."""
    if frames != 1:
        raise ValueError(
            f"rule 'flow_grpo_image' scores images, got a video of {frames} frames: "
            f"use 'spelling' or 'flow_grpo_video'"
        )
    return (0,)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a video is judged from the text in it; see the table at the top of this file."""

    choose_frames: Callable[[int, int], tuple[int, ...]]  # (T, max_frames) -> indices
    frame_value: Callable[[Sequence[TextLine], Sequence[str]], float]  # (lines, targets) -> value
    combine: Callable[[Sequence[float]], float]  # frame values -> value of the video
    characters: bool = False  # whether the engine has to give the confidences of characters


def _mean(frame_values: Sequence[float]) -> float:
    return float(np.mean(frame_values))


RULES = {
    "spelling": Rule(even_frames, spelling, _mean),
    "confident": Rule(even_frames, confident_spelling, _mean, characters=True),
    "flow_grpo_image": Rule(only_frame, flow_grpo_image, _mean),
    "flow_grpo_video": Rule(every_fourth_frame, flow_grpo_video_frame, flow_grpo_video_mean),
}


# --- The reward -----------------------------------------------------------------------------------


class OCRReward:
    """Reads the text in a video and scores its spelling. The record is the tuple of targets.

    rule: a key of `RULES`. engine: a name for `make_engine`, or an engine.
    engine_options: options for `make_engine`.
    max_frames: largest number of frames that are read; 17 means every second of 33 frames and every
        fifth of 81.
    boxes: whether scores have the boxes of the text (`Score.boxes`).
    """

    def __init__(
        self,
        rule: str = "spelling",
        engine: str | Engine = "rapidocr",
        engine_options: dict[str, Any] | None = None,
        max_frames: int = 17,
        boxes: bool = False,
    ):
        if rule not in RULES:
            raise ValueError(f"unknown OCR rule {rule!r}: choose one of {', '.join(sorted(RULES))}")
        if max_frames < 2:
            raise ValueError(
                f"max_frames={max_frames}: must be 2 or more, as first and last are always read"
            )
        self.rule, self.max_frames, self.boxes = RULES[rule], max_frames, boxes
        options = dict(engine_options or {})
        if self.rule.characters:
            options.setdefault("characters", True)
        self.engine = make_engine(engine, **options) if isinstance(engine, str) else engine

    def close(self) -> None:
        """Close an engine that waits for another machine, such as a judge; ends the waiting."""
        getattr(self.engine, "close", lambda: None)()

    def score(self, frames: np.ndarray, targets: Sequence[str]) -> Score:
        """Score a video uint8 [T, H, W, 3] RGB; an image has T = 1. targets: as
        `parse_targets(prompt)` returns them. The score's text lists the texts of the frames, each
        change once.
        """
        check_frames(frames)
        indices = self.rule.choose_frames(len(frames), self.max_frames)
        frame_lines = [self.engine(frames[i]) for i in indices]
        values = tuple(self.rule.frame_value(lines, targets) for lines in frame_lines)
        texts = tuple(" ".join(line.text for line in lines) for lines in frame_lines)
        changes = [
            text for at, text in enumerate(texts) if text and text != (texts[at - 1] if at else "")
        ]
        score = Score(self.rule.combine(values), " | ".join(changes), indices, values, texts)
        if not self.boxes:
            return score
        size = frames.shape[1:3]
        boxes = tuple(tuple(around(line.box, *size) for line in lines) for lines in frame_lines)
        return dataclasses.replace(score, boxes=boxes)
