"""A run whose videos grow by epoch: the programs for each length, compiled once."""

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
