"""A run whose videos grow by epoch: the programs for each length, compiled once."""

import jax
import numpy as np

from configs import wan21_1_3b_ocr
from grpo import train
from grpo.compiled import compile
from grpo.compiled.functions import Run
from grpo.records import run_log
from grpo.records.run_log import RunLog
from tests.grpo.compiled.test_functions import run_of, start  # noqa: F401, a fixture

SCHEDULE = ((5, 9), (8, 33))


def test_programs_for_every_length():
    run = run_of(
        wan21_1_3b_ocr, "wan2.1-1.3b", frames=1, frame_schedule=SCHEDULE, height=64, width=64
    )
    run.recipe.eval.frames, run.recipe.eval.more_frames = 1, (5, 33)
    frames = [f"{n} frames" for n in (1, 9, 33)]
    assert [p.name for p in run.programs()] == [
        *(f"{what}, {n}" for n in frames for what in ("rollout step", "update")),
        *(f"evaluation step, {n} frames" for n in (1, 5, 33)),
        *(f"decode, {n}" for n in frames),
        "evaluation decode, 5 frames",
    ]
    steps = [p for p in run.programs() if p.name.startswith("rollout")]
    assert {p.jitted for p in steps} == {run.steps[0]} and [p.args[2].shape[1] for p in steps] == [
        1,
        3,
        9,
    ]
    data = [compile.data_bytes(p) for p in steps]
    assert data[0] < data[1] < data[2]


def test_clips_grow_and_nothing_compiles_again(start, capsys, monkeypatch):  # noqa: F811
    c, s, plan, *rest = start(
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
    assert plan.shapes[5][0] == 2 and plan.eval_frames == (1, 5)
    monkeypatch.setattr(train, "Run", Run)  # with programs of its own: what it compiles is counted
    seen = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, fun_name="", **__: (
            seen.append(fun_name) if event == compile.COMPILED else None
        )
    )
    train.train(c, s, plan, *rest)
    assert [
        seen.count(f"jit({name})") for name in ("rollout_step", "update", "ode_step", "decode")
    ] == [2] * 4
    out = capsys.readouterr().out
    assert "compiled again" not in out and out.count(", 5 frames\n") == 2
    assert [m["frames"] for m in run_log.read_metrics(c.run_dir)] == [1, 5, 5]
    more = run_log._read_lines(RunLog(c.run_dir, 3).folder / "evals_5_frames.jsonl")
    assert (
        [r["epoch"] for r in more]
        == [r["epoch"] for r in run_log.read_evaluations(c.run_dir)]
        == [0, 3]
    )
    assert run_log.read_previews(c.run_dir, 3).shape[1] == 1
    assert all(np.isfinite(r["reward"]) for r in more)
    assert [
        r["epoch"]
        for r in run_log._read_lines(RunLog(c.run_dir, 2).folder / "evals_5_frames.jsonl")
    ] == [0]
