"""The number of frames of a run's videos, by epoch in training, and in evaluations."""

import itertools
from collections.abc import Sequence

from wan_jax.errors import UserError

Schedule = Sequence[tuple[int, int]]  # (first epoch, frames), by epoch


def check(recipe) -> None:
    """Raises `UserError` where `sample.frame_schedule` is invalid, or `eval.frames` is not set although
    there is a schedule.

    recipe: a `grpo.settings.schema.Recipe`, or a ConfigDict with the same keys.
    """
    schedule = recipe.sample.frame_schedule
    pairs = [entry for entry in schedule if len(entry) == 2]
    whole = len(pairs) == len(schedule) and all(type(x) is int for entry in pairs for x in entry)
    epochs = [1, *(entry[0] for entry in pairs)]
    if (
        not whole
        or any(a >= b for a, b in itertools.pairwise(epochs))
        or any(entry[1] < 1 for entry in pairs)
    ):
        raise UserError(
            f"config.sample.frame_schedule={tuple(schedule)}: give ((epoch, frames), ...) in whole "
            "numbers, with epochs that rise from 2 on; until the first of them videos have "
            f"sample.frames={recipe.sample.frames}"
        )
    if schedule and not recipe.eval.frames:
        raise UserError(
            "config.eval.frames=0 would be another length in every part of sample.frame_schedule; "
            "set the length by which the run is judged"
        )


def at(epoch: int, frames: int, schedule: Schedule) -> int:
    """Return the number of frames of an epoch's videos. frames: before the schedule begins."""
    return [frames, *(length for first, length in schedule if first <= epoch)][-1]


def evaluated(frames: int, eval_frames: int, more_frames: Sequence[int]) -> tuple[int, ...]:
    """Return all numbers of frames that evaluations have, each once. The run is judged by the first.

    frames, eval_frames, more_frames: sample.frames, eval.frames and eval.more_frames.
    """
    return tuple(dict.fromkeys((eval_frames or frames, *more_frames)))
