"""The prompts of a recipe: what the rewards read of them."""

import re

import pytest

from configs.defaults import defaults
from grpo.data.prompts import PromptSet, examples, load_prompts
from grpo.scoring.scored_prompts import for_rewards, fps_of, load_scored_prompts, targets_check
from rewards.base import PromptRecord
from rewards.ocr.targets import parse_targets
from wan_jax.command_line.cli import UserError
from wan_jax.models import presets


def test_prompts_need_text_only_where_text_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a red sign", "id": 3}\n{"prompt": "a sign \\"OPEN\\""}\n')
    config = defaults().reward
    prompts = load_scored_prompts(path, config, {"red": 1.0})
    assert prompts.targets == ((), ("OPEN",)) and examples(prompts)[0] == "prompt: a red sign"
    asked = for_rewards(prompts, {"red": 1.0}, 24.0)
    assert asked.targets[0] == PromptRecord((), "a red sign", {"id": 3}, 24.0)
    config.weights.ocr = 0.0
    with pytest.raises(UserError, match=r"line 1.*\n.*weights\.ocr=0\.0|weights\.ocr=0\.0"):
        load_scored_prompts(path, config, {"ocr": 0.0, "red": 1.0})


def test_frame_rates_of_the_models():
    assert fps_of(presets.PRESETS["wan2.2-ti2v-5b"]) == 24
    assert fps_of(presets.PRESETS["wan2.1-1.3b"]) == 16


def test_prompts_are_given_to_rewards_that_need_them():
    plain = PromptSet(("a sign",), (("open",),))
    assert for_rewards(plain, {"ocr": 1.0, "motion": 0.1}) is plain
    prompts = for_rewards(plain, {"ocr": 1.0, "clip": 0.1})
    assert prompts.targets == (PromptRecord(("open",), "a sign"),)


def test_prompts_that_the_engine_cannot_read_are_listed_by_line(tmp_path):
    path, config = tmp_path / "a.jsonl", defaults().reward
    path.write_text(
        '{"prompt": "A \\"OPEN\\""}\n{"prompt": "A \\"МОСКВА\\""}\n{"prompt": "x", "targets": '
        '["서울"]}\n',
        encoding="utf-8",
    )
    with pytest.raises(UserError, match=re.escape("2 of 3 lines cannot be scored")) as error:
        load_prompts(path, parse_targets, check=targets_check(config))
    for part in (
        "line 2: the OCR engine rapidocr cannot read М, О, С, К, В, А of 'МОСКВА'",
        "line 3: ",
        "서, 울",
    ):
        assert part in str(error.value)
    config.weights.ocr = 0.0
    assert targets_check(config) is None
    config.weights.ocr, config.servers = 1.0, ("http://host:8000",)
    assert targets_check(config) is None
