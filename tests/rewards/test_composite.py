"""Several rewards: one that fails beside the main one is tried again and counted, and costs the
others nothing.
"""

import functools

import numpy as np
import pool_rewards
import pytest

from rewards.base import RewardError, Score, check_score, describe, last_line
from rewards.composite import SeveralRewards
from rewards.workers import RewardPool


def batch(*values):
    """uint8 [B, 2, 2, 2, 3], each video filled with its value; the made-up rewards misbehave at 1."""
    return np.stack([np.full((2, 2, 2, 3), value, np.uint8) for value in values])


def pool(folder, workers, *broken):
    """The main reward never misbehaves; beside it are those of `broken`, and a sound one after
    them.
    """
    sound = pool_rewards.Brightness
    makers = (
        {"main": sound}
        | {reward.__name__: functools.partial(reward, str(folder)) for reward in broken}
        | {"last": sound}
    )
    return RewardPool(functools.partial(SeveralRewards, makers), workers, timeout=2.0)


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
        scores = scoring.submit(batch(0, 1, 1, 1), ["a", "always", "once", "always"]).result()
    assert scores.valid.all() and scores.failures == scores.retries == 0
    assert np.isfinite(scores.parts[name]).tolist() == [True, False, True, False]
    assert np.isfinite(scores.parts["last"]).all() and list(scores.parts) == ["main", name, "last"]
    assert len(scores.part_errors[name]) == 2 and scores.part_retries == {name: 3}
    assert all(message in last_line(error) for error in scores.part_errors[name])
    assert len(caplog.records) == 1 and name in caplog.text and message in caplog.text


@pytest.mark.parametrize(
    "reward, message",
    [(pool_rewards.Dies, "died with exit code -9"), (pool_rewards.Hangs, "took longer than 2.0 s")],
)
def test_what_ends_its_worker_leaves_the_main_score(tmp_path, reward, message):
    name = reward.__name__
    with pool(tmp_path, 2, reward) as scoring:
        scores = scoring.submit(batch(0, 1), ["a", "always"]).result()
    assert scores.valid.all() and (scores.failures, scores.retries) == (0, 1)
    for lost in (name, "last"):  # what comes after it was not reached
        assert np.isfinite(scores.parts[lost]).tolist() == [True, False]
        assert len(scores.part_errors[lost]) == 1 and message in scores.part_errors[lost][0]


def test_a_reward_that_exits_masks_its_video():
    class Exits:
        def score(self, frames, record):
            raise SystemExit("bye")

    with RewardPool(Exits) as scoring:
        scores = scoring.submit(batch(1), ["a"]).result()
    assert scores.failures == 1 and "SystemExit: bye" in scores.errors[0]


@pytest.mark.parametrize(
    "score",
    [
        None,
        0.5,
        Score("0.5"),
        Score(float("inf")),
        Score(0.5, text=b"x"),
        Score(0.5, parts=5),
        Score(0.5, parts=(("a", 1, 2),)),
        Score(0.5, parts=(("a", "1"),)),
        Score(np.zeros(2)),
    ],
)
def test_malformed_scores_are_refused(score):
    with pytest.raises(RewardError):
        check_score(score)


def test_scores_of_numpy_are_taken():
    check_score(Score(np.float32(0.5), parts=(("a", np.float64("nan")), ("b", 1))))


def test_an_error_is_never_empty():
    assert (
        describe(RewardError("")) == "RewardError"
        and last_line(describe(ValueError())) == "ValueError"
    )
