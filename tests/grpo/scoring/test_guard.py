"""The guard: panel, fall, halves, and the choice of the best checkpoint."""

import math

import numpy as np
import pytest

from grpo.scoring import guard


def evaluation(epoch, low, high, dark=0.1, prompts=("a", "b")):
    half = {"reward": (low + high) / 2, "low": low, "high": high}
    return {
        "epoch": epoch,
        "prompts": list(prompts),
        "choose": half,
        "report": half,
        "measures": {"dark": [dark, 0.05], "motion": [0.0, 0.0]},
    }


PANEL = ("dark", "motion", "colours")


def judge(*evaluations, tolerance=1.0):
    return guard.judge(evaluations, PANEL, tolerance)


def test_halves_are_of_even_and_odd_prompts():
    rewards = np.array([0.0, 1.0, 0.0, 1.0, math.nan, 1.0])
    halves = guard.halves(rewards, seed=3)
    assert halves["choose"] == {"reward": 0.0, "low": 0.0, "high": 0.0}
    assert halves["report"] == {"reward": 1.0, "low": 1.0, "high": 1.0}
    assert all(math.isnan(v) for v in guard.halves(rewards[:3], 0)["report"].values())


def test_best_is_the_highest_lower_bound():
    verdicts = judge(evaluation(0, 0.4, 0.5), evaluation(5, 0.7, 0.8), evaluation(9, 0.69, 0.95))
    assert guard.best(verdicts).epoch == 5 and not any(v.alarm for v in verdicts)
    # the earliest of equal ones
    assert guard.best(judge(evaluation(0, 0.4, 0.5), evaluation(5, 0.4, 0.9))).epoch == 0
    assert guard.best([]) is None


def test_a_higher_reward_with_a_panel_outside_is_not_chosen():
    records = evaluation(0, 0.4, 0.5), evaluation(5, 0.6, 0.7), evaluation(9, 0.8, 0.9, dark=0.16)
    verdicts = judge(*records)
    assert verdicts[2].outside == {"dark": pytest.approx(1.2)} and "dark" in verdicts[2].alarm
    assert guard.best(verdicts).epoch == 5
    assert "Epoch 9 has a higher reward" in guard.explain(verdicts, records)
    assert guard.best(judge(*records, tolerance=1.3)).epoch == 9
    # of a measure that falls, too
    assert judge(records[0], evaluation(1, 0.4, 0.5, dark=0.04))[1].outside["dark"] < -1
    assert guard.best(judge(*records, tolerance=math.inf)).epoch == 9


def test_a_fall_is_an_interval_below_that_of_the_best():
    records = [evaluation(e, *i) for e, i in enumerate([(0.4, 0.5), (0.8, 0.9), (0.7, 0.82)])]
    assert [v.fallen for v in judge(*records)] == [None, None, None]  # the intervals overlap
    records.append(evaluation(3, 0.6, 0.7))
    last = judge(*records)[-1]
    assert last.fallen == 1 and "epoch 1" in last.alarm
    assert "fallen since, to epoch 3" in guard.explain(judge(*records), records)


def test_what_cannot_be_compared_is_left_out():
    old = {k: v for k, v in evaluation(0, 0.4, 0.5).items() if k not in ("choose", "report")}
    empty = evaluation(2, math.nan, math.nan)
    other = evaluation(3, 0.9, 0.99, prompts=("c", "d"))
    assert judge() == [] and judge(old) == []
    verdicts = judge(old, other, evaluation(4, 0.4, 0.5), empty, evaluation(6, 0.5, 0.6))
    assert [v.epoch for v in verdicts] == [4, 6]
    # a measure that the base did not have moves nothing; one that did not vary has a small deviation
    still = evaluation(5, 0.4, 0.5)
    still["measures"] = {"motion": [0.1, 0.0], "colours": [3.0, 1.0]}
    assert guard.movements(evaluation(0, 0, 1), still, PANEL) == {"motion": pytest.approx(1e5)}
