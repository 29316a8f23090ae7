"""Comparisons: what a method is, the figures against their formulas, the page, and real runs that
end or fail.
"""

import json
import pathlib
import re
import subprocess
import time

import numpy as np
import pytest
from tests.grpo.test_report import Checker

from convert.from_diffusers import convert
from grpo import compare
from grpo.compare import Job, Method, parse_budget, read_methods
from grpo.records import run_log
from grpo.records.statistics import t_interval
from grpo.report import comparison_report
from grpo.report.comparison_report import Comparison, Curve, first_reached, mean_curve, summary
from tests import commands, tiny
from tests.grpo.test_train import PICTURE, RECIPE, WORDS
from wan_jax.command_line.cli import UserError

ROOT = pathlib.Path(__file__).parents[2]
T2 = 4.302652729911275  # Student's 97.5 % quantile for 2 degrees of freedom


def curve(rewards, evaluations=None, seconds=None):
    steps = np.arange(len(rewards))
    return Curve(
        5 * steps,
        np.asarray(100 * steps if evaluations is None else evaluations),
        np.asarray(2.0 * steps if seconds is None else seconds),
        np.asarray(rewards, float),
    )


def test_methods_of_a_file_a_flag_and_recipes(tmp_path):
    (tmp_path / "m.txt").write_text(
        "# all\n\nb: two.py train.x=1 sample.sde_range='(0, 5)'  # more\n"
    )
    assert read_methods(["one.py"], ["a: two.py"], str(tmp_path / "m.txt")) == [
        Method("one", "one.py"),
        Method("a", "two.py"),
        Method("b", "two.py", ("train.x=1", "sample.sde_range=(0, 5)")),
    ]
    assert Method("b", "two.py", ("x=1",)).arguments("seed=2") == [
        "--config=two.py",
        "--config.x=1",
        "--config.seed=2",
    ]
    for lines, message in (
        (["a two.py"], "is no method"),
        (["a: two.py x"], "is no method"),
        (["a:"], "is no method"),
        (["a/b: two.py"], "is no method"),
        (["a: 'two.py"], "is no method"),
        ([], "no methods"),
        (["a: b.py", "a: c.py"], "two methods are named a"),
    ):
        with pytest.raises(UserError, match=message):
            read_methods([], lines, None)
    with pytest.raises(UserError, match="does not exist"):
        read_methods([], [], "/nowhere.txt")


def test_the_shipped_methods_are_sound(monkeypatch):
    monkeypatch.chdir(ROOT)
    for method in read_methods([], [], "configs/compare_tiny_settings.txt"):
        method.config("eval.every=10")
    methods = read_methods([], [], "configs/compare_tiny.txt")
    assert len(methods) >= 6
    configs = {m.name: m.config("seed=3") for m in methods}
    assert (
        comparison_report.differing(
            {k: compare.settings.flat(c.to_dict()) for k, c in configs.items()}
        )
        == []
    )
    assert configs["grpo_guard"].train.objective == "guard" and configs["cps"].seed == 3
    with pytest.raises(UserError, match=r"cps: .*learning_rat"):
        Method("cps", "configs/tiny_ocr.py", ("train.learning_rat=1",)).config()
    with pytest.raises(UserError, match=r"cps: config\.train\.objective='x'"):
        Method("cps", "configs/tiny_ocr.py", ("train.objective=x",)).config()


def test_budgets():
    assert parse_budget("evaluations:200") == ("evaluations", 200) and parse_budget(
        "seconds:1.5"
    ) == ("seconds", 1.5)
    assert compare.budget_settings("epochs", 3) == ("epochs=3",)
    assert compare.budget_settings("seconds", 1.5)[1] == "budget.seconds=1.5"
    for bad in (
        "20",
        "epochs:0",
        "epochs:1.5",
        "hours:2",
        "seconds:-1",
        "seconds:inf",
        "evaluations:many",
    ):
        with pytest.raises(UserError, match="--budget="):
            parse_budget(bad)


