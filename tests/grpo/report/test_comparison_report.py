"""Comparisons: curves of runs, figures over seeds, the headline and the pages."""

import json

import numpy as np
import pytest

from grpo.records import run_log
from grpo.report import comparison_report
from grpo.report.comparison_report import CONFIDENCE, Comparison, Curve, read_curve
from tests.grpo.records.run_folders import evaluation
from wan_jax.errors import UserError


def headline(**ends):
    """Of methods with these rewards at the end of their seeds, which all begin at 0.5."""
    steps = np.array([0, 100])
    runs = {
        name: {
            seed: Curve(steps, steps, steps / 10, np.array([0.5, end]))
            for seed, end in enumerate(values)
        }
        for name, values in ends.items()
    }
    result = Comparison(dict.fromkeys(runs, "r.py"), runs, ("epochs", 100), 0.1, {}, 1, "", [])
    return comparison_report._headline(
        result, {name: comparison_report.summary(list(r.values()), 0.1) for name, r in runs.items()}
    )


@pytest.mark.parametrize(
    "ends, sentence",
    [
        (
            dict(one=[0.53], two=[0.53]),
            "one and two ended equal: held-out OCR reward 0.50 → 0.53 over 1 seed.",
        ),
        (
            dict(a=[0.6, 0.6], b=[0.6, 0.6], c=[0.6, 0.6]),
            "a, b and c ended equal: held-out OCR reward 0.50 → 0.60 ± 0.00 over 2 seeds.",
        ),
        (
            dict(a=[0.6], b=[0.4], c=[0.6]),
            "a and c ended equal and highest of 3: held-out OCR reward 0.50 → 0.60 over 1 seed.",
        ),
        (
            dict(a=[0.4], b=[0.7]),
            "b ended highest of 2: held-out OCR reward 0.50 → 0.70 over 1 seed.",
        ),
        (dict(a=[0.7]), "a alone was run: held-out OCR reward 0.50 → 0.70 over 1 seed."),
        (
            dict(a=[0.7, 0.72], b=[0.7, 0.71], c=[0.1, 0.1]),
            "a ended highest of 3: held-out OCR reward 0.50 → 0.71 ± 0.13 over 2 seeds. The "
            f"{CONFIDENCE} interval of a overlaps with that of b: these seeds do not tell them apart.",
        ),
        (
            dict(a=[0.7, 0.72], b=[0.7, 0.71], c=[0.6, 0.75]),
            "a ended highest of 3: held-out OCR reward 0.50 → 0.71 ± 0.13 over 2 seeds. The "
            f"{CONFIDENCE} interval of a overlaps with those of b and c: these seeds do not tell them "
            "apart.",
        ),
    ],
)
def test_headline(ends, sentence):
    who, text = headline(**ends)
    assert text == sentence and sentence.startswith(f"{who.removesuffix(', intervals overlap')}: ")
    assert who.endswith("overlap") == ("overlaps" in sentence)


def records(folder, metrics=((1, {}), (2, {}), (3, {})), rewards=(0.5, 0.6, 0.7, 0.8)):
    log = run_log.RunLog(folder)
    for epoch, change in metrics:
        log.epoch(
            {"epoch": epoch, "spent_evaluations": 10 * epoch, "spent_seconds": 1.0 * epoch} | change
        )
    for epoch, reward in enumerate(rewards):
        log.evaluation(evaluation(epoch) | {"reward": reward})
    log.close()
    return folder


def test_an_evaluation_without_a_result_is_left_out_of_the_curve(tmp_path):
    curve = read_curve(records(tmp_path, rewards=(0.5, np.nan, 0.7, 0.8)))
    assert curve.epochs.tolist() == [0, 2, 3] and curve.evaluations.tolist() == [0, 20, 30]
    assert curve.rewards.tolist() == [0.5, 0.7, 0.8]


@pytest.mark.parametrize(
    "damage, named",
    [
        (dict(rewards=(np.nan, 0.6, 0.7, 0.8)), "epoch 0"),
        (dict(rewards=(0.5, 0.6, 0.7, np.nan)), "epoch 3"),
        (dict(rewards=()), "evals.jsonl"),
        (dict(metrics=((1, {}), (3, {}))), "epoch 2"),
        (dict(metrics=((1, {}), (2, {"spent_seconds": "x"}), (3, {}))), "epoch 2"),
    ],
)
def test_a_run_that_gives_no_curve_is_named(tmp_path, damage, named):
    with pytest.raises(UserError) as error:
        read_curve(records(tmp_path / "run", **damage))
    assert named in str(error.value) and str(tmp_path / "run") in str(error.value)


def test_a_bad_line_costs_its_record_alone(tmp_path):
    path = records(tmp_path) / "evals.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[2:], json.dumps({"epoch": 4})]))
    assert read_curve(tmp_path).epochs.tolist() == [0, 2, 3]
