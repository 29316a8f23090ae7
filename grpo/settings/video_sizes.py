"""The sizes of a run's videos: by epoch in training, and by series in evaluations."""

import dataclasses
import itertools
import math
from collections.abc import Collection
from typing import Any

from grpo.settings import frame_schedule
from wan_jax.errors import UserError

SCHEDULE = "config.sample.size_schedule"
MORE = "config.eval.more_sizes"


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a video in frames and pixels, and the shift of the noise schedule that it is
    sampled with.
    """

    frames: int
    height: int
    width: int
    shift: float

    def __str__(self) -> str:
        return f"{self.frames} x {self.height} x {self.width}"

    @property
    def volume(self) -> int:
        """The pixels of the frames that have latents, to which the tokens are proportional."""
        return ((self.frames - 1) // 4 + 1) * self.height * self.width


def check(recipe) -> None:
    """Raise `UserError` where `sample.size_schedule`, `eval.more_sizes`, or the size by which a run is
    judged is invalid.

    recipe: a `grpo.settings.schema.Recipe`, or a ConfigDict with the same keys.
    """
    sample, evaluation = recipe.sample, recipe.eval
    schedule, more_sizes = tuple(sample.size_schedule), tuple(evaluation.more_sizes)
    valid = all(_numbers(entry, 3, (4,)) for entry in schedule)
    if not valid or any(
        before >= after
        for before, after in itertools.pairwise([1, *(entry[0] for entry in schedule)])
    ):
        raise UserError(
            f"{SCHEDULE}={schedule}: give ((epoch, height, width, shift), ...) with epochs that rise "
            "from 2 on and a shift above 0 for each size; until the first of them "
            f"sample.height={sample.height}, sample.width={sample.width} and "
            f"sample.shift={sample.shift} hold"
        )
    if not all(_numbers(entry, 3, (3, 4)) for entry in more_sizes):
        raise UserError(
            f"{MORE}={more_sizes}: give ((height, width, frames), ...) in whole numbers of at least 1, "
            "each with a shift above 0 as a fourth number where it differs"
        )
    names = [*map(_name, more_sizes)]
    if len(set(names)) < len(names):
        raise UserError(f"{MORE}={more_sizes} has a size twice: each has one log")
    if judged(recipe) in more(recipe).values():
        raise UserError(
            f"{MORE}={more_sizes} has the size by which the run is judged, {judged(recipe)}: that one is "
            "evaluated anyway, leave it out"
        )
    if bool(evaluation.height) != bool(evaluation.width):
        raise UserError(
            f"config.eval.height={evaluation.height} and config.eval.width={evaluation.width}: give "
            "both, or 0 for both, which is the size of training"
        )
    own_size = (evaluation.height or sample.height, evaluation.width or sample.width)
    if own_size != (sample.height, sample.width) and evaluation.shift is None:
        raise UserError(
            f"config.eval.shift=None: evaluations of {own_size[0]} x {own_size[1]} need a shift of "
            f"their own, as larger videos need a larger one; training has sample.shift={sample.shift}"
        )
    if schedule and not (evaluation.height and evaluation.shift is not None):
        raise UserError(
            f"{SCHEDULE}={schedule} leaves open by which size the run is judged: set all of eval.height, "
            f"eval.width and eval.shift, e.g. to {sample.height}, {sample.width} and {sample.shift}; now they "
            f"are {evaluation.height}, {evaluation.width} and {evaluation.shift}"
        )


def _numbers(entry: Any, whole: int, lengths: tuple[int, ...]) -> bool:
    """Return whether an entry has one of the `lengths`, `whole` whole numbers of at least 1 first, and
    after them only finite numbers above 0.
    """
    return (
        len(entry) in lengths
        and all(type(value) is int and value >= 1 for value in entry[:whole])
        and all(type(value) in (int, float) and 0 < value < math.inf for value in entry[whole:])
    )


def at(epoch: int, sample) -> Size:
    """Return the size of an epoch's videos. sample: a recipe's section, or a mapping with its keys."""
    height, width, shift = [
        (sample["height"], sample["width"], sample["shift"]),
        *(tuple(size) for first, *size in sample["size_schedule"] if first <= epoch),
    ][-1]
    frames = frame_schedule.at(epoch, sample["frames"], sample["frame_schedule"])
    return Size(frames, height, width, float(shift))


def trained(sample) -> tuple[Size, ...]:
    """Return all sizes that epochs have, each once. The argument is that of `at`."""
    changes = (entry[0] for entry in (*sample["frame_schedule"], *sample["size_schedule"]))
    return tuple(dict.fromkeys(at(epoch, sample) for epoch in (1, *sorted(changes))))


def judged(recipe) -> Size:
    """Return the size by which a run is judged. recipe: a `grpo.settings.schema.Recipe`."""
    sample, evaluation = recipe.sample, recipe.eval
    return Size(
        evaluation.frames or sample.frames,
        evaluation.height or sample.height,
        evaluation.width or sample.width,
        float(sample.shift if evaluation.shift is None else evaluation.shift),
    )


def more(recipe) -> dict[str, Size]:
    """Return the further sizes of evaluations by the name of their series, e.g. "480x832_33_frames",
    which begins with a digit: names of prompts do not. recipe: a `grpo.settings.schema.Recipe`.
    """
    usual = judged(recipe).shift
    return {
        _name(entry): Size(entry[2], entry[0], entry[1], float(entry[3] if entry[3:] else usual))
        for entry in recipe.eval.more_sizes
    }


def _name(entry) -> str:
    height, width, frames, *shift = entry
    return f"{height}x{width}_{frames}_frames" + "".join(f"_shift_{value:g}" for value in shift)


def suffix(size: Size, sizes: Collection[Size]) -> str:
    """Return the end of a name that tells a size from the other ones; "" where there is only one."""
    if len(sizes) == 1:
        return ""
    pixels = {(each.height, each.width) for each in sizes}
    shape = f"{size.frames} frames" if len(pixels) == 1 else str(size)
    alike = [each for each in sizes if str(each) == str(size)]
    return f", {shape}" + (f", shift {size.shift:g}" if len(alike) > 1 else "")


def relative_cost(epoch: int, config) -> float:
    """Return the cost of an epoch compared with others of a run, by the tokens of its videos. config:
    nested, of the recipe, also of a version without the settings of sizes.
    """
    defaults: dict[str, tuple] = {"frame_schedule": (), "size_schedule": ()}
    sample = defaults | dict(config.get("sample") or {})
    if not (sample["frame_schedule"] or sample["size_schedule"]):
        return 1.0
    return float(at(epoch, sample).volume)
