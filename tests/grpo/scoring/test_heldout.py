"""The texts about an evaluation. tests/grpo/test_outages.py has evaluations themselves."""

import math

import pytest

from grpo.scoring.heldout import Evaluation, format_evaluation

RECORD = {
    "epoch": 3,
    "reward": 0.5,
    "low": 0.25,
    "high": 0.75,
    "num": 8,
    "failed_scores": 0,
    "rewards": [0.5] * 8,
    "seconds": 1.25,
}
FAILED = RECORD | {"reward": math.nan, "num": 1, "failed_scores": 7, "nonfinite_videos": 2}


@pytest.mark.parametrize(
    "record, parts",
    [
        (RECORD, ["0.500 [0.250, 0.750]", "8 prompts", "1.2 s"]),
        (FAILED, ["unknown", "1 prompts", "7 scores failed", "2 videos not finite"]),
        (RECORD | {"unguided": RECORD | {"reward": 0.125}}, ["0.500", "without guidance", "0.125"]),
    ],
)
def test_an_evaluation_as_text(record, parts):
    text = format_evaluation(record)
    assert all(part in text for part in parts) and "\n" not in text


def test_an_evaluation_without_a_result_has_a_warning():
    assert Evaluation(RECORD, None, "").warning is None
    warning = Evaluation(FAILED, None, "the disk is full").warning
    for part in ("epoch 3", "1 of 8 videos", "the disk is full"):
        assert part in warning
