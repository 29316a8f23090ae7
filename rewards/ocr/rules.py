"""Rewards for spelling: is the text in the video the text that the prompt asked for?

A rule picks the frames to read, gives each a value from the lines that were read on it, and
combines the values.

| rule              | frames read             | value of a frame                        | of the
                    video    |
|-------------------|-------------------------|-----------------------------------------|-----------------|
| `spelling`        | evenly, first and last  | similarity, other text costs up to half | mean
                    |
| `flow_grpo_image` | the only one            | 1 if contained, else clipped distance   | of the
                                              frame    |
| `flow_grpo_video` | every fourth            | clipped distance, other text costs all  | mean of
                                              the > 0 |

`spelling` is what to train with. The other two are Flow-GRPO's own rules, quirks included, for
comparison: text that flashes on one frame in nine earns full marks under `flow_grpo_video`, and a
legible target in a scene with other signs earns 1.0 under `flow_grpo_image` but 0.3 under
`flow_grpo_video`; both know one target only, the first.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rewards.base import Score, check_frames
from rewards.ocr.engines import Engine, TextLine, make_engine, readable_characters
from rewards.ocr.text_match import (
    Normaliser,
    Window,
    best_window,
    edit_distance,
    flow_grpo_normalise,
    similarity,
)

# Credit kept by a perfectly written target in a frame full of other text.
CREDIT_AMONG_OTHER_TEXT = 0.5
_normalise = Normaliser()


# --- The default rule -----------------------------------------------------------------------------


def spelling(lines: Sequence[TextLine], targets: Sequence[str]) -> float:
    """Value in [0, 1] of one frame: 1 iff it shows the targets and nothing else, 0 if it shows no
    text.

    For one target t and the whole text R of the frame (lines joined in reading order, so that a
    target may be broken over lines), with sim(a, b) = 1 - Levenshtein(a, b) / max(|a|, |b|):

        alone  = sim(t, R)                              how much the frame says the target and
               nothing else
        within = max over parts w of R of sim(t, w)     how well the target is written somewhere on
                                                        the frame
        value  = alone + 1/2 max(0, (2 within - 1) - alone)

    - Each right letter counts, also in a word that is mostly wrong: `alone` is dense.
    - Further text costs, but at most half: a perfect target with s further characters has
      |t|/(|t|+s) as
      `alone`, hence the value 1 - s / (2 (|t| + s)). Writing the target twice is further text:
      0.75.
    - A part earns something only if it is more right than wrong (within > 1/2). Otherwise it would
      pay to
      fill the frame with letters, among which some part always resembles the target. Measured, mean
      over five targets: random letters earn .12 if there are 5, .15 if 20, .11 if 40, .07 if 200.

    Several targets: each takes the part most like it (the best pair first), no part is taken twice,
    and the R of a target is the text without the parts of the others. The value is the mean over
    targets.
    """
    goals, texts = _normalised(targets), [_normalise(line.text) for line in lines]
    text, windows = "".join(texts), _assign(goals, texts)
    values = []
    for i, goal in enumerate(goals):
        taken = {at for j, w in enumerate(windows) if w and j != i for at in range(w.start, w.end)}
        alone = similarity(goal, "".join(char for at, char in enumerate(text) if at not in taken))
        within = windows[i].similarity if windows[i] else 0.0
        values.append(alone + CREDIT_AMONG_OTHER_TEXT * max(0.0, (2 * within - 1) - alone))
    return float(np.mean(values))


def make_readable_check(engine: str) -> Callable[[Sequence[str]], None] | None:
    """Return a function that raises ValueError on targets with characters that the engine does not
    know.

    What the comparison disregards (case, width) does not matter. None where the engine's characters
    are not known.
    """
    characters = readable_characters(engine)
    if characters is None:
        return None
    known = set("".join(map(_normalise, characters)))

    def check(targets: Sequence[str]) -> None:
        for target in targets:
            unknown = [c for c in dict.fromkeys(target) if not set(_normalise(c)) <= known]
            # a letter and its accent may be one character
            if unknown and not set(_normalise(target)) <= known:
                raise ValueError(
                    f"the OCR engine {engine} cannot read {', '.join(unknown)} of {target!r}"
                )

    return check


def _normalised(targets: Sequence[str]) -> list[str]:
    if isinstance(targets, str):
        raise ValueError(
            f"targets must be a sequence of strings, got one string: pass ({targets!r},)"
        )
    goals = [_normalise(target) for target in targets]
    if not goals or "" in goals:
        raise ValueError(
            f"targets must be one or more texts that are not blank, got {list(targets)!r}; "
            f"parse_targets(prompt) checks this when the prompts are loaded"
        )
    return goals


def _assign(goals: list[str], lines: list[str]) -> list[Window | None]:
    """For each goal its own part of the joined lines; None for a goal that finds nothing left.

    A goal that is a whole line takes that line (of the goals SALE and SALES on the lines SALE,
    SALES the second must not take "SALE" and the next S). Then the best pair of a goal and a part
    is taken, again and again.
    """
    text, windows, free = "".join(lines), [None] * len(goals), []
    at = 0
    for line in lines:
        whole = next(
            (i for i, goal in enumerate(goals) if goal == line and windows[i] is None), None
        )
        if whole is not None:
            windows[whole] = Window(at, at + len(line), 1.0)
        elif free and free[-1][1] == at:
            free[-1] = (free[-1][0], at + len(line))
        else:
            free.append((at, at + len(line)))
        at += len(line)
    while free and None in windows:
        found = [
            (window.similarity, len(goals[i]), -i, -start, (start, end), window)
            for i in range(len(goals))
            if windows[i] is None
            for start, end in free
            for window in [best_window(goals[i], text[start:end])]
        ]
        value, _, minus_i, _, (start, end), window = max(found, key=lambda item: item[:4])
        if value == 0:
            break
        taken = windows[-minus_i] = Window(start + window.start, start + window.end, value)
        free.remove((start, end))
        free += [span for span in ((start, taken.start), (taken.end, end)) if span[0] < span[1]]
    return windows


# --- Flow-GRPO's rules ----------------------------------------------------------------------------


def flow_grpo_image(lines: Sequence[TextLine], targets: Sequence[str]) -> float:
    """Flow-GRPO's `ocr`: 1 if the text contains the target, else 1 - min(distance, |target|) /
    |target|.
    """
    text, target = _flow_grpo_texts(lines, targets)
    return 1.0 if target in text else _clipped(text, target)


def flow_grpo_video_frame(lines: Sequence[TextLine], targets: Sequence[str]) -> float:
    """One frame of Flow-GRPO's `video_ocr`: as the image rule, but containing the target does not
    suffice.
    """
    return _clipped(*_flow_grpo_texts(lines, targets))


def flow_grpo_video_mean(frame_values: Sequence[float]) -> float:
    """Flow-GRPO's `video_ocr` over frames: the mean of the frames that scored above 0, and 0 if
    none did.
    """
    positive = [value for value in frame_values if value > 0]
    return float(np.mean(positive)) if positive else 0.0


def _flow_grpo_texts(lines: Sequence[TextLine], targets: Sequence[str]) -> tuple[str, str]:
    _normalised(targets)  # refuses empty targets, on which Flow-GRPO divides by zero
    text = "".join(line.text for line in lines if line.confidence > 0)
    return flow_grpo_normalise(text), flow_grpo_normalise(targets[0])


def _clipped(text: str, target: str) -> float:
    return 1.0 - min(edit_distance(text, target), len(target)) / len(target)


# --- Which frames ---------------------------------------------------------------------------------


def even_frames(frames: int, max_frames: int) -> tuple[int, ...]:
    """All frames, or `max_frames` of them spread evenly, with the first and the last."""
    if frames <= max_frames:
        return tuple(range(frames))
    return tuple(int(i) for i in np.linspace(0, frames - 1, max_frames).round())


def every_fourth_frame(frames: int, max_frames: int) -> tuple[int, ...]:
    """Flow-GRPO's choice for videos, whatever `max_frames` is."""
    return tuple(range(0, frames, 4))


