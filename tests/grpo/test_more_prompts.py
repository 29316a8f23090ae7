"""Evaluations on further prompts, `eval.more_prompts`, and of the best of N: recorded apart."""

import subprocess

import numpy as np
import pytest

from grpo.records import run_log
from grpo.records.run_log import RunLog
from grpo.scoring.run_evaluations import not_evaluated
from grpo.scoring.scored_prompts import load_more_prompts
from grpo.settings import parse
from tests import commands
from tests.grpo.here import train_here
from tests.grpo.tiny_run import config_of, recipe_text
from wan_jax.errors import UserError

MORE = ("long words", "a few more", "of them all")


def write_more(folder):
    """Write a further file of prompts and return its path."""
    path = folder / "long.txt"
    path.write_text("".join(f'A sign with a long text that says "{text}".\n' for text in MORE))
    return path


@pytest.fixture
def with_more(recipe):
    """(Config file, run folder, the setting) with a further file of prompts."""
    config, run = recipe
    return config, run, f"eval.more_prompts=long={write_more(config.parent)}"


def recipe_of(folder, value):
    """Return a checked recipe with these further prompts; its model is not read."""
    text = recipe_text("model", str(folder))
    return parse.recipe_from_config(config_of(text, **{"eval.more_prompts": value}))


@pytest.mark.parametrize("name", ["33", "a-b", "long"])
def test_wrong_names_and_files_are_errors(tmp_path, name):
    path = "" if name == "long" else "x.txt"
    with pytest.raises(UserError, match=f"config.eval.more_prompts has {name}='{path}'"):
        recipe_of(tmp_path, {name: path})


def test_files_are_read_up_to_the_number_of_prompts(tmp_path):
    path = str(write_more(tmp_path))
    loaded = recipe_of(tmp_path, {"long": path, "other": path})
    found = load_more_prompts(loaded, {"ocr": 1.0})
    assert [*found] == ["long", "other"] and found["long"].targets == tuple((t,) for t in MORE)
    with pytest.raises(UserError, match=r"missing\.txt"):
        load_more_prompts(recipe_of(tmp_path, f"x={path}.missing.txt"), {"ocr": 1.0})


def test_evaluations_that_are_missing_are_found_by_name(tmp_path):
    log = RunLog(tmp_path)
    record = {"epoch": 2, "reward": 0.5, "low": 0.4, "high": 0.6, "num": 1}
    record |= {"rewards": [0.5], "prompts": ["a"], "texts": [""]}
    log.evaluation(record)
    log.evaluation(record, series="long")
    assert not_evaluated(str(tmp_path), 2, (1, 9, "long", "short")) == (9, "short")
    assert run_log.other_series(tmp_path) == ["long"]
    RunLog(tmp_path, 1)  # a run that goes on after epoch 1 makes them again
    assert not_evaluated(str(tmp_path), 2, (1, "long")) == (1, "long")


@pytest.mark.slow
def test_a_run_evaluates_them_apart_and_goes_on(with_more, capsys):
    config, run, more = with_more
    settings = ("reward.weights.edges=1.0", "epochs=2", "eval.every=1", more)
    train_here(config, *settings)
    out = capsys.readouterr().out
    assert out.count(", prompts long\n") == 3 and "compiled again" not in out
    own, others = run_log.read_evaluations(run), run_log.read_evaluations(run, "long")
    assert [r["epoch"] for r in own] == [r["epoch"] for r in others] == [0, 1, 2]
    assert [len(r["rewards"]) for r in others] == [3] * 3 and [len(r["rewards"]) for r in own] == [
        4
    ] * 3
    assert all(MORE[0] in r["prompts"][0] for r in others)
    assert "Other evaluations" in (run / "report.html").read_text()
    # one that was cut off is made when the run goes on, with the same result
    lines = (run / "evals_long.jsonl").read_text().splitlines(keepends=True)
    (run / "evals_long.jsonl").write_text("".join(lines[:2]))
    train_here(config, *settings)
    again = run_log.read_evaluations(run, "long")
    assert [r["epoch"] for r in again] == [0, 1, 2] and again[2]["measures"] == others[2][
        "measures"
    ]
    assert len(run_log.read_evaluations(run)) == 3
    # a training prompt is refused
    train_file = config.parent / "train.txt"
    with pytest.raises(UserError, match="held-out prompts are training prompts too"):
        train_here(config, *settings[:3], f"eval.more_prompts=x={train_file}", f"run_dir={run}2")


@pytest.mark.slow
def test_the_best_of_n_begins_with_the_evaluation_of_one(with_more, tmp_path):
    """`python -m grpo.evaluate --best_of`: the first candidate of each prompt is the plain video."""
    config, _, more = with_more
    found = {}
    for best_of in (1, 3):
        done = subprocess.run(
            commands.command(
                "grpo.evaluate",
                f"--config={config}",
                f"--config.{more}",
                "--config.eval.more_sizes=((32,32,1,5.0),)",
                "--config.reward.weights.ocr=None",
                "--config.reward.weights.edges=1.0",
                "--config.reward.panel=()",
                f"--best_of={best_of}",
                f"--out={tmp_path / str(best_of)}",
            ),
            capture_output=True,
            text=True,
            env=commands.environment(),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found[best_of] = [
            run_log.read_evaluations(tmp_path / str(best_of), series)[0]
            for series in (None, "long")
        ]
    assert "the same reader (edges) chose" in done.stdout
    assert done.stdout.count(", 32x32 1 frame shift 5\n") == 1
    large = run_log.read_evaluations(tmp_path / "3", "32x32_1_frames_shift_5")[0]
    assert large["prompts"] == found[3][0]["prompts"] and large["reward"] != found[3][0]["reward"]
    for one, three in zip(found[1], found[3]):
        assert "best_of" not in one and three["best_of"]["candidates"] == 3
        first = three["best_of"]["curve"][0]
        assert first["candidates"] == 1 and first["judge"] == pytest.approx(one["reward"], abs=1e-4)
        assert np.all(np.array(three["rewards"]) >= np.array(one["rewards"]) - 1e-4)
        assert three["reward"] > one["reward"] and three["prompts"] == one["prompts"]
