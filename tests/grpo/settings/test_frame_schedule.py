"""Lengths by epoch: what is asked for, the programs for each, and a run whose clips grow without
compiling again.
"""

import jax
import numpy as np
import pytest
from tests.grpo.test_programs import run_of, start  # noqa: F401, a fixture

from configs import wan21_1_3b_ocr
from grpo import train
from grpo.compiled import compile
from grpo.compiled.functions import Run
from grpo.records import run_log
from grpo.records.run_log import RunLog
from grpo.settings import frame_schedule, parse
from wan_jax.command_line.cli import UserError

SCHEDULE = ((5, 9), (8, 33))


def test_lengths_by_epoch():
    assert [frame_schedule.at(e, 1, SCHEDULE) for e in range(1, 10)] == [1] * 4 + [9] * 3 + [33] * 2
    assert frame_schedule.at(7, 5, ()) == 5 and frame_schedule.trained(1, ()) == (1,)
    assert frame_schedule.trained(1, ((2, 9), (3, 1), (4, 9))) == (1, 9)
    assert frame_schedule.evaluated(5, 0, ()) == (5,) and frame_schedule.evaluated(
        5, 1, (33, 1, 9)
    ) == (1, 33, 9)


@pytest.mark.parametrize(
    "schedule, eval_frames, more, message",
    [
        (((1, 9),), 9, (), "rising from 2 on"),
        (((5, 9), (5, 33)), 9, (), "rising from 2 on"),
        (((5, 0),), 9, (), "whole numbers"),
        ((5, 9), 9, (), "whole numbers"),
        (((5, 9.0),), 9, (), "whole numbers"),
        (SCHEDULE, 0, (), "eval.frames=0"),
        ((), 0, (9, 0), r"eval.more_frames=\(9, 0\)"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule, eval_frames, more, message):
    recipe = wan21_1_3b_ocr.get_config()
    recipe.update_from_flattened_dict(
        {"sample.frame_schedule": schedule, "eval.frames": eval_frames, "eval.more_frames": more}
    )
    with pytest.raises(UserError, match=message):
        parse.from_config(recipe)


def test_measures_of_quality_need_one_length():
    recipe = wan21_1_3b_ocr.get_config()
    recipe.update_from_flattened_dict({"sample.frame_schedule": SCHEDULE, "eval.frames": 33})
    parse.from_config(recipe)
    recipe.reward.weights.motion = 0.5
    with pytest.raises(UserError, match="motion, which are judged"):
        parse.from_config(recipe)
    flat = parse.flat({"sample": {"frame_schedule": SCHEDULE}})
    assert flat == {"sample.frame_schedule": [[5, 9], [8, 33]]}, "as after JSON"


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
