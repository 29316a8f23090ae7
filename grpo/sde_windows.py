"""Which steps are stochastic in an epoch: functions of (seed, epoch), the same on every host."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from grpo.random_streams import Stream
from grpo.settings.choices import ONE_PER_GROUP, WINDOWS
from wan_jax.diffusion.experts import Segment


@dataclasses.dataclass(frozen=True)
class Windows:
    """A run's rule, for each segment of its schedule (`experts.segments`)."""

    rule: str  # of WINDOWS
    every: int  # epochs that a sliding window stays
    # the steps that may be stochastic; none where the expert is not trained
    rooms: tuple[range, ...]
    # how many of them are, in an epoch; of each video that has any. Or its noise levels
    quotas: tuple[int, ...]
    # how many groups have theirs here; all of them, but with one step a group
    groups: tuple[int, ...]
    group_size: int

    @classmethod
    def make(
        cls,
        sample,
        parts: Sequence[Segment],
        experts: Sequence[str],
        trained: Sequence[str],
        levels: int | None = None,
    ) -> "Windows":
        """sample: the recipe's section. levels: the noise levels a video of a method that trains on
        finished videos (`grpo.methods.flow_matching`), shared out as steps would be; no step is
        stochastic then. Raises ValueError where a trained expert would be left without a step.
        """
        if levels is not None:
            quotas = step_quotas(
                parts, experts, trained, levels, 0, sample.steps, "train.timesteps"
            )
            return cls(
                "any",
                1,
                (range(0),) * len(parts),
                quotas,
                (sample.groups,) * len(parts),
                sample.group_size,
            )
        low, high = sample.sde_range
        alone = sample.sde_window == ONE_PER_GROUP
        quotas = step_quotas(
            parts, experts, trained, len(trained) if alone else sample.sde_steps, low, high
        )
        rooms = tuple(
            range(max(low, p.steps.start), min(high, p.steps.stop)) if q else range(0)
            for p, q in zip(parts, quotas)
        )
        groups = (
            group_quotas([len(room) for room in rooms], sample.groups)
            if alone
            else (sample.groups,) * len(parts)
        )
        return cls(
            sample.sde_window, sample.sde_window_epochs, rooms, quotas, groups, sample.group_size
        )

    def of_epoch(self, seed: int, epoch: int) -> list[np.ndarray]:
        """The stochastic steps, an array a segment: [K], or [1, N] where each video has its own,
        which may be in another segment.
        """
        if self.rule != ONE_PER_GROUP:
            return [
                sde_window(
                    seed, epoch, quota, room.start, room.stop, i, rule=self.rule, every=self.every
                )
                if room
                else np.arange(0)
                for i, (room, quota) in enumerate(zip(self.rooms, self.quotas))
            ]
        own = np.repeat(group_steps(seed, epoch, self.groups, self.rooms), self.group_size)[None]
        return [own if room else np.arange(0) for room in self.rooms]

    def videos(self, part: int) -> range:
        """The numbers of the videos that have stochastic steps in a segment."""
        if self.rule != ONE_PER_GROUP:
            return range(self.groups[part] * self.group_size)
        first = sum(self.groups[:part])
        return range(first * self.group_size, (first + self.groups[part]) * self.group_size)


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
    """The stochastic steps of an epoch: `size` of [low, high), ascending, a function of (seed,
    epoch, segment).

    rule: 'any' subset; 'random', a window of neighbours at a random place (Flow-GRPO-Fast;
    MixGRPO's random strategy); 'progressive', 'decay' and 'exp_decay', MixGRPO's windows that slide
    from the first steps to the last and start again: `every` epochs at each place, or fewer the
    later the steps (`window_epochs`). MixGRPO: arXiv 2507.21802; its window is empty at the last
    place, ours stops where it is whole. Raises ValueError when they do not fit.
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
    rng = Stream.SDE_WINDOW.generator(seed, epoch, *([segment] if segment else []))
    if rule == "any":
        return np.sort(rng.choice(np.arange(low, high), size, replace=False))
    places = high - low - size + 1
    if rule == "random":
        place = int(rng.integers(places))
    else:
        stays = [window_epochs(rule, place, high - low, every) for place in range(places)]
        place = int(np.searchsorted(np.cumsum(stays), (epoch - 1) % sum(stays), side="right"))
    return np.arange(low + place, low + place + size)


def window_epochs(rule: str, place: int, steps: int, every: int) -> int:
    """How many epochs MixGRPO's window stays at a place, of `steps` in all: `every`
    ('progressive'), falling to a fifth along the schedule ('decay'), or as exp(-0.1 (place - 13))
    from the fourteenth place on ('exp_decay').
    """
    if rule == "decay":
        least = max(1, every // 5)
        return max(least, int(every * (1 - place / steps) + least * place / steps))
    if rule == "exp_decay":
        return math.ceil(every * math.exp(-0.1 * max(place - 13, 0)))
    return every


def step_quotas(
    parts: tuple[Segment, ...],
    experts: tuple[str, ...],
    trained: tuple[str, ...],
    size: int,
    low: int,
    high: int,
    setting: str = "sample.sde_steps",
) -> tuple[int, ...]:
    """How many of an epoch's `size` stochastic steps each segment gets: in proportion to its steps
    in [low, high), and at least one for every trained expert, so that each has a gradient in every
    epoch. Noise levels are shared out in the same way. setting: what `size` is called, for
    messages.

    Raises ValueError when a trained expert has no step there, or there are fewer steps than experts
    to train.
    """
    where = f"sample.sde_range=({low}, {high})" if setting == "sample.sde_steps" else "the rollout"
    room = [
        len(range(max(low, p.steps.start), min(high, p.steps.stop)))
        if experts[p.expert] in trained
        else 0
        for p in parts
    ]
    for name in trained:
        if not any(n for p, n in zip(parts, room) if experts[p.expert] == name):
            split = ", ".join(
                f"{experts[p.expert]} steps {p.steps.start} to {p.steps.stop - 1}" for p in parts
            )
            raise ValueError(
                f"{name} would be trained without a step: {where} holds none of its steps "
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
    """`size` things dealt out in proportion to `room`, at least one wherever there is room, nowhere
    above `most`.
    """
    quotas = [min(n, 1) for n in room]
    while sum(quotas) < size:  # the next one goes where the share is furthest behind
        behind = [
            n / sum(room) - q / size if q < top else -1.0 for n, q, top in zip(room, quotas, most)
        ]
        quotas[int(np.argmax(behind))] += 1
    return tuple(quotas)


def group_quotas(step_room: Sequence[int], groups: int) -> tuple[int, ...]:
    """With one stochastic step a group: how many of an epoch's groups have theirs in each segment,
    in proportion to its steps that may be trained, at least one wherever there are any. Raises
    ValueError with fewer groups than that.
    """
    if groups < (least := sum(n > 0 for n in step_room)):
        raise ValueError(
            f"sample.groups={groups} with sample.sde_window={ONE_PER_GROUP}: each trained expert "
            f"needs a group in every epoch; sample at least {least}"
        )
    return in_proportion(step_room, groups, [groups if n else 0 for n in step_room])


def group_steps(seed: int, epoch: int, quotas: Sequence[int], rooms: Sequence[range]) -> np.ndarray:
    """The stochastic step of each group, int32 [sum(quotas)], a function of (seed, epoch):
    Flash-GRPO's iso-temporal grouping (arXiv 2605.15980), in which the videos of a prompt differ by
    the noise of one and the same step.

    quotas[i] groups take steps of rooms[i], those of the first room before those of the next. In a
    room they are a systematic sample, shuffled: group j of n is at (j + u) / n of the steps, with
    one u in [0, 1) for all, so that two steps' counts differ by at most 1.
    """
    rng = Stream.GROUP_STEP.generator(seed, epoch)

    def draw(n: int, room: range) -> np.ndarray:
        where = (np.arange(n) + rng.random()) * len(room) / n
        return rng.permutation(room.start + np.minimum(where.astype(np.int32), len(room) - 1))

    return np.concatenate([draw(n, room) for n, room in zip(quotas, rooms) if n]).astype(np.int32)


def batches_with(videos: range, size: int, count: int, updates: int) -> np.ndarray:
    """The batches, of `count` of `size` videos, that hold these videos, dealt out to an epoch's
    optimiser steps: int [updates, M], as many for each one; where they do not divide, neighbours
    are added, without one of the videos.
    """
    start, stop = videos.start // size, -(-videos.stop // size)
    if stop - start == count:
        return np.arange(count).reshape(updates, -1)
    m = -(-(stop - start) // updates)
    start = min(start, count - m * updates)
    return np.arange(start, start + m * updates).reshape(m, updates).T
