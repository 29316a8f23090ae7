"""Batches in a reward pool: values, failures, and the end of a pool."""

import functools
import os
import signal
import threading
import time

import numpy as np
import pytest

from rewards.base import RewardError
from rewards.ocr.rules import OCRReward
from rewards.pool import RewardPool
from tests.rewards import pool_rewards
from tests.rewards.drawing import filled, video


@pytest.mark.slow
def test_values_do_not_depend_on_workers_or_mode():
    words = ["HELLO", "HELO", "OPEN", "SALE", "SALES", "."]
    rng = np.random.default_rng(0)
    clean = np.stack([video(word) for word in words])
    videos = (clean + rng.normal(0, 25, clean.shape)).clip(0, 255).astype(np.uint8)
    targets = [("HELLO",), ("HELLO",), ("OPEN",), ("SALE",), ("SALE",), ("DOT", "COM")]
    make_reward = functools.partial(OCRReward, rule="spelling")
    results = []
    for workers, mode in [
        (0, "process"),
        (1, "process"),
        (2, "process"),
        (2, "thread"),
        (0, "thread"),
    ]:
        with RewardPool(make_reward, workers, mode) as pool:
            results.append(pool.submit(videos, targets).result())
    first = results[0]
    assert first.values.dtype == np.float64 and first.valid.dtype == bool and first.valid.all()
    assert (
        first.values[0] == 1 and first.values[1] == pytest.approx(0.8) and first.texts[0] == "HELLO"
    )
    assert first.failures == first.retries == 0 and first.seconds > 0 and first.errors == [""] * 6
    for other in results[1:]:
        assert other.values.tolist() == first.values.tolist()
        assert other.scores == first.scores and other.texts == first.texts


@pytest.mark.parametrize("workers, mode", [(0, "thread"), (2, "thread"), (2, "process")])
@pytest.mark.parametrize(
    "reward, message",
    [(pool_rewards.Mean, "this video cannot be judged"), (pool_rewards.NotFinite, "not finite")],
)
def test_failures_are_retried_then_masked_and_counted(tmp_path, workers, mode, reward, message):
    with RewardPool(functools.partial(reward, str(tmp_path)), workers, mode) as pool:
        scores = pool.submit(filled(0, 1, 2, 1, 3), ["a", "b", "c", "once", "d"]).result()
        assert scores.valid.tolist() == [True, False, True, True, True]
        assert np.isnan(scores.values[1]) and scores.values[[0, 2, 3, 4]].tolist() == [0, 2, 1, 3]
        assert (scores.failures, scores.retries) == (1, 2)
        assert message in scores.errors[1] and scores.scores[1] is None and scores.texts[1] == ""
        assert scores.texts[2] == "record c"
        assert pool.submit(filled(4), ["e"]).result().values.tolist() == [4]


def test_a_score_that_cannot_be_sent_is_masked():
    with RewardPool(pool_rewards.Unpicklable, 1) as pool:
        scores = pool.submit(filled(1, 2), ["a", "b"]).result()
    assert scores.valid.tolist() == [False, True]
    assert "local object 'Unpicklable.misbehave" in scores.errors[0]


def test_a_worker_that_dies_is_replaced(tmp_path):
    with RewardPool(functools.partial(pool_rewards.Dies, str(tmp_path)), 2) as pool:
        scores = pool.submit(filled(0, 1, 1, 2, 3), ["a", "always", "once", "b", "c"]).result()
        assert scores.valid.tolist() == [True, False, True, True, True]
        assert (scores.failures, scores.retries) == (1, 2)
        assert "died with exit code -9" in scores.errors[1]


@pytest.mark.slow
def test_a_worker_killed_from_outside_mid_batch_costs_a_retry_only():
    with RewardPool(pool_rewards.Slow, 2) as pool:
        pids = [scorer._process.pid for scorer in pool._scorers]
        pending = pool.submit(filled(0, 0, 0, 0), [None] * 4)
        time.sleep(0.2)
        assert not pending.done()
        os.kill(pids[0], signal.SIGKILL)
        scores = pending.result(timeout=30)
        assert scores.valid.all() and (scores.failures, scores.retries) == (0, 1)
        os.kill(pool._scorers[0]._process.pid, signal.SIGKILL)  # while idle: not even a retry
        pool._scorers[0]._process.wait()
        again = pool.submit(filled(0, 0), [None] * 2).result(timeout=30)
        assert again.valid.all() and again.retries == 0


def test_a_video_that_takes_too_long_is_masked():
    with RewardPool(pool_rewards.Hangs, 2, timeout=1.0) as pool:
        scores = pool.submit(filled(0, 1, 2), ["a", "b", "c"]).result(timeout=30)
    assert scores.valid.tolist() == [True, False, True]
    assert scores.retries == 1 and "took longer than 1.0 s" in scores.errors[1]


def test_submit_returns_at_once_and_batches_queue_up():
    with RewardPool(pool_rewards.Slow, 2) as pool:
        start = time.monotonic()
        first, second = pool.submit(filled(0, 0), [None] * 2), pool.submit(filled(0, 0), [None] * 2)
        assert time.monotonic() - start < 0.3 and not first.done()
        with pytest.raises(TimeoutError, match="2 of 2 videos"):
            second.result(timeout=0.1)
        assert second.result().valid.all() and first.done()
        assert 0.5 <= first.result().seconds < second.result().seconds


@pytest.mark.parametrize("workers, mode", [(0, "thread"), (1, "thread"), (1, "process")])
def test_close_twice(workers, mode):
    pool = RewardPool(pool_rewards.Mean, workers, mode)
    assert pool.submit(filled(2), ["a"]).result().values.tolist() == [2]
    pool.close()
    pool.close()
    with pytest.raises(RewardError, match="closed"):
        pool.submit(filled(2), ["a"])


def test_close_stops_workers_mid_batch():
    before = threading.active_count()
    pool = RewardPool(pool_rewards.Hangs, 2)
    processes = [scorer._process for scorer in pool._scorers]
    pending = pool.submit(filled(1, 1, 1), ["a"] * 3)
    time.sleep(0.2)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 5
    assert all(process.poll() is not None for process in processes)
    assert threading.active_count() == before
    with pytest.raises(RewardError, match="closed before this batch"):
        pending.result()


def test_errors():
    with pytest.raises(RewardError, match="the model file is missing"):
        RewardPool(pool_rewards.broken_factory, 2)
    with pytest.raises(RewardError, match="unknown OCR rule 'speling'"):
        RewardPool(functools.partial(OCRReward, rule="speling"), 1)
    with pytest.raises(RewardError, match=r"cannot be sent.*functools\.partial"):
        RewardPool(lambda: pool_rewards.Mean(), 1)
    with pytest.raises(ValueError, match="unknown mode 'fork'"):
        RewardPool(pool_rewards.Mean, 1, "fork")
    with pytest.raises(ValueError, match="workers=-1"):
        RewardPool(pool_rewards.Mean, -1)
    with RewardPool(pool_rewards.Mean) as pool:
        with pytest.raises(ValueError, match="2 videos but 1 records"):
            pool.submit(filled(0, 0), ["a"])
        with pytest.raises(ValueError, match="B >= 1"):
            pool.submit(filled(0)[:0], [])
        with pytest.raises(ValueError, match="uint8"):
            pool.submit(filled(0).astype(np.float32), ["a"])