def test_a_run_beyond_the_budget_is_refused(tmp_path):
    log = run_log.RunLog(tmp_path)
    for e in (1, 2, 3):
        log.epoch({"epoch": e, "spent_evaluations": 10 * e, "spent_seconds": 1.0 * e})
    log.close()
    for unit, amount in (
        ("evaluations", 21),
        ("seconds", 2.5),
        ("epochs", 3),
        ("evaluations", 500),
    ):
        compare.check_not_beyond(tmp_path, unit, amount)
    for unit, amount in (("evaluations", 20), ("seconds", 2.0), ("epochs", 2)):
        with pytest.raises(UserError, match="has spent more"):
            compare.check_not_beyond(tmp_path, unit, amount)


def test_interval_over_seeds():
    mean, half = t_interval([0.5, 0.7, 0.9])
    assert mean == pytest.approx(0.7) and half == pytest.approx(T2 * 0.2 / 3**0.5)
    assert (
        t_interval([0.5])[0] == 0.5
        and np.isnan(t_interval([0.5])[1])
        and np.isnan(t_interval([])).all()
    )


def test_curves_are_averaged_at_equal_spending():
    """Seeds evaluated at other spendings count on the line between; nothing is told beyond what all
    of them spent.
    """
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


def test_what_a_gain_took():
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
        {name: "r.py <script>" for name in runs} | {"gone": "r.py"},
        runs | {"gone": {}},
        ("evaluations", 200),
        0.15,
        {"gone, seed 0": "error: <b>no</b>"},
        2,
        "python <x>",
        ["eval.steps"],
    )
    lines = comparison_report.write(result, tmp_path / "out")
    text = (tmp_path / "out" / "comparison.html").read_text()
    page = Checker(text)
    assert (
        all(u.startswith("#") for u in page.urls)
        and "script" not in page.tags
        and text.count("<svg") == 4
    )
    assert (
        "m7 ended highest of 8: held-out OCR reward 0.50 → 0.78 ± 0.00 over 3 seeds." in page.text
    )
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
    comparison_report.write(
        Comparison({"gone": "r.py"}, {"gone": {}}, ("epochs", 2), 0.1, {}, 1, "", []),
        tmp_path / "none",
    )
    assert "No run was finished." in (tmp_path / "none" / "comparison.html").read_text()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    convert(str(tiny.write_pipeline(root / "source", seed=3)), root / "model", "float32")
    for name, words in (("train", WORDS[:4]), ("heldout", WORDS[4:])):
        (root / f"{name}.txt").write_text("".join(f'A sign that says "{w}".\n' for w in words))
    path = root / "good.py"
    path.write_text(
        RECIPE.format(
            run="unused",
            model=str(root / "model"),
            train=str(root / "train.txt"),
            heldout=str(root / "heldout.txt"),
        )
    )
    return path


def test_real_runs_under_one_budget(recipe, tmp_path):
    """One method's run ends with its budget, another's fails; the page shows the one and names the
    other.
    """
    env = commands.environment()
    command = commands.command(
        "grpo.compare",
        f"--configs={recipe}",
        f"--out={tmp_path}",
        "--seeds=4",
        f"--method=bad: {recipe} prompts.train=/nowhere.txt",
        "--budget=evaluations:20",
        "--jobs=2",
        "--common=sample.group_size=2 train.updates_per_epoch=1 eval.every=1 "
        f"eval.num_prompts=2 {' '.join(PICTURE)}",
    )
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "1 of 2 runs failed: bad, seed 4" in done.stderr, (
        done.stdout + done.stderr
    )
    assert "/nowhere.txt does not exist" in (tmp_path / "comparison.html").read_text()
    found = comparison_report.read_curve(tmp_path / "good" / "seed4")
    np.testing.assert_array_equal(found.epochs, [0, 1, 2])
    np.testing.assert_array_equal(found.evaluations, [0, 12, 24])
    assert found.seconds[0] == 0 < found.seconds[1] < found.seconds[2]
    assert re.search(r"\| good \| 1 \| .* \| 2 \| 24 \|", (tmp_path / "comparison.md").read_text())
    extra = (
        *command[-1].removeprefix("--common=").split(),
        "seed=4",
        f"run_dir={tmp_path / 'good' / 'seed4'}",
        *compare.budget_settings("evaluations", 20),
    )
    job = Job(Method("good", str(recipe)), 4, tmp_path / "good" / "seed4", extra)
    assert (
        job.finished()
        and not Job(job.method, 4, job.folder, (*extra, "train.learning_rate=0.5")).finished()
    )


