"""Group-relative advantages: values against the NumPy reference, masking, and what must not be NaN."""

import numpy as np
import pytest

from grpo.scoring.advantages import (
    STDS,
    GroupStatistics,
    below_spread,
    extremes,
    from_groups_with_spread,
    group_advantages,
    group_statistics,
    largest_spread,
    step_advantages,
)
from tests import reference


def batch(seed=0, groups=5, size=4):
    rng = np.random.default_rng(seed)
    # ids need not be 0..n-1
    ids = rng.permutation(np.repeat(rng.choice(1000, groups, replace=False), size))
    return rng.random(groups * size), ids, rng.random(groups * size) < 0.8


@pytest.mark.parametrize("std", STDS)
def test_equals_reference(std):
    for seed in range(5):
        rewards, groups, valid = batch(seed)
        ours = group_advantages(rewards, groups, valid, std=std, eps=1e-4)
        assert ours.dtype == np.float32 and ours.shape == rewards.shape
        theirs = reference.group_advantages(rewards, groups, valid, std, 1e-4)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_by_hand():
    """Group 7: 0, 1 (mean 1/2, std 1/2). Group 3: 2, 2, 5 (mean 3, std sqrt 2)."""
    rewards, groups = np.array([0.0, 2, 2, 1, 5]), np.array([7, 3, 3, 7, 3])
    ours = group_advantages(rewards, groups, np.ones(5, bool), std="group", eps=0.0)
    np.testing.assert_allclose(ours, [-1, -1 / 2**0.5, -1 / 2**0.5, 1, 2**0.5], rtol=1e-6)
    ours = group_advantages(rewards, groups, np.ones(5, bool), std="global", eps=1.0)
    np.testing.assert_allclose(
        ours, np.array([-0.5, -1, -1, 0.5, 2]) / (np.std(rewards) + 1), rtol=1e-6
    )


@pytest.mark.parametrize("std", STDS)
def test_zero_mean_in_every_group(std):
    rewards, groups, valid = batch()
    ours = group_advantages(rewards, groups, valid, std=std)
    for group in np.unique(groups):
        assert abs(ours[(groups == group) & valid].mean()) < 1e-6
    assert np.abs(ours).max() > 0.5


@pytest.mark.parametrize("std", STDS)
def test_permutation_changes_no_bit(std):
    rewards, groups, valid = batch()
    order = np.random.default_rng(1).permutation(len(rewards))
    np.testing.assert_array_equal(
        group_advantages(rewards, groups, valid, std=std)[order],
        group_advantages(rewards[order], groups[order], valid[order], std=std),
    )


@pytest.mark.parametrize("std", STDS)
def test_masking_equals_removing(std):
    rewards, groups, valid = batch()
    spoiled = np.where(valid, rewards, np.nan)  # failed scores may be anything
    ours = group_advantages(spoiled, groups, valid, std=std)
    assert not valid.all() and not np.any(ours[~valid])
    np.testing.assert_array_equal(
        ours[valid],
        group_advantages(rewards[valid], groups[valid], np.ones(valid.sum(), bool), std=std),
    )


@pytest.mark.parametrize("std", STDS)
def test_groups_that_teach_nothing_get_zero(std):
    """Group 0: equal rewards whose float mean is inexact. 1: one valid member. 2: none. 3: fine."""
    rewards = np.array([0.1, 0.1, 0.1, 0.9, 0.2, 0.3, 0.4, 0.0, 1.0])
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3])
    valid = np.array([1, 1, 1, 1, 0, 0, 0, 1, 1], bool)
    ours = group_advantages(rewards, groups, valid, std=std)
    np.testing.assert_array_equal(ours[:7], 0)
    assert ours[7] < 0 < ours[8]


def test_nothing_valid():
    rewards, groups, _ = batch()
    nothing = np.zeros(len(rewards), bool)
    assert not np.any(group_advantages(rewards, groups, nothing, std="global"))
    assert group_statistics(rewards, groups, nothing) == GroupStatistics(0.0, 0.0, 0.0, 0.0)


def test_clip():
    rewards, groups = np.array([0.0] * 9 + [1.0]), np.zeros(10, int)
    free = group_advantages(rewards, groups, np.ones(10, bool), std="group")
    ours = group_advantages(rewards, groups, np.ones(10, bool), std="group", clip=2.0)
    assert free[-1] > 2.9
    np.testing.assert_array_equal(ours, np.clip(free, -2, 2))
    below = group_advantages(-rewards, groups, np.ones(10, bool), std="group", clip=2.0)
    np.testing.assert_array_equal(below, -ours)


def test_statistics():
    rewards = np.array([0.0, 1.0, 0.5, 0.5, 7.0, 9.0])
    groups, valid = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 1, 1, 1, 1, 0], bool)
    ours = group_statistics(rewards, groups, valid)
    assert ours.mean_reward == pytest.approx(9.0 / 5)
    assert ours.std_reward == pytest.approx(np.std(rewards[:5]))
    assert ours.mean_group_std == pytest.approx(0.25) and ours.zero_std_fraction == pytest.approx(
        0.5
    )


