"""Comparisons: curves of runs, figures over seeds, the headline and the pages."""

import json

import numpy as np
import pytest

from grpo.records import run_log
from grpo.report import comparison_report
from grpo.report.comparison_report import (
    CONFIDENCE,
    Comparison,
    Curve,
    differing,
    first_reached,
    mean_curve,
    read_curve,
    summary,
    write,
)
from tests.grpo.records.run_folders import evaluation
from tests.grpo.report.pages import Page
from wan_jax.errors import UserError


def headline(**ends):
    """Return the headline of methods whose seeds start at 0.5 and end at these rewards."""
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
    "ends, who, sentence",
    [
        (
            dict(one=[0.53], two=[0.53]),
            "no winner, one and two are equal",
            "No winner: one and two ended equal: held-out OCR reward 0.50 → 0.53 over 1 seed.",
        ),
        (
            dict(a=[0.6, 0.6], b=[0.6, 0.6], c=[0.6, 0.6]),
            "no winner, a, b and c are equal",
            "No winner: a, b and c ended equal: held-out OCR reward 0.50 → 0.60 ± 0.00 over 2 seeds.",
        ),
        (
            dict(a=[0.6], b=[0.4], c=[0.6]),
            "no winner, a and c are equal",
            "No winner: a and c ended equal, above the others: held-out OCR reward 0.50 → 0.60 over 1 "
            "seed.",
        ),
        (
            dict(a=[0.4], b=[0.7]),
            "b ended highest of 2",
            "b ended highest of 2: held-out OCR reward 0.50 → 0.70 over 1 seed.",
        ),
        (
            dict(a=[0.4, 0.41], b=[0.7, 0.71]),
            "b ended highest of 2",
            "b ended highest of 2: held-out OCR reward 0.50 → 0.70 ± 0.06 over 2 seeds.",
        ),
        (
            dict(a=[0.7]),
            "a alone was run",
            "a alone was run: held-out OCR reward 0.50 → 0.70 over 1 seed.",
        ),
        (
            dict(a=[0.7, 0.72], b=[0.7, 0.71], c=[0.1, 0.1]),
            "no winner, intervals overlap",
            f"No winner: the {CONFIDENCE} intervals of a (0.71 ± 0.13) and b (0.70 ± 0.06) overlap, so "
            "these seeds do not tell them apart. a: held-out OCR reward 0.50 → 0.71 ± 0.13 over 2 "
            "seeds.",
        ),
        (
            dict(a=[0.7, 0.72], b=[0.7, 0.72], c=[0.6, 0.75]),
            "no winner, intervals overlap",
            f"No winner: the {CONFIDENCE} intervals of a (0.71 ± 0.13), b (0.71 ± 0.13) and c (0.68 ± "
            "0.95) overlap, so these seeds do not tell them apart. a: held-out OCR reward 0.50 → 0.71 "
            "± 0.13 over 2 seeds.",
        ),
    ],
)
def test_headline(ends, who, sentence):
    assert headline(**ends) == (who, sentence)


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


def curve(rewards, evaluations=None, seconds=None):
    steps = np.arange(len(rewards))
    return Curve(
        5 * steps,
        np.asarray(100 * steps if evaluations is None else evaluations),
        np.asarray(2.0 * steps if seconds is None else seconds),
        np.asarray(rewards, float),
    )


def test_the_reward_has_the_name_of_the_evaluations(tmp_path):
    path = records(tmp_path) / "evals.jsonl"
    named = [json.loads(line) | {"main": "red"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in named))
    red, ocr = read_curve(tmp_path), curve([0.5, 0.6])
    assert (red.reward, ocr.reward) == ("red reward", "OCR reward")
    for runs, name in (({"a": {0: red}}, "red reward"), ({"a": {0: red}, "b": {0: ocr}}, "reward")):
        result = Comparison(dict.fromkeys(runs, "r.py"), runs, ("epochs", 3), 0.1, {}, 1, "", [])
        assert result.reward == name
        page = Page(
            comparison_report._page(
                result, {n: summary(list(r.values()), 0.1) for n, r in runs.items()}
            )
        )
        assert f"held-out {name} " in page.text
        assert ("OCR reward and red reward" in page.text) == (len(runs) == 2)
        assert "the band" not in page.text, "one seed has none"


def test_curves_are_averaged_at_equal_spending():
    """Seeds are interpolated linearly, up to what every one of them spent."""
    a, b = curve([0.2, 0.4, 0.8]), curve([0.2, 0.6, 0.6], evaluations=[0, 50, 150])
    x, mean, half = mean_curve([a, b], "evaluations")
    np.testing.assert_array_equal(x, [0, 50, 100, 150])
    pairs = np.array([[0.2, 0.3, 0.4, 0.6], [0.2, 0.6, 0.6, 0.6]])
    np.testing.assert_allclose(mean, pairs.mean(0))
    # s = d / sqrt 2
    np.testing.assert_allclose(
        half, 12.706204736 * np.abs(np.diff(pairs, axis=0)[0]) / 2, atol=1e-8
    )
    assert np.isnan(mean_curve([a], "seconds")[2]).all()


