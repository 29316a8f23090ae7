"""The line of an epoch on the terminal."""

import pytest

from grpo.records.epoch_record import COLUMNS, line
from grpo.records.progress import Progress

RECORD = {
    "epoch": 999_998,
    "reward_mean": -10.1234,
    "group_std": 10.5,
    "grad_norm": 1.234e-10,
    "ratio_max_error": 1.5e-7,
    "failed_scores": 0,
    "seconds": {
        "sample": 10_000.1,
        "decode": 0.01,
        "score_wait": 100.1,
        "update": 9000.1,
        "save": 10.2,
        "total": 19_110.4,
    },
}


@pytest.mark.parametrize("seconds", [None, 7500.0])
def test_the_longest_line_fits(seconds):
    text = line(RECORD, 1_000_000, Progress(999_998, 1_000_000, seconds))
    assert len(text) <= COLUMNS and text.startswith("epoch 999998/1000000: reward -10.123, ")
    assert ("ETA 2 h 05 min" in text) == (seconds is not None)
    assert "grad" in text and "save" not in text, "what matters most, as much as fits"
    usual = line(RECORD | {"epoch": 2}, 40, Progress(2, 40, None))
    assert "ratio 1e-07 | 19110.4 s (sample 10000.1" in usual and "score_wait" not in usual
    assert len(usual) <= COLUMNS


def test_failed_scores_have_a_line_of_their_own():
    record = RECORD | {"failed_scores": 3, "seconds": {"sample": 1.0, "total": 1.0}}
    shared = line(RECORD | {"epoch": 2, "data_share": 0.0163}, 40, Progress(2, 40, None))
    assert ", data 1.6% of the loss" in shared
    text, failures = line(record, 4, Progress(4, 4, 0.0)).split("\n")
    assert "ETA" not in text and text.endswith("| 1.0 s (sample 1.0)") and "3" in failures
    del record["grad_norm"]
    assert "nothing to learn from, ratio" in line(record, 4, Progress(4, 4, 0.0))
    weak = line(record | {"epoch": 2, "weak_groups": 3}, 4, Progress(4, 4, 0.0))
    assert "nothing to learn, 3 groups below min_group_std" in weak