def test_later_settings_win():
    method = Method("m", str(ROOT / "configs/tiny_grpo.py"), ("sample.sde_range=(0,5)",))
    assert method.config("sample.sde_range=(0,4)").sample.sde_range == (0, 4)


def until_begun(log):
    """Waits for a run's first line, so that it is no longer starting."""
    deadline = time.time() + 120
    while not (log.is_file() and "attention" in log.read_text()):
        assert time.time() < deadline, log.read_text() if log.is_file() else f"{log} was not begun"
        time.sleep(0.1)


def test_sigterm_stops_the_runs(recipe, tmp_path):
    command = commands.command(
        "grpo.compare",
        f"--configs={recipe}",
        f"--out={tmp_path}",
        "--seeds=4",
        "--budget=epochs:100000",
    )
    with subprocess.Popen(
        command, env=commands.environment(), text=True, stderr=subprocess.PIPE
    ) as process:
        log = tmp_path / "good" / "seed4.log"
        until_begun(log)
        process.terminate()
        assert process.wait(60) == 143 and "Traceback" not in process.stderr.read()
    assert "the same command continues" in log.read_text()


def test_stopping_stops_the_runs(recipe, tmp_path):
    """A run that fails at once is told while another works, which ends with the caller and can be
    continued.
    """
    env = compare.environment(tmp_path, "0", True)
    assert env["CUDA_VISIBLE_DEVICES"] == env["HIP_VISIBLE_DEVICES"] == "0"
    assert (
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        and "compiled" in env["JAX_COMPILATION_CACHE_DIR"]
    )
    jobs = [
        Job(
            Method(name, str(recipe), (setting,)),
            0,
            folder := tmp_path / name / "seed0",
            (f"run_dir={folder}",),
        )
        for name, setting in (("slow", "epochs=100000"), ("bad", "model.path=/nowhere"))
    ]
    runs = compare.run_all(jobs, [env, env])
    job, code, _ = next(runs)
    assert (job.method.name, code) == ("bad", 1) and "/nowhere" in job.failure()
    until_begun(jobs[0].log)
    runs.close()
    assert "the same command continues" in jobs[0].failure()


def test_evaluations_without_a_result_are_no_points_of_a_curve(tmp_path):
    """At its ends they leave nothing to compare."""
    log = run_log.RunLog(tmp_path)
    for epoch in (1, 2, 3):
        log.epoch({"epoch": epoch, "spent_evaluations": 10 * epoch, "spent_seconds": 1.0})

    def evaluated(epoch: int, reward: float) -> None:
        log.evaluation(
            {
                "epoch": epoch,
                "num": 2,
                "rewards": [reward] * 2,
                "prompts": ["a", "b"],
                "texts": ["", ""],
            }
            | dict.fromkeys(("reward", "low", "high"), reward)
        )

    for epoch, reward in enumerate((0.5, float("nan"), 0.7)):
        evaluated(epoch, reward)
    curve = comparison_report.read_curve(tmp_path)
    assert curve.epochs.tolist() == [0, 2] and curve.rewards.tolist() == [0.5, 0.7]
    evaluated(3, float("nan"))
    with pytest.raises(UserError, match="evaluation after epoch 3 scored fewer than two"):
        comparison_report.read_curve(tmp_path)
