"""The parts of the benchmark of rewards."""

import numpy as np

from benchmarks.rewards import draw_videos, measure
from rewards.pool import RewardPool
from tests.rewards.pool_rewards import Targets


def test_videos_have_a_word_each_and_noise_that_differs():
    videos, targets = draw_videos(9, 2, 64, 128)
    assert videos.shape == (9, 2, 64, 128, 3) and videos.dtype == np.uint8
    assert targets[0] == targets[8] != targets[1]  # eight words
    assert (videos[0, 0] != videos[0, 1]).any()


def test_a_pool_is_measured():
    videos, targets = draw_videos(4, 1, 64, 128)
    with RewardPool(Targets) as pool:
        seconds, blocked, values = measure(pool, videos, targets)
    assert values == [1.0] * 4 and 0 < seconds <= blocked  # without workers, submit scores
