"""Memory that a pool shares with a worker process."""

import os

import numpy as np
import pytest

from rewards.pool import RewardPool
from rewards.shared_frames import SharedFrames
from tests.rewards import pool_rewards


@pytest.fixture
def shared():
    frames = SharedFrames.create()
    if frames is None:
        pytest.skip("this system has no anonymous files")
    return frames


def videos(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, shape, np.uint8) for shape in shapes]


def test_what_was_put_is_got(shared):
    """One video, larger ones, several of different sizes, parts of an array, other types."""
    for video in videos((1, 2, 3, 3), (5, 8, 8, 3), (2, 2, 2, 3)):
        np.testing.assert_array_equal(shared.get(shared.put(video)), video)
    several = [*videos((3, 4, 4, 3), (1, 8, 2, 3)), np.float32([[1.5]])]
    several.append(several[0][:, ::2])
    for got, put in zip(shared.get(shared.put(several)), several, strict=True):
        np.testing.assert_array_equal(got, put)
        assert got.dtype == put.dtype


def test_a_reward_may_keep_and_change_what_it_got(shared):
    first, second = videos((2, 4, 4, 3), (2, 4, 4, 3))
    kept = shared.get(shared.put(first))
    kept[0] = 0
    shared.put(second)
    np.testing.assert_array_equal(kept[1], first[1])
    np.testing.assert_array_equal(shared.get(shared.put(first)), first)


def test_the_memory_is_released_with_its_object():
    frames = SharedFrames.create()
    if frames is None:
        pytest.skip("this system has no anonymous files")
    fd = frames.fd
    os.fstat(fd)
    del frames
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.mark.parametrize("available", [True, False])
def test_a_pool_scores_the_same_without_shared_memory(monkeypatch, available):
    if not available:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    batch = np.stack(videos(*[(2, 4, 4, 3)] * 3))
    with RewardPool(pool_rewards.Mean, 1) as pool:
        assert (pool._scorers[0]._frames is not None) == (available and hasattr(os, "memfd_create"))
        scores = pool.submit(batch, [None] * 3).result()
    np.testing.assert_allclose(scores.values, batch.mean((1, 2, 3, 4)))
