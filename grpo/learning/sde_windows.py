"""The stochastic steps of an epoch, as functions of (seed, epoch), which are equal on all hosts."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from grpo.random_streams import Stream
from grpo.settings.choices import ONE_PER_GROUP, WINDOWS
from grpo.settings.schema import Recipe
from grpo.settings.sections.sample import Sample
from wan_jax.diffusion.experts import Segment
from wan_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Windows:
    """The rule by which a run draws its stochastic steps. Tuples have a value for each segment of the
    schedule (`experts.segments`).

    Attributes:
        rule: one of WINDOWS.
        every: number of epochs that a sliding window stays at a place.
        ranges: the steps that may be stochastic; empty where the expert is not trained.
        quotas: number of stochastic steps of an epoch, of each video that has any there; for
            methods on finished videos the number of noise levels.
        groups: number of groups with stochastic steps there: all, unless each group has one step.
        group_size: number of videos of a group.
    """

    rule: str
    every: int
    ranges: tuple[range, ...]
    quotas: tuple[int, ...]
    groups: tuple[int, ...]
    group_size: int

    @classmethod
    def make(
        cls,
        sample: Sample,
        parts: Sequence[Segment],
        experts: Sequence[str],
        trained: Sequence[str],
        levels: int | None = None,
    ) -> "Windows":
        """Return the rule of a recipe. Raises ValueError where a trained expert would have no step.

        Args:
            sample: the recipe's section.
            parts: the segments of the rollout's schedule.
            experts: names of the model's experts.
            trained: names of those that are trained.
            levels: number of noise levels of a video, of a method that trains on finished videos
                (`grpo.learning.flow_matching`). They are divided among the segments as steps are,
                and no step is stochastic. None: the method trains on stochastic steps.
        """
        everywhere = (sample.groups,) * len(parts)
        if levels is not None:
            quotas = step_quotas(
                parts, experts, trained, levels, 0, sample.steps, "train.timesteps"
            )
            none = (range(0),) * len(parts)
            return cls("any", 1, none, quotas, everywhere, sample.group_size)
        low, high = sample.sde_range
        one_per_group = sample.sde_window == ONE_PER_GROUP
        steps = len(trained) if one_per_group else sample.sde_steps
        quotas = step_quotas(parts, experts, trained, steps, low, high)
        ranges = tuple(
            range(max(low, part.steps.start), min(high, part.steps.stop)) if quota else range(0)
            for part, quota in zip(parts, quotas)
        )
        groups = everywhere
        if one_per_group:
            groups = group_quotas([len(possible) for possible in ranges], sample.groups)
        return cls(
            sample.sde_window, sample.sde_window_epochs, ranges, quotas, groups, sample.group_size
        )

    def of_epoch(self, seed: int, epoch: int) -> list[np.ndarray]:
        """Return the stochastic steps of each segment, int [K]; int [1, N] where each group has one
        step: that of each video, which may be in another segment.
        """
        if self.rule == ONE_PER_GROUP:
            steps = group_steps(seed, epoch, self.groups, self.ranges)
            by_video = np.repeat(steps, self.group_size)[None]
            return [by_video if possible else np.arange(0) for possible in self.ranges]
        windows = []
        for i, (steps, quota) in enumerate(zip(self.ranges, self.quotas)):
            window = np.arange(0)
            if steps:
                window = sde_window(
                    seed,
                    epoch,
                    quota,
                    steps.start,
                    steps.stop,
                    segment=i,
                    rule=self.rule,
                    every=self.every,
                )
            windows.append(window)
        return windows

    def neighbours(self, part: int) -> bool:
        """Return whether the stochastic steps of a segment follow each other in every epoch."""
        if self.rule in ("any", "spaced"):
            return self.quotas[part] == len(self.ranges[part])
        return self.rule != ONE_PER_GROUP

    def videos(self, part: int) -> range:
        """Return the numbers of the videos that have stochastic steps in a segment."""
        if self.rule != ONE_PER_GROUP:
            return range(self.groups[part] * self.group_size)
        first = sum(self.groups[:part])
        return range(first * self.group_size, (first + self.groups[part]) * self.group_size)


def check_steps(recipe: Recipe) -> None:
    """Raise `UserError` where the stochastic steps do not fit into the schedule, are too few, or have no
    noise.
    """
    sample = recipe.sample
    low, high = sample.sde_range
    if not (0 <= low < high <= sample.steps and 1 <= sample.sde_steps <= high - low):
        raise UserError(
            f"config.sample: sde_steps={sample.sde_steps} steps do not fit in "
            f"sde_range=({low}, {high}) of {sample.steps} steps: give a range within (0, {sample.steps}) "
            "and at most as many steps as it has, e.g. sample.sde_range=0,"
            f"{max(1, sample.steps - 1)} sample.sde_steps={min(2, max(1, sample.steps - 1))}"
        )
    if sample.sde_window == ONE_PER_GROUP and sample.sde_steps != 1:
        raise UserError(
            f"config.sample.sde_steps={sample.sde_steps} must be 1 with "
            f"sample.sde_window={ONE_PER_GROUP}"
        )
    if sample.noise_level == 0:
        raise UserError(
            f"config.sample.noise_level={sample.noise_level} with config.train.method="
            f"{recipe.train.method}, which trains on the noise of stochastic steps, learns nothing: set "
            "it above 0, or to None for the form's own"
        )
    if recipe.train.credit == "otca" and sample.sde_steps < 2:
        raise UserError(
            "config.train.credit=otca divides a video's advantage among its trained steps, and "
            f"sample.sde_steps={sample.sde_steps} leaves one: raise it, or choose another credit"
        )


def sde_window(
    seed: int,
    epoch: int,
    size: int,
    low: int,
    high: int,
    segment: int = 0,
    *,
    rule: str = "any",
    every: int = 25,
) -> np.ndarray:
    """Return the stochastic steps of an epoch, int [size], ascending: `size` of [low, high), as a
    function of (seed, epoch, segment). Raises ValueError where they do not fit.

    The rules are 'any': any subset. 'spaced': low + floor(i (high - low) / size) in every epoch, as
    every second step in DDRL's settings (arXiv 2512.04332). 'random': neighbouring steps at a random
    place (Flow-GRPO-Fast; MixGRPO's random strategy). 'progressive', 'decay' and 'exp_decay':
    neighbouring steps that slide from the first to the last and start again (MixGRPO, arXiv
    2507.21802). They stay `every` epochs at each place, or fewer at later steps (`window_epochs`).
    MixGRPO's window slides out of the range; ours stops at the last place where it is whole.
    """
    if not 0 <= low <= high or not 0 <= size <= high - low:
        raise ValueError(f"{size} stochastic steps do not fit in the steps {low} to {high}")
    rules = [known for known in WINDOWS if known != ONE_PER_GROUP]
    if rule not in rules or every < 1:
        raise ValueError(
            f"window={rule!r}, every={every}: choose one of {', '.join(rules)}, and at least 1 "
            "epoch"
        )
    if size == high - low:
        return np.arange(low, high)
    if rule == "spaced":
        return low + np.arange(size) * (high - low) // size
    rng = Stream.SDE_WINDOW.generator(seed, epoch, *([segment] if segment else []))
    if rule == "any":
        return np.sort(rng.choice(np.arange(low, high), size, replace=False))
    places = high - low - size + 1
    if rule == "random":
        place = int(rng.integers(places))
    else:
        epochs = [window_epochs(rule, place, high - low, every) for place in range(places)]
        place = int(np.searchsorted(np.cumsum(epochs), (epoch - 1) % sum(epochs), side="right"))
    return np.arange(low + place, low + place + size)


def window_epochs(rule: str, place: int, steps: int, every: int) -> int:
    """Return the number of epochs that MixGRPO's window stays at a place, with `steps` steps in all.

    'progressive': `every`. 'decay': it falls linearly to a fifth of that along the schedule.
    'exp_decay': it falls as exp(-0.1 (place - 13)) from the fourteenth place on.
    """
    if rule == "decay":
        least = max(1, every // 5)
        return max(least, int(every * (1 - place / steps) + least * place / steps))
    if rule == "exp_decay":
        return math.ceil(every * math.exp(-0.1 * max(place - 13, 0)))
    return every


def step_quotas(
    parts: Sequence[Segment],
    experts: Sequence[str],
    trained: Sequence[str],
    size: int,
    low: int,
    high: int,
    setting: str = "sample.sde_steps",
) -> tuple[int, ...]:
    """Return the number of an epoch's `size` stochastic steps in each segment: in proportion to the
    segment's steps in [low, high), and at least one for every trained expert, so that each has a
    gradient in every epoch. Noise levels are divided in the same way.

    parts: the segments. experts: names of the model's experts. trained: names of those that are
    trained. setting: key of `size`, for messages. Raises ValueError where a trained expert has no
    step in [low, high), or there are fewer steps than trained experts.
    """
    where = f"sample.sde_range=({low}, {high})" if setting == "sample.sde_steps" else "the rollout"
    # the steps of each segment that may be drawn
    room = [
        len(range(max(low, part.steps.start), min(high, part.steps.stop)))
        if experts[part.expert] in trained
        else 0
        for part in parts
    ]
    for name in trained:
        if not any(n for part, n in zip(parts, room) if experts[part.expert] == name):
            split = ", ".join(
                f"{experts[part.expert]} steps {part.steps.start} to {part.steps.stop - 1}"
                for part in parts
            )
            raise ValueError(
                f"{name} would be trained without a step: {where} has none of its steps "
                f"({split}); change sample.sde_range, sample.shift or sample.steps, or leave the "
                "expert out of train.experts"
            )
    if size < len(trained) or size > sum(room):
        raise ValueError(
            f"{setting}={size} must be from {len(trained)} (one for each trained expert) to "
            f"{sum(room)} (the trained experts' steps in {where})"
        )
    return in_proportion(room, size, room)


def in_proportion(room: Sequence[int], size: int, most: Sequence[int]) -> tuple[int, ...]:
    """Return `size` divided in proportion to `room`: at least 1 wherever `room` is not 0, and nowhere
    above `most`.
    """
    quotas = [min(n, 1) for n in room]
    while sum(quotas) < size:  # the next one goes to the largest deficit
        deficits = [
            share / sum(room) - quota / size if quota < bound else -1.0
            for share, quota, bound in zip(room, quotas, most)
        ]
        quotas[int(np.argmax(deficits))] += 1
    return tuple(quotas)


def group_quotas(step_room: Sequence[int], groups: int) -> tuple[int, ...]:
    """Return the number of an epoch's groups that have their one stochastic step in each segment: in
    proportion to the segment's steps that may be drawn (`step_room`), and at least one wherever there
    are any. Raises ValueError where there are fewer groups than that.
    """
    least = sum(n > 0 for n in step_room)
    if groups < least:
        raise ValueError(
            f"sample.groups={groups} with sample.sde_window={ONE_PER_GROUP}: each trained expert "
            f"needs a group in every epoch; sample at least {least}"
        )
    return in_proportion(step_room, groups, [groups if n else 0 for n in step_room])


def group_steps(
    seed: int, epoch: int, quotas: Sequence[int], ranges: Sequence[range]
) -> np.ndarray:
    """Return the stochastic step of each group, int32 [sum(quotas)], as a function of (seed, epoch):
    Flash-GRPO's iso-temporal grouping (arXiv 2605.15980), in which the videos of a prompt differ by
    the noise of one common step.

    quotas[i] groups have steps of ranges[i]; the groups of the first range come first. The steps of
    a range are a shuffled systematic sample: group j of n is at (j + u) / n of the steps, with one u
    in [0, 1) for all, so that the numbers of groups of two steps differ by at most 1.
    """
    rng = Stream.GROUP_STEP.generator(seed, epoch)

    def draw(count: int, steps: range) -> np.ndarray:
        offset = (np.arange(count) + rng.random()) * len(steps) / count
        return rng.permutation(steps.start + np.minimum(offset.astype(np.int32), len(steps) - 1))

    drawn = [draw(count, steps) for count, steps in zip(quotas, ranges) if count]
    return np.concatenate(drawn).astype(np.int32)


def batches_with(videos: range, size: int, count: int, updates: int) -> np.ndarray:
    """Return the numbers of the batches that contain `videos`, divided among an epoch's optimiser
    steps: int [updates, M].

    The epoch has `count` batches of `size` videos. Where the batches do not divide, neighbouring
    ones that contain none of the videos are added.
    """
    start, stop = videos.start // size, -(-videos.stop // size)
    if stop - start == count:
        return np.arange(count).reshape(updates, -1)
    each = -(-(stop - start) // updates)
    start = min(start, count - each * updates)
    return np.arange(start, start + each * updates).reshape(each, updates).T
