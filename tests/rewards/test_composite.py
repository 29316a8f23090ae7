"""Composite rewards: values of several rewards, and what the failure of one of them costs."""

import functools

import numpy as np
import pytest

from rewards.base import PromptRecord, Score, last_line
from rewards.composite import CompositeReward, stability
from rewards.own import OwnReward
from rewards.pool import RewardPool
from rewards.quality import QualityReward
from tests.rewards import pool_rewards
from tests.rewards.drawing import filled, texture


def pool(folder, workers, *broken):
    """A pool of a composite: a main reward that never misbehaves, the rewards `broken`, and a last
    reward that never misbehaves.
    """
    sound = pool_rewards.Brightness
    factories = (
        {"main": sound}
        | {reward.__name__: functools.partial(reward, str(folder)) for reward in broken}
        | {"last": sound}
    )
    return RewardPool(functools.partial(CompositeReward, factories), workers, timeout=2.0)


@pytest.mark.parametrize(
    "reward, message",
    [
        (pool_rewards.Mean, "ValueError: this video cannot be judged"),
        (pool_rewards.NotFinite, "the reward is not finite"),
    ],
)
def test_a_failure_is_tried_again_then_counted_and_shown_once(tmp_path, caplog, reward, message):
    name = reward.__name__
    with pool(tmp_path, 0, reward) as scoring:
        scores = scoring.submit(filled(0, 1, 1, 1), ["a", "always", "once", "always"]).result()
    assert scores.valid.all() and scores.failures == scores.retries == 0
    assert np.isfinite(scores.parts[name]).tolist() == [True, False, True, False]
    assert np.isfinite(scores.parts["last"]).all() and list(scores.parts) == ["main", name, "last"]
    assert len(scores.part_errors[name]) == 2 and scores.part_retries == {name: 3}
    assert all(message in last_line(error) for error in scores.part_errors[name])
    assert len(caplog.records) == 1 and name in caplog.text and message in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "reward, message",
    [(pool_rewards.Dies, "died with exit code -9"), (pool_rewards.Hangs, "took longer than 2.0 s")],
)
def test_what_ends_its_worker_leaves_the_main_score(tmp_path, reward, message):
    name = reward.__name__
    with pool(tmp_path, 2, reward) as scoring:
        scores = scoring.submit(filled(0, 1), ["a", "always"]).result()
    assert scores.valid.all() and (scores.failures, scores.retries) == (0, 1)
    for lost in (name, "last"):  # the rewards after it were not reached
        assert np.isfinite(scores.parts[lost]).tolist() == [True, False]
        assert len(scores.part_errors[lost]) == 1 and message in scores.part_errors[lost][0]


def test_a_reward_that_exits_masks_its_video():
    class Exits:
        def score(self, frames, record):
            raise SystemExit("bye")

    with RewardPool(Exits) as scoring:
        scores = scoring.submit(filled(1), ["a"]).result()
    assert scores.failures == 1 and "SystemExit: bye" in scores.errors[0]


def test_several_rewards_keep_apart():
    """In a worker process, each value has its reward's name, and a reward that fails does not
    affect the others.
    """
    factories = {
        "ocr": pool_rewards.Mean,
        "motion": functools.partial(QualityReward, "motion"),
        "broken": pool_rewards.Broken,
    }
    with RewardPool(functools.partial(CompositeReward, factories), workers=1) as pool:
        scores = pool.submit(np.stack([texture(), texture(shift=2)]), ["a", "b"]).result()
    assert scores.valid.all() and scores.retries == 0 and scores.texts == ["record a", "record b"]
    np.testing.assert_array_equal(scores.parts["ocr"], scores.values)
    assert scores.parts["motion"][0] < 1e-3 < 0.5 < scores.parts["motion"][1]
    assert np.isnan(scores.parts["broken"]).all() and list(scores.parts) == [
        "ocr",
        "motion",
        "broken",
    ]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["OPEN"], 1),
        ([""], 0),
        (["OPEN", "Open ", "OPEN"], 1),
        (["OPEN", "", "OPEN"], 0),
        (["", ""], 0),
        (["OPEN", "OPEN", "OPEX", "OPEX"], (1 + 0.75 + 1) / 3),
    ],
)
def test_stability_of_the_text(texts, expected):
    assert stability(Score(0.0, frame_texts=tuple(texts))) == pytest.approx(expected)


