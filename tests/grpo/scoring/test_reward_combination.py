"""The combination of rewards: the formulas, failures and weights."""

import numpy as np
import pytest

from grpo.scoring.advantages import group_advantages
from grpo.scoring.reward_combination import (
    BAD_SIDE,
    MAIN,
    against_base,
    base_statistics,
    combined_advantages,
    means,
    terms,
    weighted_sum,
    without_base,
)
from rewards.choices import READ_MEASURES
from rewards.quality import MEASURES

GROUPS, VALID = np.repeat(np.arange(4), 5), np.ones(20, bool)


def random(seed):
    return np.random.default_rng(seed).random(20)


def test_every_measure_has_a_bad_side():
    assert set(BAD_SIDE) == {*MEASURES, *READ_MEASURES}


@pytest.mark.parametrize(
    "side, names",
    [
        (1, {"flicker", "dark", "text_area"}),
        (-1, {"motion"}),
        (0, {"sharpness", "exposure", "contrast", "compressibility", "edges", "colours"}),
    ],
)
def test_the_bad_side_of_each_measure(side, names):
    """That of the descriptions of `reward.weights`: "only more counts", "only less", and neither."""
    assert {name for name, bad in BAD_SIDE.items() if bad == side} == names
    for name in names:
        low, high = against_base(name, np.array([0.0, 20.0]), 10.0, 2.0)
        assert (low, high) == (-1.0 * (side <= 0), -1.0 * (side >= 0))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sharpness", 10.0, 0),
        ("sharpness", 12.0, 0),
        ("sharpness", 15.0, -0.5),
        ("sharpness", 5.0, -0.5),
        ("sharpness", 18.0, -1),
        ("sharpness", 99.0, -1),
        ("flicker", 15.0, -0.5),
        ("flicker", 0.0, 0),
        ("motion", 5.0, -0.5),
        ("motion", 99.0, 0),
    ],
)
def test_quality_counts_against_the_base(name, value, expected):
    """Mean 10, standard deviation 2: nothing within one, all of -1 at four, on the bad side."""
    assert against_base(name, np.array([value]), 10.0, 2.0)[0] == pytest.approx(expected)


def test_a_measure_that_never_varied_still_has_a_scale():
    np.testing.assert_allclose(
        against_base("exposure", np.array([100.0, 100.05, 101.0]), 100.0, 0.0), [0, 0, -1]
    )
    np.testing.assert_allclose(against_base("motion", np.zeros(3), 0.0, 0.0), 0)
    # a logarithm, negative for blank frames
    values = np.array([-6.9, -6.905, -7.0])
    np.testing.assert_allclose(against_base("sharpness", values, -6.9, 0.0), [0, 0, -1])


def test_base_statistics_leave_out_what_failed():
    parts = {MAIN: random(0), "motion": np.array([1.0, np.nan, 3.0]), "flicker": np.full(3, np.nan)}
    statistics = base_statistics(parts)
    assert (
        statistics["motion"] == (2.0, 1.0)
        and MAIN not in statistics
        and np.isnan(statistics["flicker"]).all()
    )
    assert means(parts)["motion"] == 2.0 and np.isnan(means(parts)["flicker"])


def test_a_measure_as_the_main_reward_has_a_base():
    """Its penalty needs one; a main reward with a scale of its own does not."""
    parts = {"flicker": np.array([1.0, 3.0]), "red": np.array([0.0, 1.0])}
    assert base_statistics(parts, "flicker") == {"flicker": (2.0, 1.0), "red": (0.5, 0.5)}
    assert base_statistics(parts, "red") == {"flicker": (2.0, 1.0)}


