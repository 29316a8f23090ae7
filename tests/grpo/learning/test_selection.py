"""Which videos are trained on, and their batches."""

import numpy as np
import pytest

from grpo.learning.selection import Selection, best_and_worst, layout

REWARDS = np.array([0.2, 0.9, 0.4, 0.5, 0.5, 0.5, 0.3, 1.0, -2.0])
VALID = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1], bool)


def test_the_best_and_the_worst_of_each_group():
    best, worst, differ = best_and_worst(REWARDS, VALID, 3)
    assert best.tolist() == [1, 3, 6] and worst.tolist() == [0, 3, 8]
    assert differ.tolist() == [True, False, True]
    assert not best_and_worst(REWARDS, np.zeros(9, bool), 3)[2].any()
    # whatever a failed video has as its reward
    for failed in (-9.0, 0.0, 9.0, np.nan):
        found = best_and_worst(np.array([0.5, failed, 0.9]), np.array([True, False, True]), 3)
        assert [x.tolist() for x in found] == [[2], [0], [True]]


@pytest.mark.parametrize(
    "rows, updates, batch, shards, expected",
    [
        (48, 1, 9, 1, (6, 8)),
        (8, 1, 32, 1, (1, 8)),
        (8, 2, 32, 3, (1, 6)),
        (64, 1, 32, 4, (2, 32)),
        (10, 2, 4, 1, (2, 3)),
    ],
)
def test_batches_hold_every_row_once(rows, updates, batch, shards, expected):
    assert layout(rows, updates, batch, shards) == expected
    whole = Selection(
        np.arange(rows) + 100, None, np.arange(rows, dtype=np.float32), np.ones(rows, bool)
    )
    parts = whole.batches(updates, batch, shards)
    assert len(parts) == updates and all(p.videos.shape == p.valid.shape == expected for p in parts)
    counted = [np.sort(p.videos[p.valid]) for p in parts]
    # in the same update whatever the devices
    np.testing.assert_array_equal(np.concatenate(counted), whole.videos)
    assert all((p.videos == p.weight + 100).all() for p in parts)


def test_numbers_of_what_counts():
    numbers, valid = np.arange(4), np.array([True, False, True, True])
    assert Selection(numbers, None, numbers, valid).numbers.tolist() == [0, 2, 3]
    pairs = Selection(numbers, numbers + 4, numbers, valid).numbers
    assert sorted(pairs.tolist()) == [0, 2, 3, 4, 6, 7]
