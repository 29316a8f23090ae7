"""The scores of one process and of all, the counts of failures, and the checks of a recipe's rewards."""

import jax
import numpy as np
import pytest

from configs import tiny_ocr
from configs.defaults import defaults
from grpo.scoring.reward_pool import open_pool
from grpo.scoring.scores import format_failures, gather_rows, gather_scores, submit
from grpo.settings import parse
from rewards.pool import RewardPool
from tests.rewards.drawing import filled
from tests.rewards.pool_rewards import Boxed, Mean
from wan_jax.command_line.cli import UserError
from wan_jax.inference.pipeline import Videos


def videos(values, finite):
    return Videos(filled(*values), np.array(finite))


def test_scores_are_in_the_order_of_their_numbers():
    with RewardPool(Mean) as pool:
        pending = [
            submit(pool, np.array([3, 0]), videos([1, 2], [True, True]), ["always", "b"]),
            submit(pool, np.array([1]), videos([9], [False]), ["c"]),
            submit(pool, np.array([2]), videos([4], [True]), ["d"]),
        ]
        scores = gather_scores(pending, 4)
    np.testing.assert_array_equal(scores.values, [2, np.nan, 4, np.nan])
    assert scores.valid.tolist() == [True, False, True, False]
    assert scores.finite.tolist() == [True, False, True, True]
    assert scores.texts == ["record b", "", "record d", ""]
    assert (scores.failures, scores.retries, scores.nonfinite) == (2, 1, 1)
    assert scores.counts() == {"nonfinite_videos": 1, "retried_scores": 1}
    for text in ("1 of 4 videos are not finite", "this video cannot be judged"):
        assert text in scores.why()


def test_boxes_are_in_the_order_of_their_numbers():
    with RewardPool(Boxed) as pool:
        pending = [
            submit(pool, np.array([3, 0]), videos([255, 0], [True, True]), ["a", "b"]),
            submit(pool, np.array([1, 2]), videos([9, 255], [False, True]), ["c", "d"]),
        ]
        scores = gather_scores(pending, 4)
    dark, bright = ({0: ((0.0, 0.0, side, 0.5),)} for side in (0.25, 0.75))
    assert scores.boxes == [dark, {}, bright, bright]


def test_a_video_without_a_number_is_an_error():
    with RewardPool(Mean) as pool:
        pending = [submit(pool, np.array([0]), videos([2], [True]), ["a"])]
        with pytest.raises(ValueError, match="2 of 3 videos"):
            gather_scores(pending, 3)


@pytest.mark.parametrize(
    "failed, counts, text",
    [
        (0, {}, ""),
        (0, {"nonfinite_videos": 0, "failed_rewards": {"motion": 0}}, ""),
        (3, {"nonfinite_videos": 2}, "3 scores failed, 2 videos not finite"),
        (0, {"failed_rewards": {"motion": 4, "flicker": 0}}, "motion failed for 4"),
    ],
)
def test_failures_as_text(failed, counts, text):
    assert format_failures(failed, counts) == text


def test_rows_of_batches_are_concatenated():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = [np.arange(6.0).reshape(2, 3), 10 + np.arange(6.0).reshape(2, 3)]
    rows = gather_rows([jax.numpy.asarray(batch) for batch in batches], sharding)
    np.testing.assert_array_equal(rows, np.concatenate(batches, axis=1))


def test_a_reward_that_cannot_be_built_is_an_error_of_the_user():
    config = defaults().reward
    config.rule, config.workers = "speling", 0
    with pytest.raises(UserError, match="'speling'"):
        open_pool(config, {"ocr": 1.0})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "config.reward.clip_model=''"),
        ({"clip_model": "no/such/folder"}, "config.reward.clip_model: 'no/such/folder'"),
        ({"clip_model": ".", "servers": ("http://x:1",)}, "config.reward.servers"),
    ],
)
def test_settings_of_a_clip_reward(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").touch()
    config = tiny_ocr.get_config()
    config.reward.weights.clip = 0.5
    config.reward.update(changes)
    with pytest.raises(UserError, match=message):
        parse.from_config(config)


def test_a_clip_reward_needs_pytorch(tmp_path, monkeypatch):
    (tmp_path / "config.json").touch()
    config = tiny_ocr.get_config()
    config.reward.weights.clip, config.reward.clip_model = 0.5, str(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="PyTorch"):
        parse.from_config(config)
