"""The example of a user's own reward: its values, and that its recipe is one."""

import numpy as np
import pytest

from configs.defaults import defaults
from examples.redness import recipe, redness
from grpo.data.prompts import epoch_prompts
from grpo.scoring.scored_prompts import load_scored_prompts
from grpo.settings import parse
from rewards.base import PromptRecord

RECORD = PromptRecord((), "a sign")


def video(*colour):
    return np.full((2, 4, 6, 3), colour, np.uint8)


def test_redness():
    score = redness.Redness().score
    assert score(video(255, 0, 0), RECORD) == 1 and score(video(0, 255, 255), RECORD) == -1
    for colour in ((90, 90, 90), (200, 40, 7)):
        parts = redness.ChannelParts().score(video(*colour), RECORD)
        assert sum(parts.values()) == pytest.approx(score(video(*colour), RECORD))


def test_win_rate():
    score = redness.WinRate().score_group
    videos = [video(255, 0, 0), video(9, 9, 9), video(0, 255, 0), video(9, 9, 9)]
    assert score(videos, RECORD) == pytest.approx([1, 1.5 / 3, 0, 1.5 / 3])
    assert score(videos[:1], RECORD) == [0.5]


def test_the_recipe_needs_no_text_in_its_prompts():
    checked = parse.recipe_from_config(recipe.get_config())
    settings = parse.settings_of(checked)
    assert settings.weights == {"dark": 0.0, "red": 1.0}
    assert settings.main == "red"
    assert defaults().reward.weights.ocr == 1.0
    sets = [
        load_scored_prompts(path, checked.reward, settings.weights)
        for path in (checked.prompts.train, checked.prompts.heldout)
    ]
    assert not set(sets[0].prompts) & set(sets[1].prompts) and not any(sets[0].targets)
    assert len(epoch_prompts(0, 0, len(sets[0]), checked.sample.groups)) == checked.sample.groups