def test_weights_add_up_and_zero_is_only_measured():
    ocr, motion = random(0), np.linspace(0, 10, 20)
    parts, base = (
        {MAIN: ocr, "motion": motion, "flicker": np.full(20, np.nan)},
        {"motion": (10, 2), "flicker": (0, 1)},
    )
    weights = {MAIN: 1.0, "motion": 0.5, "flicker": 0.0}
    rewards = terms(ocr, parts, weights, base)
    assert set(rewards) == {MAIN, "motion"}  # a failing measure of weight 0 spoils nothing
    np.testing.assert_allclose(
        weighted_sum(rewards, weights), ocr - 0.5 * np.clip((10 - motion - 2) / 6, 0, 1)
    )
    # has a scale of its own
    raw = terms(ocr, {"stability": motion}, {MAIN: 1.0, "stability": 1.0}, {})
    np.testing.assert_array_equal(raw["stability"], motion)
    np.testing.assert_array_equal(weighted_sum(terms(ocr, {}, {MAIN: 1.0}, {}), {MAIN: 1.0}), ocr)
    motion[3] = np.nan
    assert np.flatnonzero(
        np.isnan(weighted_sum(terms(ocr, parts, weights, base), weights))
    ).tolist() == [3]


def test_advantages_are_combined_whatever_the_scales():
    a, b = random(0), random(1)
    weights = {MAIN: 1.0, "motion": 2.0}
    advantages = combined_advantages(
        {MAIN: a, "motion": b}, weights, GROUPS, VALID, std="group", clip=None
    )
    same = combined_advantages(
        {MAIN: a, "motion": 1000 * b}, weights, GROUPS, VALID, std="group", clip=None
    )
    np.testing.assert_allclose(
        advantages, same, atol=2e-3
    )  # but for the eps of the group's deviation
    by_hand = np.zeros(20)
    for values, weight in ((a, 1.0), (b, 2.0)):
        for g in range(4):
            v = values[GROUPS == g]
            by_hand[GROUPS == g] += weight * (v - v.mean()) / (v.std() + 1e-4)
    np.testing.assert_allclose(
        advantages, (by_hand - by_hand.mean()) / by_hand.std(), rtol=1e-4, atol=1e-5
    )
    assert (
        np.abs(
            combined_advantages({MAIN: a}, {MAIN: 1.0}, GROUPS, VALID, std="group", clip=0.5)
        ).max()
        == 0.5
    )


def test_masked_videos_change_nothing():
    a, b, valid = random(0), random(1), np.array([True] * 15 + [False] * 5)
    weights = {MAIN: 1.0, "motion": 1.0}
    spoilt = [np.where(valid, v, np.nan) for v in (a, b)]
    how = dict(std="group", clip=5.0)
    whole = combined_advantages(
        {MAIN: spoilt[0], "motion": spoilt[1]}, weights, GROUPS, valid, **how
    )
    part = combined_advantages(
        {MAIN: a[:15], "motion": b[:15]}, weights, GROUPS[:15], VALID[:15], **how
    )
    np.testing.assert_allclose(whole, [*part, 0, 0, 0, 0, 0], atol=1e-6)
    assert not combined_advantages(
        {MAIN: a}, {MAIN: 1.0}, GROUPS, ~VALID, std="group", clip=None
    ).any()


def test_one_reward_alone_is_grpo_up_to_a_scale():
    alone = combined_advantages(
        {MAIN: random(0)}, {MAIN: 3.0}, GROUPS, VALID, std="group", clip=None
    )
    plain = group_advantages(random(0), GROUPS, VALID, std="group")
    np.testing.assert_allclose(alone, plain / plain.std(), atol=1e-5)


def test_a_weighted_reward_that_no_video_has_leaves_none_valid():
    weights = {MAIN: 1.0, "motion": 0.5, "flicker": 0.0}
    rewards = terms(random(0), {}, weights, {"motion": (10, 2)})
    assert np.isnan(rewards["motion"]).all() and np.isnan(weighted_sum(rewards, weights)).all()


def test_what_cannot_be_judged_without_the_base():
    weights = {MAIN: 1.0, "motion": 0.5, "flicker": 0.0, "stability": 1.0}
    statistics = base_statistics(
        {"motion": np.array([1.0, np.nan, 3.0]), "flicker": np.array([1.0, np.nan, np.nan])}
    )
    # one video says nothing of the spread
    assert statistics["motion"] == (2.0, 1.0) and np.isnan(statistics["flicker"]).all()
    assert without_base(weights, statistics) == [] and without_base(weights, {}) == ["motion"]
    assert without_base(weights | {"flicker": 1.0}, statistics) == ["flicker"]
