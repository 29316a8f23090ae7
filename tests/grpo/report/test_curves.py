"""Small curves: which ones, their points, their figures."""

import re

import numpy as np
import pytest

from grpo.records.run_log import RunLog
from grpo.report.curves import HEIGHT, MARGIN, POINTS, WIDTH, small_curves
from grpo.report.run_records import RunRecords
from tests.grpo.report.pages import evaluation

NAN = float("nan")


def curves(folder, metrics, evaluations=()):
    """The curves of a run with these records, by heading and label."""
    log = RunLog(folder)
    for epoch, record in enumerate(metrics, 1):
        log.epoch({"epoch": epoch} | record)
    for record in evaluations:
        log.evaluation(record)
    log.close()
    found = small_curves(RunRecords.read(folder))
    return {heading: {c.label: c for c in group} for heading, group in found.items()}


def test_what_is_drawn(tmp_path):
    metrics = [
        {
            "time": "2026-03-31T18:05:59+00:00",
            "videos": 16,
            "failed_scores": 0,
            "new_value": 1.0,
            "grad_norm": 2.0 * i,
            "grad_norm_max": 9.0,
            "reward_mean": 0.5,
            "rewards": {"ocr": 0.5, "motion": 0.1 * i, "flicker": 0.0},
            "log_ratio_by_step": {"12": 1e-5, "3": 2e-5},
        }
        for i in (1, 2)
    ]
    base = evaluation(0, 0.4) | {"measures": {"motion": [0.3, 0.1], "lost": []}}
    found = curves(tmp_path, metrics, [base])
    assert [list(group) for group in found.values()] == [
        ["reward", "gradient norm", "new_value"],
        ["step 3", "step 12"],
        ["ocr", "motion"],
    ], "no counts, extremes or zeros"
    motion = found["Rewards and measures of the videos"]["motion"]
    assert (motion.last, motion.range) == ("0.2", "0.1 to 0.3")
    assert motion.dots == [(MARGIN, MARGIN)], "the held-out base, the largest value"
    assert motion.line == f"M{WIDTH / 2:g} {HEIGHT - MARGIN:g} L{WIDTH - MARGIN:g} {HEIGHT / 2:g}"
    assert "0.1 after epoch 1, 0.2 after epoch 2" in motion.description
    reward = found["Training"]["reward"]
    assert len(reward.dots) == 1 and reward.range == "0.4 to 0.5"


@pytest.mark.parametrize("values, points", [([1.0, NAN, 3.0], 2), ([2.0], 1), ([5.0, 5.0], 2)])
def test_points(tmp_path, values, points):
    (curve,) = curves(tmp_path, [{"kl": v} for v in values])["Training"].values()
    assert len(re.findall("[ML]", curve.line)) == points and "nan" not in curve.line


def test_many_epochs_are_averaged(tmp_path):
    metrics = [{"kl": float(i)} for i in range(3 * POINTS)]
    (curve,) = curves(tmp_path, metrics)["Training"].values()
    heights = [float(point.split()[1]) for point in re.split("[ML]", curve.line)[1:]]
    assert len(heights) == POINTS and curve.range == "0 to 599" and (np.diff(heights) <= 0).all()


def test_no_records(tmp_path):
    assert curves(tmp_path, []) == {}
