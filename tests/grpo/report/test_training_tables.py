"""Tables about training: stages, and health of one or two trained experts."""

import html
import re

import pytest

from grpo.records.run_log import EXPERTS, RunLog
from grpo.report.run_report import write_report
from grpo.report.training_tables import HEALTH, health_rows, timings
from grpo.update import summary
from tests.grpo.records.run_folders import evaluation
from tests.grpo.report.pages import Page

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
    Page(text)
    return text


@pytest.mark.parametrize("experts", [1, 2])
def test_every_metric_of_one_expert_is_shown_for_two(tmp_path, experts):
    record = summary([ONE, OTHER]) | GROUPS
    if experts == 2:
        record[EXPERTS] = {"transformer": summary([ONE]), "transformer_2": summary([OTHER])}
    text = report(tmp_path, record)
    for key in {*ONE, *GROUPS} & HEALTH.keys():
        assert f'<th scope="row">{HEALTH[key].label}</th>' in html.unescape(text), key
    assert "<td>0.5</td><td>0.5</td><td>0.75 (epoch 1)</td>" in text, (
        "the clip fraction: mean, mean, largest"
    )
    own = "KL to the reference model, transformer_2</th><td>0.03</td>"
    assert (own in text) == (experts == 2)


def test_records_in_the_former_format_are_drawn(tmp_path):
    new = (
        summary([ONE, OTHER])
        | {EXPERTS: {"transformer": summary([ONE]), "transformer_2": summary([OTHER])}}
        | GROUPS
    )
    text = report(tmp_path, OLD, new)
    assert "8 (epoch 1)" in text and "0.02</td><td>0.02</td><td>0.03 (epoch 2)" in text
    assert "gradient norm</th><td>8</td>" in report(tmp_path, OLD, OLD)


@pytest.mark.parametrize("trained", [True, False])
def test_evaluations_without_training_are_points(tmp_path, trained):
    """As `grpo.evaluate` makes them, of the model and of a checkpoint."""
    log = RunLog(tmp_path)
    half = {"reward": 0.5, "low": 0.4, "high": 0.6}
    halves = {"choose": half, "report": half}
    for when in (0, 40):
        log.evaluation(evaluation(when) | halves)
    if trained:
        log.epoch({"epoch": 40, "reward_mean": 0.5})
    log.close()
    text = write_report(tmp_path).read_text()
    drawn = re.search("<svg.*?</svg>", text, re.DOTALL)[0]
    assert (f"the {'band' if trained else 'bar'} is the" in text) and (
        "FillBetween" in drawn
    ) == trained
    assert ("stroke-width: 2.2" in drawn) == trained, "a line between the points"
    assert ("best checkpoint" in text) == trained, "nothing was chosen"
    if not trained:
        ticks = re.findall(r"<text[^>]*>([\d.]+)</text>", drawn)
        assert [tick for tick in ticks if "." not in tick] == ["0", "40"], "no epochs in between"


def test_stages_are_averaged_without_the_first_epoch():
    """The first epoch compiles; "total" is no stage; what is no number does not count."""
    metrics = [
        {"seconds": {"sample": 30.0, "update": 2.0, "total": 32.0}, "idle_share": 0.9},
        {"seconds": {"sample": 6.0, "update": 2.0, "total": 8.0}, "idle_share": 0.25},
        {"seconds": {"sample": 6.0, "update": "x", "other": 2.0}},
        {"seconds": None},
    ]
    found = timings(metrics, [{"seconds": 2.0}, {"seconds": 4.0}, {}])
    assert found["epochs"] == 2 and found["idle_share"] == 0.25
    assert (found["evaluations"], found["evaluation_seconds"]) == (2, 3.0)
    assert found["bar"] == [
        ("sampling", "s0", 0.75),
        ("policy update", "s1", 0.125),
        ("other", "s2", 0.125),
    ]
    assert found["rows"] == [
        ["sampling", "6.00", "75%", "30.00"],
        ["policy update", "1.00", "12%", "2.00"],
        ["other", "1.00", "12%", "0.00"],
        ["all stages", "8.00", "100%", "32.00"],
    ]


def test_timings_of_one_epoch_and_of_none():
    assert timings([{}], []) is None
    found = timings([{"seconds": {"sample": 3.0}}], [])
    assert found["epochs"] == 0 and found["bar"] == [("sampling", "s0", 1.0)]
    assert found["idle_share"] is None and found["evaluations"] == 0


def test_the_worst_value_of_an_epoch_is_that_of_an_update():
    metrics = [
        {"epoch": 1, "kl": 0.5, "kl_max": 0.9, "group_std": 0.2},
        {"epoch": 2, "kl": 0.7, "group_std": 0.1},
    ]
    rows = {row[0]: row[1:4] for row in health_rows(metrics)}
    assert rows["KL to the reference model"] == ["0.5", "0.7", "0.9 (epoch 1)"]
    assert rows["reward spread within groups"] == ["0.2", "0.1", "0.1 (epoch 2)"], "the smallest"
    assert health_rows([{"epoch": 1}]) == []