def test_cost_of_a_gain():
    a = curve([0.5, 0.4, 0.6, 0.7])
    assert first_reached(a, "evaluations", 0.1) == pytest.approx(200)
    assert first_reached(curve([0.5, 0.65]), "evaluations", 0.15) == pytest.approx(100), (
        "but for rounding"
    )
    assert first_reached(a, "seconds", 0.15) == pytest.approx(5.0)
    assert first_reached(a, "evaluations", 0.05) == pytest.approx(175) and np.isnan(
        first_reached(a, "seconds", 0.3)
    )
    row = summary([a, curve([0.5, 0.5, 0.5, 0.5])], 0.1)
    assert row["reached"] == 1 and row["evaluations_to_reach"] == pytest.approx(
        (200, np.nan), nan_ok=True
    )
    assert row["gain"][0] == pytest.approx(0.1) and row["epochs"][0] == 15


def test_page_and_tables(tmp_path):
    runs = {
        f"m{i}": {s: curve([0.5, 0.5 + 0.02 * i + 0.01 * s, 0.5 + 0.04 * i]) for s in range(3)}
        for i in range(8)
    }
    result = Comparison(
        dict.fromkeys(runs, "r.py <script>") | {"gone": "r.py"},
        runs | {"gone": {}},
        ("evaluations", 200),
        0.15,
        {"gone, seed 0": "error: <b>no</b>"},
        2,
        "python <x>",
        ["eval.steps"],
    )
    lines = write(result, tmp_path / "out")
    text = (tmp_path / "out" / "comparison.html").read_text()
    page = Page(text)
    assert (
        all(u.startswith("#") for u in page.urls)
        and "script" not in page.tags
        and text.count("<svg") == 4
    )
    assert (
        "m7 ended highest of 8: held-out OCR reward 0.50 → 0.78 ± 0.00 over 3 seeds." in page.text
    )
    assert page.text.count("the band is the") == 2
    assert "error: <b>no</b>" in page.text and "they differ in eval.steps" in page.text
    for i in range(6):
        assert f"var(--s{i})" in text
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    assert (
        "| m7 | 3 | 0.500 ± 0.000 | 0.780 ± 0.000 | +0.280 ± 0.000 | 100 ± " in markdown
        and lines[0] in markdown
    )
    assert "| not reached | not reached | 10 | 200 | 4 |" in markdown
    known = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert known["runs"]["m1"]["2"]["rewards"] == [0.5, 0.54, 0.54] and known["summary"]["m1"][
        "end"
    ] == [0.54, 0.0]
    write(
        Comparison({"gone": "r.py"}, {"gone": {}}, ("epochs", 2), 0.1, {}, 1, "", []),
        tmp_path / "none",
    )
    assert "No run was finished." in (tmp_path / "none" / "comparison.html").read_text()


@pytest.mark.parametrize("others", [{}, {"nft": 100}])
def test_a_method_that_samples_nothing_is_in_the_chart_of_seconds_alone(tmp_path, others):
    """Its evaluations are no figure, and its colour stays."""
    rewards, steps = np.array([0.5, 0.8]), np.array([0, 4])
    runs = {
        name: {0: Curve(steps, np.array([0, evaluations]), steps / 2, rewards)}
        for name, evaluations in ({"dpo": 0} | others).items()
    }
    write(
        Comparison(dict.fromkeys(runs, "r.py"), runs, ("epochs", 4), 0.15, {}, 1, "", []), tmp_path
    )
    text = (tmp_path / "comparison.html").read_text()
    charts = dict(part.split("</h2>") for part in text.split("<h2>")[1:])
    assert ("Reward by evaluations" in charts) == bool(others)
    for name, color in (("dpo", "var(--s0)"), *((other, "var(--s1)") for other in others)):
        assert color in charts["Reward by time"], name
        assert (color in charts.get("Reward by evaluations", "")) == (name != "dpo")
    table = (tmp_path / "comparison.md").read_text()
    assert "| dpo | 1 | 0.500 | 0.800 | +0.300 | – | 1.0 | 4 | 0 | 2 |" in table
    assert "dpo trained on data alone and sampled nothing" in table


def test_settings_of_the_held_out_evaluation_that_differ():
    first = {"eval.steps": 5, "eval.every": 1, "sample.frames": 1, "train.method": "grpo"}
    other = {"eval.steps": 6, "eval.every": 2, "sample.frames": 1, "train.method": "nft"}
    assert differing({"a": first, "b": other}) == ["eval.steps"]
    assert differing({"a": first, "b": first | {"sample.frames": 5}}) == ["sample.frames"]
    assert differing({"a": first}) == []