def test_equal_rewards_have_no_spread():
    """Their mean in floats is inexact, and so would their standard deviation be."""
    rewards, groups = np.array([0.1, 0.1, 0.1, 0.0, 1.0]), np.array([4, 4, 4, 2, 2])
    found = group_statistics(rewards, groups, np.ones(5, bool))
    assert np.std(rewards[:3]) > 0 and found.zero_std_fraction == 0.5
    assert found.mean_group_std == 0.25
    below = below_spread(rewards, groups, np.ones(5, bool), 0.5)  # the other group has just that
    np.testing.assert_array_equal(below, groups == 4)


def test_one_reward_with_spread_is_enough():
    """In any place among several; a video without a score does not count."""
    flat, other = np.full(6, 0.1), np.array([0.1, 0.1, 0.1, 0.2, 0.1, 0.3])
    groups, valid = np.repeat([3, 1, 2], 2), np.array([1, 1, 1, 1, 1, 0], bool)
    for rewards in ([flat, other], [other, flat], [flat, other, flat]):
        found = from_groups_with_spread(rewards, groups, valid)
        np.testing.assert_array_equal(found, groups == 1)


@pytest.mark.parametrize(
    "function", [group_statistics, lambda *a: group_advantages(*a, std="group")]
)
def test_errors(function):
    rewards, groups, valid = batch()
    for bad in (np.nan, np.inf):
        spoiled = rewards.copy()
        spoiled[3] = bad
        with pytest.raises(ValueError, match=f"reward {bad} of sample 3.*invalid"):
            function(spoiled, groups, np.ones(len(rewards), bool))
    with pytest.raises(ValueError, match="one length"):
        function(rewards, groups[:-1], valid)


def test_unknown_options():
    with pytest.raises(ValueError, match=r"'batch'.*group, global, max, none"):
        group_advantages(*batch(), std="batch")
    with pytest.raises(ValueError, match="clip=0"):
        group_advantages(*batch(), std="group", clip=0)


def test_kl_as_reward_tells_the_steps_apart():
    """Each step by itself, against the reference with that step's rewards; without a weight all
    steps are as one.
    """
    rewards, groups, valid = batch()
    kl = np.random.default_rng(5).random((3, len(rewards)))
    ours = step_advantages(rewards, kl, 0.3, groups, valid, std="group", clip=5.0)
    assert ours.shape == kl.shape and ours.dtype == np.float32
    for row, of_step in zip(ours, kl):
        wanted = reference.group_advantages(rewards - 0.3 * of_step, groups, valid, "group", 1e-4)
        np.testing.assert_allclose(row, wanted, rtol=1e-6, atol=1e-7)
    assert np.abs(ours[0] - ours[1]).max() > 0.1
    plain = group_advantages(rewards, groups, valid, std="group", clip=5.0)
    np.testing.assert_array_equal(
        step_advantages(rewards, kl, 0.0, groups, valid, std="group", clip=5.0), [plain] * 3
    )
    video = np.flatnonzero(valid)[0]  # counts in the other steps
    kl[1, video] = np.nan
    found = step_advantages(rewards, kl, 0.3, groups, valid, std="group", clip=5.0)
    assert found[1, video] == 0 and np.isfinite(found).all()
    np.testing.assert_array_equal(found[[0, 2]], ours[[0, 2]])


def test_extremes_and_their_ties():
    rewards, groups, valid = batch(seed=3, size=7)
    for count in (0, 1, 2, 3, 4):
        kept = extremes(np.where(valid, rewards, np.nan), groups, valid, count)
        for group in np.unique(groups):
            members = sorted(
                (r, i) for i, r in enumerate(rewards) if groups[i] == group and valid[i]
            )
            wanted = (
                members
                if not count or len(members) <= 2 * count
                else members[:count] + members[-count:]
            )
            assert sorted(np.flatnonzero(kept & (groups == group))) == sorted(i for _, i in wanted)
    equal = extremes(np.zeros(5), np.zeros(5, int), np.ones(5, bool), 1)
    np.testing.assert_array_equal(equal, [True, False, False, False, True])


def test_groups_of_largest_spread():
    """Five groups of four: the chosen are whole groups, failed videos too, and none has less spread
    than one left.
    """
    rewards, groups, valid = batch(seed=1)
    spread = {g: np.std(rewards[(groups == g) & valid]) for g in np.unique(groups)}
    for count in (1, 3, 5):
        kept = largest_spread(np.where(valid, rewards, np.nan), groups, valid, count)
        chosen = set(groups[kept])
        assert len(chosen) == count and kept.sum() == 4 * count
        assert min(spread[g] for g in chosen) >= max(
            (v for g, v in spread.items() if g not in chosen), default=0
        )
    one = np.repeat([5, 3, 4], 2)  # nothing valid in 3, equal rewards in 5 and 4: the first ones
    kept = largest_spread(np.array([1.0, 1, 0, 9, 2, 2]), one, one != 3, 2)
    np.testing.assert_array_equal(kept, one != 4)