def test_a_derived_value_needs_no_second_reading():
    factories = {"ocr": pool_rewards.Reader, "stability": None}
    score = CompositeReward(factories).score(texture(3), "a")
    assert score.parts == (("ocr", 1.0), ("stability", 1.0))


def test_without_the_main_reward_there_is_no_score():
    factories = {"ocr": pool_rewards.Broken, "motion": functools.partial(QualityReward, "motion")}
    with RewardPool(functools.partial(CompositeReward, factories)) as pool:
        scores = pool.submit(texture()[None], ["a"]).result()
    assert not scores.valid.any() and scores.parts == {}


# --- Rewards with parts, and groups ---------------------------------------------------------------

RECORD = PromptRecord((), "sign", fps=24.0)
PARTS = functools.partial(OwnReward, "va", "tests.rewards.own_rewards:Parts")
RANK = functools.partial(OwnReward, "rank", "tests.rewards.own_rewards:Rank")


def test_parts_are_rewards_of_their_own():
    """Video 1 lacks one part: it keeps the others, and the value of the reward, a sum, has failed."""
    factories = {"main": pool_rewards.Brightness, "va": PARTS}
    with RewardPool(functools.partial(CompositeReward, factories)) as scoring:
        scores = scoring.submit(filled(3, 1), [RECORD] * 2).result()
    assert scores.valid.all() and scores.part_retries == {}
    assert list(scores.parts) == ["main", "va", "va.mean", "va.length", "va.fps"]
    np.testing.assert_array_equal(scores.parts["va"], [3 + 4 + 24, np.nan])
    np.testing.assert_array_equal(scores.parts["va.length"], [4, np.nan])
    np.testing.assert_array_equal(scores.parts["va.mean"], [3, 1])
    assert {name: len(errors) for name, errors in scores.part_errors.items()} == {
        "va": 1,
        "va.length": 1,
    }


@pytest.mark.parametrize(
    "main, values",
    [
        ("va.mean", [3, 1]),
        ("va", [31, np.nan]),
        ("va.length", [4, np.nan]),
        ("va.no", [np.nan] * 2),
    ],
)
def test_a_part_may_be_the_main_value(main, values):
    factories = {"va": PARTS, "other": pool_rewards.Brightness}
    with RewardPool(functools.partial(CompositeReward, factories, main)) as scoring:
        scores = scoring.submit(filled(3, 1), [RECORD] * 2).result()
    np.testing.assert_array_equal(scores.values, values)
    assert scores.valid.tolist() == np.isfinite(values).tolist()
    assert all(main in error for error in scores.errors if error)


def test_without_a_main_reward_none_fails_the_score():
    factories = {"broken": pool_rewards.Broken, "sound": pool_rewards.Brightness}
    with RewardPool(functools.partial(CompositeReward, factories, None)) as scoring:
        scores = scoring.submit(filled(3), ["a"]).result()
    assert scores.valid.all() and scores.part_retries == {"broken": 1}
    assert np.isnan(scores.parts["broken"][0]) and np.isfinite(scores.parts["sound"][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_composite_with_a_groupwise_reward(workers):
    """The others are computed for each video; a video without the main value is masked alone."""
    factories = {"mean": pool_rewards.Mean, "rank": RANK}
    make = functools.partial(CompositeReward, factories, "mean")
    with RewardPool(make, workers) as scoring:
        assert scoring.traits.groupwise
        records = [PromptRecord(("always",), "sign")] * 3
        scores = scoring.submit(filled(5, 1, 9), records, [0, 0, 0], 3).result()
    np.testing.assert_array_equal(scores.values, [5, np.nan, 9])
    np.testing.assert_array_equal(scores.parts["rank"], [1, np.nan, 2])
    assert scores.retries == 3 and "cannot be judged" in scores.errors[1]
