"""The report's health table reads one schema, whether one or two experts are trained."""

import html
import re

import pytest
from tests.grpo.test_report import Checker
from tests.grpo.test_run_log import evaluation

from grpo.learner import summary
from grpo.records.run_log import EXPERTS, RunLog
from grpo.report.run_report import HEALTH, write_report

ONE = {
    "ratio_min": 1.0,
    "ratio_max": 1.0,
    "ratio_max_error": 1e-7,
    "clip_fraction": 0.25,
    "approx_kl": 0.5,
    "policy_loss": -0.1,
    "kl": 0.01,
    "grad_norm": 2.0,
    "update_norm": 0.1,
}
OTHER = ONE | {"clip_fraction": 0.75, "kl": 0.03, "grad_norm": 8.0}
GROUPS = {"group_std": 0.2, "zero_std_fraction": 0.0, "failed_scores": 0}
OLD = {
    "transformer": ONE,
    "transformer_2": OTHER,
    "ratio_max_error": 1e-7,
    "grad_norm": 8.0,
} | GROUPS


def report(folder, *records):
    log = RunLog(folder)
    for epoch, record in enumerate(records, 1):
        log.epoch({"epoch": epoch} | record)
    log.close()
    text = write_report(folder).read_text()
    Checker(text)
    return text


@pytest.mark.parametrize("experts", [1, 2])
def test_every_metric_of_one_expert_is_shown_for_two(tmp_path, experts):
    record = summary([ONE, OTHER]) | GROUPS
    if experts == 2:
        record[EXPERTS] = {"transformer": summary([ONE]), "transformer_2": summary([OTHER])}
    text = report(tmp_path, record)
    for key in {*ONE, *GROUPS} & HEALTH.keys():
        assert f"<td>{html.escape(HEALTH[key][0])}</td>" in text, key
    assert "<td>0.5</td><td>0.5</td><td>0.75 (epoch 1)</td>" in text, (
        "the clip fraction: mean, mean, largest"
    )
    own = "KL to the reference model, transformer_2</td><td>0.03</td>"
    assert (own in text) == (experts == 2)


def test_a_run_that_changes_from_the_former_nested_records_is_drawn(tmp_path):
    new = (
        summary([ONE, OTHER])
        | {EXPERTS: {"transformer": summary([ONE]), "transformer_2": summary([OTHER])}}
        | GROUPS
    )
    text = report(tmp_path, OLD, new)
    assert "8 (epoch 1)" in text and "0.02</td><td>0.02</td><td>0.03 (epoch 2)" in text
    assert "gradient norm</td><td>8</td>" in report(tmp_path, OLD, OLD)


@pytest.mark.parametrize("trained", [True, False])
def test_evaluations_without_training_in_between_are_points(tmp_path, trained):
    """As `grpo.evaluate` makes them, of the model and of a checkpoint."""
    log = RunLog(tmp_path)
    for when in (0, 40):
        log.evaluation(evaluation(when))
    if trained:
        log.epoch({"epoch": 40, "reward_mean": 0.5})
    log.close()
    text = write_report(tmp_path).read_text()
    drawn = re.search("<svg.*?</svg>", text, re.DOTALL)[0]
    assert (f"the {'band' if trained else 'bar'} is the" in text) and (
        "FillBetween" in drawn
    ) == trained
