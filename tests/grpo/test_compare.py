"""Comparisons: methods, budgets, and real runs that end, fail or are stopped."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import time

import numpy as np
import pytest

from convert.from_diffusers import convert
from grpo import compare
from grpo.compare import Job, Method, read_methods
from grpo.records import run_log
from grpo.report import comparison_report
from grpo.settings.budget import budget_settings
from grpo.settings.validation import flat
from tests import commands, tiny
from tests.grpo.records import run_folders
from wan_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = """
from configs.defaults import defaults

def get_config():
    c = defaults()
    c.run_dir, c.epochs = "unused", 3
    c.model.path, c.model.dtype, c.model.remat = {model!r}, "float32", "none"
    c.lora.rank = 4
    c.prompts.train, c.prompts.heldout = {train!r}, {heldout!r}
    c.sample.height, c.sample.width, c.sample.guidance = 64, 64, 1.0
    c.sample.steps, c.sample.sde_steps, c.sample.sde_range = 3, 2, (0, 3)
    c.sample.groups, c.sample.group_size, c.sample.batch_size = 2, 2, 4
    c.train.method, c.train.updates_per_epoch = "grpo", 1
    c.eval.every, c.eval.num_prompts, c.eval.steps, c.eval.guidance, c.eval.previews = 1, 2, 2, 1.0, 2
    c.save.every = 1
    c.reward.workers = 0
    return c
"""


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
    expected = re.escape(compare.EXPECTED)
    for lines, message in (
        (["a two.py"], expected),
        (["a: two.py x"], expected),
        (["a:"], expected),
        (["a/b: two.py"], expected),
        (["a: 'two.py"], expected),
        ([], "no methods"),
        (["a: b.py", "a: c.py"], "two methods are named a"),
    ):
        with pytest.raises(UserError, match=message):
            read_methods([], lines, None)
    with pytest.raises(UserError, match=r"--methods.*/nowhere\.txt"):
        read_methods([], [], "/nowhere.txt")


def test_the_shipped_methods_are_sound(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = sorted(ROOT.glob("configs/compare_*.txt"))
    assert len(files) >= 5
    for path in files:
        configs = [m.config("eval.every=10") for m in read_methods([], [], str(path))]
        few = path.stem == "compare_steps"
        assert few or {c.sample.steps for c in configs} == {10}, path  # one budget of evaluations
    steps = [m.config("seed=3") for m in read_methods([], [], "configs/compare_steps.txt")]
    assert {c.sample.steps for c in steps} == {4, 6, 10} and all(c.eval.steps == 10 for c in steps)
    methods = read_methods([], [], "configs/compare_tiny.txt")
    assert len(methods) >= 6
    configs = {m.name: m.config("seed=3") for m in methods}
    assert comparison_report.differing({k: flat(c.to_dict()) for k, c in configs.items()}) == []
    assert configs["grpo_guard"].train.objective == "guard" and configs["cps"].seed == 3
    with pytest.raises(UserError, match=r"cps: .*learning_rat"):
        Method("cps", "configs/tiny_ocr.py", ("train.learning_rat=1",)).config()
    with pytest.raises(UserError, match=r"cps: config\.train\.objective='x'"):
        Method("cps", "configs/tiny_ocr.py", ("train.objective=x",)).config()


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
        with pytest.raises(UserError, match=f"{tmp_path} .*{unit}:{amount:g}"):
            compare.check_not_beyond(tmp_path, unit, amount)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    convert(str(tiny.write_pipeline(root / "source", seed=3)), root / "model", "float32")
    for name, words in (("train", "open exit cafe salt"), ("heldout", "moon tide fern lamp")):
        lines = [f'A sign that says "{word}".\n' for word in words.split()]
        (root / f"{name}.txt").write_text("".join(lines))
    path = root / "good.py"
    path.write_text(
        RECIPE.format(
            model=str(root / "model"),
            train=str(root / "train.txt"),
            heldout=str(root / "heldout.txt"),
        )
    )
    return path


def test_lost_folders_are_named_before_any_run(recipe, tmp_path):
    good = Method("good", str(recipe))
    compare.check_folders([good], ())
    bad = dataclasses.replace(good, name="bad", overrides=("data.path=/lost/data",))
    common = (f"model.path={tmp_path}/none",)
    with pytest.raises(UserError) as error:
        compare.check_folders([good, bad], common)
    named = f"model.path={tmp_path}/none (of good, bad); data.path=/lost/data (of bad)"
    assert named in str(error.value)


@pytest.mark.slow
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
        "--common=train.learning_rate=1e-3 lora.rank=2",
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
        *budget_settings("evaluations", 20),
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


@pytest.mark.slow
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


def test_environment_of_a_run(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    env = compare.environment(tmp_path, "3", shared=True)
    assert env["CUDA_VISIBLE_DEVICES"] == env["HIP_VISIBLE_DEVICES"] == "3"
    assert env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert env["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compiled")
    env = compare.environment(tmp_path, None, shared=False)
    assert not {"CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_PREALLOCATE"} & (
        env.keys() - os.environ.keys()
    )
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert (
        compare.environment(tmp_path, None, shared=False)["JAX_COMPILATION_CACHE_DIR"]
        == "/elsewhere"
    )


@pytest.mark.slow
def test_stopping_stops_the_runs(recipe, tmp_path):
    """A run that fails at once is reported while another works, which ends with the caller."""
    env = compare.environment(tmp_path, "0", shared=True)
    jobs = []
    for name, setting in (("slow", "epochs=100000"), ("bad", "model.path=/nowhere")):
        folder = tmp_path / name / "seed0"
        method = Method(name, str(recipe), (setting,))
        jobs.append(Job(method, 0, folder, (f"run_dir={folder}",)))
    runs = compare.run_all(jobs, [env, env])
    job, code, _ = next(runs)
    assert (job.method.name, code) == ("bad", 1) and "/nowhere" in job.failure()
    until_begun(jobs[0].log)
    runs.close()
    assert "the same command continues" in jobs[0].failure()


def test_failure_of_a_run_without_output(tmp_path):
    job = Job(Method("a", "a.py"), 3, tmp_path / "a" / "seed3", ())
    assert (str(job), job.failure()) == ("a, seed 3", "no output")
    job.folder.parent.mkdir()
    job.log.write_text("first\n\n last \n\n")
    assert job.failure() == "last"


def test_a_finished_run_without_a_curve_is_a_failure(tmp_path):
    jobs = [Job(Method("a", "a.py"), seed, tmp_path / "a" / f"seed{seed}", ()) for seed in (0, 1)]
    for job in jobs:
        log = run_log.RunLog(job.folder)
        if job.seed:
            log.evaluation(run_folders.evaluation(0))
        log.close()
    comparison = comparison_report.Comparison(
        methods={"a": "a.py"},
        runs={},
        budget=("epochs", 1),
        reach=0.1,
        failures={},
        parallel=1,
        command="",
        differing=[],
    )
    lines = compare.write_comparison(comparison, jobs, {"b, seed 0": "killed"}, tmp_path)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert list(found["runs"]["a"]) == ["1"] and any(line.startswith("| a | 1 |") for line in lines)
    assert set(found["failures"]) == {"a, seed 0", "b, seed 0"}
    assert str(jobs[0].folder) in found["failures"]["a, seed 0"]
