"""Sizes of videos by epoch and by series, and which settings are refused."""

import re

import pytest

from configs import wan21_1_3b_ocr
from grpo.settings import parse, video_sizes
from grpo.settings.video_sizes import Size
from wan_jax.errors import UserError

SCHEDULE = ((5, 480, 832, 5.0),)
JUDGED = {"eval.height": 480, "eval.width": 832, "eval.shift": 5.0}
SAMPLE = {"frames": 1, "height": 240, "width": 416, "shift": 3.0}
SMALL, LARGE = Size(1, 240, 416, 3.0), Size(1, 480, 832, 5.0)


def recipe_of(**values):
    recipe = wan21_1_3b_ocr.get_config()
    recipe.update_from_flattened_dict({"sample.frames": 1} | values)
    return parse.recipe_from_config(recipe)


def test_sizes_by_epoch():
    """Both schedules together: a length may change while the size stays, and the reverse."""
    sample = SAMPLE | {"frame_schedule": ((7, 9),), "size_schedule": SCHEDULE}
    long = Size(9, 480, 832, 5.0)
    assert [video_sizes.at(e, sample) for e in (1, 4, 5, 6, 7)] == [
        SMALL,
        SMALL,
        LARGE,
        LARGE,
        long,
    ]
    assert video_sizes.trained(sample) == (SMALL, LARGE, long)
    back = SAMPLE | {"frame_schedule": (), "size_schedule": (*SCHEDULE, (9, 240, 416, 3.0))}
    assert video_sizes.trained(back) == (SMALL, LARGE)


def test_costs_of_epochs_follow_their_tokens():
    config = {"sample": SAMPLE | {"frame_schedule": [[9, 9]], "size_schedule": [list(SCHEDULE[0])]}}
    first = video_sizes.relative_cost(1, config)
    assert [video_sizes.relative_cost(e, config) / first for e in (4, 5, 9)] == [1, 4, 12]
    assert video_sizes.relative_cost(7, {}) == video_sizes.relative_cost(7, {"sample": SAMPLE}) == 1


def test_sizes_of_evaluations():
    recipe = recipe_of(**{"eval.more_sizes": ((480, 832, 33), (240, 416, 1, 2.5))})
    judged = video_sizes.judged(recipe)
    assert judged == Size(1, recipe.sample.height, recipe.sample.width, recipe.sample.shift)
    assert video_sizes.more(recipe) == {
        "480x832_33_frames": Size(33, 480, 832, recipe.sample.shift),
        "240x416_1_frames_shift_2.5": Size(1, 240, 416, 2.5),
    }
    assert video_sizes.judged(recipe_of(**JUDGED)) == LARGE


def test_names_tell_sizes_apart():
    other = Size(1, 480, 832, 3.0)
    assert video_sizes.suffix(SMALL, [SMALL]) == ""
    assert video_sizes.suffix(SMALL, [SMALL, LARGE]) == ", 1 x 240 x 416"
    assert video_sizes.suffix(LARGE, [other, LARGE]) == ", 1 frames, shift 5"
    assert video_sizes.suffix(SMALL, [SMALL, Size(9, 240, 416, 3.0)]) == ", 1 frames"


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"sample.size_schedule": ((1, 480, 832, 5.0),)} | JUDGED, "sample.size_schedule=((1,"),
        ({"sample.size_schedule": ((5, 480, 832),)} | JUDGED, "sample.size_schedule=((5,"),
        ({"sample.size_schedule": ((5, 480.0, 832, 5.0),)} | JUDGED, "sample.size_schedule=((5,"),
        ({"sample.size_schedule": ((5, 480, 832, 0.0),)} | JUDGED, "sample.size_schedule=((5,"),
        ({"sample.size_schedule": (*SCHEDULE, *SCHEDULE)} | JUDGED, "sample.size_schedule=((5,"),
        ({"sample.size_schedule": (5, 480, 832, 5.0)} | JUDGED, "sample.size_schedule=(5,"),
        ({"sample.size_schedule": SCHEDULE}, "now they are 0, 0 and None"),
        ({"eval.height": 480, "eval.width": 832}, "eval.shift=None"),
        ({"eval.height": 480}, "eval.width=0"),
        ({"eval.more_sizes": ((480, 832),)}, "eval.more_sizes=((480, 832),)"),
        ({"eval.more_sizes": ((480, 832, 1, -1.0),)}, "eval.more_sizes=((480, 832, 1, -1.0),)"),
        ({"eval.more_sizes": ((480, 832, 1),) * 2}, "eval.more_sizes=((480, 832, 1),"),
        ({"eval.more_sizes": (480, 832, 1)}, "eval.more_sizes=(480, 832, 1)"),
        ({"eval.more_sizes": ((480, 832, 1, 5.0),)} | JUDGED, "the run is judged, 1 x 480 x 832"),
    ],
)
def test_wrong_sizes_are_refused(values, found):
    with pytest.raises(UserError, match=re.escape(found)):
        recipe_of(**values)


def test_measures_of_quality_need_one_size():
    values = {"sample.size_schedule": SCHEDULE, "reward.weights.motion": 0.5} | JUDGED
    with pytest.raises(UserError, match=r"reward\.weights has motion.*sample\.size_schedule"):
        recipe_of(**values)


@pytest.mark.parametrize(
    ("key", "schedule"), [("frame_schedule", ((5, 9),)), ("size_schedule", SCHEDULE)]
)
def test_data_with_the_noise_of_the_rollout_need_videos_of_one_size(key, schedule):
    """Noise is drawn in the shape of the videos, which is the data's only until the size changes."""
    values = {f"sample.{key}": schedule, "data.path": "data", "eval.frames": 1} | JUDGED
    recipe_of(**values)
    with pytest.raises(UserError, match=rf"data\.noise=rollout.*sample\.{key}="):
        recipe_of(**values, **{"data.noise": "rollout"})
