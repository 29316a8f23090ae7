"""How many frames a run's videos have: in training by epoch, and in its evaluations."""

import itertools
from collections.abc import Sequence

Schedule = Sequence[tuple[int, int]]  # (first epoch, frames), by epoch


def check(frames: int, schedule: Schedule, eval_frames: int, more_frames: Sequence[int]) -> None:
    """Raises ValueError on a schedule that is none, and on lengths of evaluation that do not go
    with it.
    """
    pairs = [entry for entry in schedule if isinstance(entry, (tuple, list)) and len(entry) == 2]
    whole = len(pairs) == len(schedule) and all(type(x) is int for entry in pairs for x in entry)
    epochs = [1, *(entry[0] for entry in pairs)]
    if (
        not whole
        or any(a >= b for a, b in itertools.pairwise(epochs))
        or any(entry[1] < 1 for entry in pairs)
    ):
        raise ValueError(
            f"sample.frame_schedule={tuple(schedule)}: give ((epoch, frames), ...) with whole "
            "numbers, the epochs rising from 2 on; until the first one there are "
            f"sample.frames={frames}"
        )
    if schedule and not eval_frames:
        raise ValueError(
            "eval.frames=0 would be another length in every part of sample.frame_schedule; set "
            "the length by which the run is judged"
        )
    if any(type(f) is not int or f < 1 for f in more_frames):
        raise ValueError(
            f"eval.more_frames={tuple(more_frames)} must be whole numbers of at least 1"
        )


def at(epoch: int, frames: int, schedule: Schedule) -> int:
    """Of the videos of an epoch."""
    return [frames, *(length for first, length in schedule if first <= epoch)][-1]


def trained(frames: int, schedule: Schedule) -> tuple[int, ...]:
    """All that epochs have, each once."""
    return tuple(dict.fromkeys((frames, *(length for _, length in schedule))))


def evaluated(frames: int, eval_frames: int, more_frames: Sequence[int]) -> tuple[int, ...]:
    """Of the evaluations, each once; by the first one the run is judged."""
    return tuple(dict.fromkeys((eval_frames or frames, *more_frames)))
