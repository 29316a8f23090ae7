"""Which steps are stochastic: every rule a function of (seed, epoch), every trained expert in every
epoch.
"""

import types

import numpy as np
import pytest

from grpo.learning.sde_windows import (
    ONE_PER_GROUP,
    WINDOWS,
    Windows,
    batches_with,
    group_quotas,
    group_steps,
    sde_window,
    step_quotas,
    window_epochs,
)
from wan_jax.diffusion.experts import Segment


def test_sde_window_is_a_function_of_seed_and_epoch():
    windows = [tuple(sde_window(0, epoch, 2, 1, 7)) for epoch in range(40)]
    assert windows == [tuple(sde_window(0, epoch, 2, 1, 7)) for epoch in range(40)]
    assert all(a < b for a, b in windows) and {i for w in windows for i in w} == set(range(1, 7))
    assert tuple(sde_window(0, 3, 6, 1, 7)) == (1, 2, 3, 4, 5, 6)
    assert any(
        tuple(sde_window(0, epoch, 2, 1, 7, segment=1)) != windows[epoch] for epoch in range(9)
    )
    with pytest.raises(ValueError, match=r"3 stochastic steps do not fit in the steps 0 to 2"):
        sde_window(0, 0, 3, 0, 2)


def test_spaced_steps_are_the_same_in_every_epoch():
    for size, low, high in ((10, 0, 20), (3, 2, 9), (7, 2, 9), (1, 4, 9)):
        wanted = [low + i * (high - low) // size for i in range(size)]
        for epoch in (1, 2):
            assert sde_window(0, epoch, size, low, high, rule="spaced").tolist() == wanted
    assert sde_window(0, 1, 10, 0, 20, rule="spaced").tolist() == [*range(0, 20, 2)]


def test_windows_of_neighbours():
    """A random window takes every place; the sliding ones go from the first step to the last and
    start again.
    """

    def places(rule, epochs, size=3, low=2, high=9, every=5):
        windows = [
            sde_window(0, epoch, size, low, high, rule=rule, every=every)
            for epoch in range(1, epochs + 1)
        ]
        assert all(np.array_equal(w, np.arange(w[0], w[0] + size)) for w in windows)
        return [int(w[0]) for w in windows]

    assert set(places("random", 200)) == {2, 3, 4, 5, 6}
    assert places("progressive", 30) == [2] * 5 + [3] * 5 + [4] * 5 + [5] * 5 + [6] * 5 + [2] * 5
    # int(5 (1 - c/7) + c/7)
    assert places("decay", 19) == [2] * 5 + [3] * 4 + [4] * 3 + [5] * 3 + [6] * 2 + [2] * 2
    assert [window_epochs("exp_decay", place, 30, 10) for place in (0, 13, 14, 20)] == [
        10,
        10,
        10,
        5,
    ]
    for rule in set(WINDOWS) - {ONE_PER_GROUP}:
        np.testing.assert_array_equal(sde_window(0, 3, 7, 2, 9, rule=rule), np.arange(2, 9))
    with pytest.raises(ValueError, match="progressive"):
        sde_window(0, 0, 2, 0, 4, rule="left")


PARTS = (Segment(0, range(7)), Segment(1, range(7, 20)))
BOTH = ("transformer", "transformer_2")


@pytest.mark.parametrize(
    "trained, size, low, high, quotas",
    [
        (BOTH, 2, 0, 20, (1, 1)),
        (BOTH, 10, 0, 20, (3, 7)),
        (BOTH, 20, 0, 20, (7, 13)),
        (BOTH, 3, 0, 8, (2, 1)),
        (BOTH[1:], 3, 0, 20, (0, 3)),
        (BOTH[:1], 7, 0, 20, (7, 0)),
    ],
)
def test_every_trained_expert_gets_steps_in_every_epoch(trained, size, low, high, quotas):
    assert step_quotas(PARTS, BOTH, trained, size, low, high) == quotas


@pytest.mark.parametrize(
    "trained, size, low, high, message",
    [
        (
            BOTH,
            4,
            0,
            7,
            r"transformer_2 would be trained without a step: sample.sde_range=\(0, 7\).*transformer_2 steps 7",
        ),
        (BOTH, 1, 0, 20, "sde_steps=1 must be from 2"),
        (BOTH[:1], 8, 0, 20, "from 1 .*to 7"),
        (BOTH[:1], 1, 7, 20, "transformer would be trained without"),
    ],
)
def test_a_schedule_that_leaves_a_trained_expert_without_a_step_is_refused(
    trained, size, low, high, message
):
    with pytest.raises(ValueError, match=message):
        step_quotas(PARTS, BOTH, trained, size, low, high)


@pytest.mark.parametrize("groups", [2, 5, 24, 48])
def test_one_step_a_group_spread_evenly_over_steps_and_experts(groups):
    rooms, seen = (range(7), range(7, 15)), []
    quotas = group_quotas([len(room) for room in rooms], groups)
    assert sum(quotas) == groups and min(quotas) >= 1 and abs(quotas[0] - groups * 7 / 15) < 1
    for epoch in range(60):
        steps = group_steps(3, epoch, quotas, rooms)
        np.testing.assert_array_equal(steps, group_steps(3, epoch, quotas, rooms))
        for part, room in zip(np.split(steps, [quotas[0]]), rooms):
            counts = np.bincount(part, minlength=room.stop)[room.start :]
            assert counts.sum() == len(part) and np.ptp(counts) <= 1
        seen.append(steps)
    assert set(np.concatenate(seen)) == set(range(15))
    assert len({tuple(s) for s in seen}) > 20  # epochs differ, and so do groups within one
    if groups > 2:  # in any order
        parts = [part for steps in seen for part in np.split(steps, [quotas[0]])]
        assert any((np.diff(part) < 0).any() for part in parts)
    with pytest.raises(ValueError, match=r"sample\.groups=1 .*at least 2"):
        group_quotas((3, 4), 1)


def test_windows_of_an_epoch():
    """One step a group: the videos of each group have the same one; an expert's updates get the
    batches it has.
    """
    sample = types.SimpleNamespace(
        sde_range=(0, 15),
        sde_window=ONE_PER_GROUP,
        sde_steps=1,
        sde_window_epochs=1,
        groups=6,
        group_size=4,
    )
    windows = Windows.make(sample, PARTS, BOTH, BOTH)
    assert windows.quotas == (1, 1) and windows.groups == (3, 3)
    own, same = windows.of_epoch(0, 1)
    np.testing.assert_array_equal(own, same)
    assert own.shape == (1, 24) and not np.ptp(own.reshape(6, 4), axis=1).any()
    for i, part in enumerate(PARTS):
        np.testing.assert_array_equal(
            [n for n in range(24) if own[0, n] in part.steps], windows.videos(i)
        )
    second = Windows.make(sample, PARTS, BOTH, BOTH[1:])
    assert (
        second.groups == (0, 6)
        and second.of_epoch(0, 1)[0].size == 0
        and second.of_epoch(0, 1)[1].min() >= 7
    )
    assert not windows.neighbours(0)
    sample.sde_window, sample.sde_steps = "any", 5
    usual = Windows.make(sample, PARTS, BOTH, BOTH)
    assert [len(w) for w in usual.of_epoch(0, 1)] == [2, 3] and usual.videos(0) == usual.videos(
        1
    ) == range(24)


def test_windows_of_two_experts_are_drawn_apart():
    """Each from its own steps; a sliding one stays as many epochs as the recipe says."""
    settings = {"sde_range": (1, 15), "sde_steps": 5, "sde_window": "any", "sde_window_epochs": 2}
    sample = types.SimpleNamespace(**settings, groups=6, group_size=4)
    windows = Windows.make(sample, PARTS, BOTH, BOTH)
    assert windows.quotas == (2, 3)
    for epoch in range(1, 9):
        first, second = windows.of_epoch(4, epoch)
        np.testing.assert_array_equal(first, sde_window(4, epoch, 2, 1, 7))
        np.testing.assert_array_equal(second, sde_window(4, epoch, 3, 7, 15, segment=1))
    sample.sde_window = "progressive"
    windows = Windows.make(sample, PARTS, BOTH, BOTH)
    for epoch, place in enumerate([0, 0, 1, 1, 2, 2], start=1):
        first, second = windows.of_epoch(4, epoch)
        assert (first.tolist(), second.tolist()) == (
            [1 + place, 2 + place],
            [7 + place, 8 + place, 9 + place],
        )


def test_batches_of_some_videos_are_dealt_to_the_updates():
    np.testing.assert_array_equal(batches_with(range(24), 4, 6, 2), [[0, 1, 2], [3, 4, 5]])
    # the third is partly theirs
    np.testing.assert_array_equal(batches_with(range(10), 4, 6, 1), [[0, 1, 2]])
    # 3 is a neighbour
    np.testing.assert_array_equal(batches_with(range(12), 4, 6, 2), [[0, 2], [1, 3]])
    np.testing.assert_array_equal(batches_with(range(12, 24), 4, 6, 2), [[2, 4], [3, 5]])


@pytest.mark.parametrize("rule", sorted(set(WINDOWS) - {ONE_PER_GROUP}))
@pytest.mark.parametrize("quota", [2, 3, 6])
def test_neighbours_are_steps_that_follow_each_other_in_every_epoch(rule, quota):
    """Their latents are kept once, so a rule that is wrongly said to have them trains on others'."""
    windows = Windows(rule, 2, (range(1, 7),), (quota,), (4,), 2)
    drawn = [windows.of_epoch(0, epoch)[0] for epoch in range(1, 40)]
    assert windows.neighbours(0) == all((np.diff(window) == 1).all() for window in drawn)
