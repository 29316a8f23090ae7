"""Numbers of frames by epoch, and which schedules are refused."""

import re

import pytest

from configs import wan21_1_3b_ocr
from grpo.settings import frame_schedule, parse
from wan_jax.command_line.cli import UserError

SCHEDULE = ((5, 9), (8, 33))


def test_lengths_by_epoch():
    assert [frame_schedule.at(e, 1, SCHEDULE) for e in range(1, 10)] == [1] * 4 + [9] * 3 + [33] * 2
    assert frame_schedule.at(7, 5, ()) == 5
    assert frame_schedule.evaluated(5, 0, ()) == (5,) and frame_schedule.evaluated(
        5, 1, (33, 1, 9)
    ) == (1, 33, 9)


@pytest.mark.parametrize(
    ("schedule", "eval_frames", "more", "message"),
    [
        (((1, 9),), 9, (), "sample.frame_schedule=((1, 9),)"),
        (((5, 9), (5, 33)), 9, (), "sample.frame_schedule=((5, 9), (5, 33))"),
        (((5, 0),), 9, (), "sample.frame_schedule=((5, 0),)"),
        ((5, 9), 9, (), "sample.frame_schedule=(5, 9)"),
        (((5, 9.0),), 9, (), "sample.frame_schedule=((5, 9.0),)"),
        (((5, 9, 1),), 9, (), "sample.frame_schedule=((5, 9, 1),)"),
        (SCHEDULE, 0, (), "eval.frames=0"),
        ((), 0, (9, 0), "eval.more_frames=(9, 0)"),
    ],
)
def test_wrong_schedules_are_refused(schedule, eval_frames, more, message):
    recipe = wan21_1_3b_ocr.get_config()
    recipe.update_from_flattened_dict(
        {"sample.frame_schedule": schedule, "eval.frames": eval_frames, "eval.more_frames": more}
    )
    with pytest.raises(UserError, match=re.escape(f"config.{message}")):
        parse.recipe_from_config(recipe)


def test_measures_of_quality_need_one_length():
    recipe = wan21_1_3b_ocr.get_config()
    recipe.update_from_flattened_dict({"sample.frame_schedule": SCHEDULE, "eval.frames": 33})
    parse.recipe_from_config(recipe)
    recipe.reward.weights.motion = 0.5
    with pytest.raises(UserError, match=r"config\.reward\.weights has motion"):
        parse.recipe_from_config(recipe)
    flat = parse.flat({"sample": {"frame_schedule": SCHEDULE}})
    assert flat == {"sample.frame_schedule": [[5, 9], [8, 33]]}, "as after JSON"
