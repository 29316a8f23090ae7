"""A run whose videos grow by epoch: the programs for each length and size, compiled once."""

import pathlib
import shutil

import numpy as np
import pytest

from configs import wan21_1_3b_ocr
from grpo import setup, train
from grpo.compiled import compile
from grpo.compiled.functions import Functions
from grpo.records import run_log
from grpo.records.run_log import RunLog
from tests.grpo.compiled_names import compiled_names
from tests.grpo.specs import functions_of
from tests.grpo.tiny_run import assert_same, result

SCHEDULE = ((5, 9), (8, 33))


def test_programs_for_every_length():
    run = functions_of(
        wan21_1_3b_ocr,
        "wan2.1-1.3b",
        **{
            "sample.frames": 1,
            "sample.frame_schedule": SCHEDULE,
            "sample.height": 64,
            "sample.width": 64,
            "eval.frames": 1,
            "eval.more_frames": (5, 33),
        },
    )
    frames = [f"{n} frames" for n in (1, 9, 33)]
    assert [p.name for p in run.programs()] == [
        *(f"{what}, {n}" for n in frames for what in ("rollout step", "update")),
        *(f"evaluation step, {n} frames" for n in (1, 5, 33)),
        *(f"decode, {n}" for n in frames),
        "evaluation decode, 5 frames",
    ]
    steps = [p for p in run.programs() if p.name.startswith("rollout")]
    assert {p.jitted for p in steps} == {run.steps[0]}
    assert [p.args[2].shape[1] for p in steps] == [1, 3, 9]
    data = [compile.data_bytes(p) for p in steps]
    assert data[0] < data[1] < data[2]


@pytest.mark.slow
def test_clips_grow_and_nothing_compiles_again(start, capsys, monkeypatch):
    spec, *rest = start(
        1,
        **{
            "sample.frame_schedule": ((2, 5),),
            "eval.frames": 1,
            "eval.more_frames": (5,),
            "epochs": 3,
            "eval.every": 3,
            "save.every": 3,
        },
    )
    assert spec.shape_of(5)[0] == 2 and spec.evaluated_frames == (1, 5)
    # with functions of its own: what it compiles is counted
    monkeypatch.setattr(setup, "Functions", Functions)
    seen = compiled_names()
    train.train(spec, *rest)
    names = ("rollout_step", "update", "ode_step", "decode")
    assert [seen.count(f"jit({name})") for name in names] == [2] * 4
    out, run = capsys.readouterr().out, spec.recipe.run_dir
    assert "compiled again" not in out and out.count(", 5 frames\n") == 2
    assert [m["frames"] for m in run_log.read_metrics(run)] == [1, 5, 5]
    more = run_log.read_evaluations(run, 5)
    epochs = [r["epoch"] for r in run_log.read_evaluations(run)]
    assert [r["epoch"] for r in more] == epochs == [0, 3]
    assert run_log.read_previews(run, 3).shape[1] == 1
    assert all(np.isfinite(r["reward"]) for r in more)
    # a run that goes on after epoch 2 makes the evaluations after it again
    RunLog(run, 2)
    assert [r["epoch"] for r in run_log.read_evaluations(run, 5)] == [0]


def test_programs_for_every_size():
    """Sizes of one shift share what is jitted; another shift has other noise levels, so functions of
    its own.
    """
    run = functions_of(
        wan21_1_3b_ocr,
        "wan2.1-1.3b",
        **{
            "sample.frames": 1,
            "sample.height": 64,
            "sample.width": 64,
            "sample.shift": 3.0,
            "sample.size_schedule": ((5, 64, 128, 3.0), (8, 128, 128, 5.0)),
            "eval.frames": 1,
            "eval.height": 64,
            "eval.width": 64,
            "eval.shift": 3.0,
            "eval.more_sizes": ((128, 128, 1, 5.0),),
        },
    )
    sizes = ["1 x 64 x 64", "1 x 64 x 128", "1 x 128 x 128"]
    programs = run.programs()
    assert [p.name for p in programs] == [
        *(f"{what}, {size}" for size in sizes for what in ("rollout step", "update")),
        *(f"evaluation step, {size}" for size in (sizes[0], sizes[2])),
        *(f"decode, {size}" for size in sizes),
    ]
    assert [p.args[2].shape[2:4] for p in programs[:6:2]] == [(8, 8), (8, 16), (16, 16)]
    for kind in (programs[:6:2], programs[1:6:2]):
        first, same, other = (p.jitted for p in kind)
        assert first is same and first is not other
    assert programs[6].jitted is not programs[7].jitted
    assert run.of_epoch(4) is run.of_epoch(1) and run.of_epoch(9).steps is run.of_epoch(8).steps
    assert run.of_epoch(1).steps is run.steps and run.of_series(1).eval_steps is run.eval_steps
    tables = [run.of_epoch(epoch).table for epoch in (1, 5, 8)]
    assert tables[0] is tables[1] and tables[0].sigma[3] < tables[2].sigma[3]


@pytest.mark.slow
def test_a_run_that_changes_its_size_goes_on_bit_for_bit(start, capsys):
    """Also where it is stopped right before the change, or after it."""
    values = {
        "sample.size_schedule": ((2, 32, 32, 5.0),),
        "eval.height": 16,
        "eval.width": 32,
        "eval.shift": 3.0,
        "eval.more_sizes": ((32, 32, 1, 5.0),),
        "eval.every": 3,
        "epochs": 3,
    }
    spec, *rest = start(1, **values)
    train.train(spec, *rest)
    out, run = capsys.readouterr().out, pathlib.Path(spec.recipe.run_dir)
    assert "compiled again" not in out and out.count(", 32x32 1 frame shift 5\n") == 2
    whole = result(run)
    assert [(m["height"], m["width"], m["shift"]) for m in run_log.read_metrics(run)] == [
        (16, 32, 3.0),
        (32, 32, 5.0),
        (32, 32, 5.0),
    ]
    assert all(m["grad_norm"] > 0 for m in run_log.read_metrics(run))
    assert run_log.read_previews(run, 3).shape[2:4] == (16, 32)
    own = run_log.read_evaluations(run)
    more = run_log.read_evaluations(run, "32x32_1_frames_shift_5")
    assert [r["epoch"] for r in own] == [r["epoch"] for r in more] == [0, 3]
    assert own[0]["reward"] != more[0]["reward"]
    for stop in (1, 2):
        for epoch in range(stop + 1, 4):
            shutil.rmtree(run / "checkpoints" / str(epoch), ignore_errors=True)
        train.train(spec, *rest)
        assert "continuing" in capsys.readouterr().out
        assert_same(result(run), whole)


@pytest.mark.slow
def test_nft_samples_by_a_solver_of_second_order(start, tmp_path):
    """As in its own code; evaluations stay the same."""
    rewards = {}
    values = {"train.method": "nft", "train.timesteps": 2, "epochs": 1, "eval.every": 9}
    values |= {"train.updates_per_epoch": 1}
    for solver in ("euler", "dpmpp_2m"):
        changed = {"sample.ode_solver": solver, "run_dir": str(tmp_path / solver)}
        spec, *rest = start(1, **values, **changed)
        train.train(spec, *rest)
        (record,) = run_log.read_metrics(spec.recipe.run_dir)
        assert record["grad_norm"] > 0
        base = run_log.read_evaluations(spec.recipe.run_dir)[0]["reward"]
        rewards[solver] = base, record["reward_mean"]
    first, second = rewards["euler"], rewards["dpmpp_2m"]
    assert first[0] == second[0] and first[1] != second[1]