def only_frame(frames: int, max_frames: int) -> tuple[int, ...]:
    if frames != 1:
        raise ValueError(
            f"rule 'flow_grpo_image' scores images, got a video of {frames} frames: "
            f"use 'spelling' or 'flow_grpo_video'"
        )
    return (0,)


@dataclasses.dataclass(frozen=True)
class Rule:
    """See the table at the top of this file."""

    pick: Callable[[int, int], tuple[int, ...]]  # (T, max_frames) -> indices
    frame: Callable[[Sequence[TextLine], Sequence[str]], float]  # (lines, targets) -> value
    combine: Callable[[Sequence[float]], float]  # frame values -> value of the video


def _mean(frame_values: Sequence[float]) -> float:
    return float(np.mean(frame_values))


RULES = {
    "spelling": Rule(even_frames, spelling, _mean),
    "flow_grpo_image": Rule(only_frame, flow_grpo_image, _mean),
    "flow_grpo_video": Rule(every_fourth_frame, flow_grpo_video_frame, flow_grpo_video_mean),
}


# --- The reward -----------------------------------------------------------------------------------


class OCRReward:
    """Reads a video and scores its spelling.

    rule: a key of RULES. engine: a name for `make_engine`, or an engine. engine_options: options
    for
        `make_engine`.
    max_frames: at most this many frames are read; 17 is every second of 33 frames and every fifth
    of 81.
    """

    def __init__(
        self,
        rule: str = "spelling",
        engine: str | Engine = "rapidocr",
        engine_options: dict[str, Any] | None = None,
        max_frames: int = 17,
    ):
        if rule not in RULES:
            raise ValueError(f"unknown OCR rule {rule!r}: choose one of {', '.join(sorted(RULES))}")
        if max_frames < 2:
            raise ValueError(
                f"max_frames={max_frames}: must be 2 or more, as first and last are always read"
            )
        self.rule, self.max_frames = RULES[rule], max_frames
        self.engine = (
            make_engine(engine, **(engine_options or {})) if isinstance(engine, str) else engine
        )

    def close(self) -> None:
        """Ends the waiting of an engine that waits for others, as a judge's does."""
        getattr(self.engine, "close", lambda: None)()

    def score(self, frames: np.ndarray, targets: Sequence[str]) -> Score:
        """`frames` uint8 [T, H, W, 3] RGB (an image has T = 1); `targets` as
        `parse_targets(prompt)` returns them.
        """
        check_frames(frames)
        indices = self.rule.pick(len(frames), self.max_frames)
        lines = [self.engine(frames[i]) for i in indices]
        values = tuple(self.rule.frame(found, targets) for found in lines)
        texts = tuple(" ".join(line.text for line in found) for found in lines)
        changes = [
            text for at, text in enumerate(texts) if text and text != (texts[at - 1] if at else "")
        ]
        return Score(self.rule.combine(values), " | ".join(changes), indices, values, texts)
