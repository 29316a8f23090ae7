"""Settings that a run does not read are named at its start."""

import importlib

import pytest

from configs.defaults import defaults
from grpo import methods
from grpo.settings.schema import SETTINGS, make_recipe, values_of
from grpo.settings.unused import changed_in_vain, unread

RECIPES = (
    "quickstart",
    "tiny_grpo",
    "tiny_ocr",
    "wan21_14b_ocr",
    "wan21_1_3b_ocr",
    "wan22_a14b_ocr",
    "wan22_ti2v_5b_ocr",
    "wan22_ti2v_5b_nft",
    "wan22_ti2v_5b_nft_careful",
)


@pytest.mark.parametrize("method", methods.names())
def test_only_settings_that_exist_are_named(method):
    kind = methods.method_class(method)
    assert {*kind.reads, *kind.variants} <= SETTINGS.keys()
    c = defaults()
    c.train.method = method
    assert unread(c).keys() <= SETTINGS.keys() and changed_in_vain(c) == []


@pytest.mark.parametrize("name", RECIPES)
def test_our_recipes_set_nothing_in_vain(name):
    assert changed_in_vain(importlib.import_module(f"configs.{name}").get_config()) == []


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"train.clip_low": 1e-4, "sample.sde_steps": 2},
            "sample.sde_steps, train.clip_low (train.method=nft)",
        ),
        ({"train.method": "grpo", "train.nft_beta": 1.0}, "train.nft_beta (train.method=grpo)"),
        ({"train.method": "dpo", "train.kl_weight": 1.0}, "train.kl_weight (train.method=dpo)"),
        (
            {"train.method": "sft", "train.advantage_clip": 1.0},
            "train.advantage_clip (train.method=sft)",
        ),
        (
            {"train.method": "grpo", "train.divergence": 1.0},
            "train.divergence (train.objective=clip)",
        ),
        (
            {"train.method": "grpo", "train.kl_horizon": 1.0},
            "train.kl_horizon (train.kl_target=None)",
        ),
        (
            {
                "sample.guidance": 1.0,
                "eval.guidance": 1.0,
                "prompts.negative": "ugly",
                "eval.guidance_2": 3.0,
            },
            "eval.guidance_2 (eval.guidance=1.0); prompts.negative (no guidance)",
        ),
        ({"train.kl_horizon": 1.0}, "train.kl_horizon (train.method=nft)"),
        (
            {"epochs": 4, "sample.frame_schedule": ((5, 9), (6, 13))},
            "sample.frame_schedule (epochs=4)",
        ),
        ({"lora.rank": 0, "lora.alpha": 1.0}, "lora.alpha (lora.rank=0)"),
        ({"data.weight": 0.0}, "data.weight (data.path is empty)"),
        (
            {"data.path": "signs", "data.weight": 0.0, "data.batch_size": 3},
            "data.batch_size, data.path (data.weight=0)",
        ),
        (
            {"data.path": "signs", "data.only": True, "train.method": "sft", "train.timesteps": 2},
            "train.timesteps (data.only=True)",
        ),
        (
            {"reward.patience": 1.0, "log.wandb.entity": "us"},
            "log.wandb.entity (log.wandb.project is empty); reward.patience (reward.servers=())",
        ),
    ],
)
def test_what_is_changed_in_vain_is_named_with_its_cause(settings, line):
    c = defaults()
    c.update_from_flattened_dict(settings)
    for recipe in (c, make_recipe(values_of(c))):
        assert changed_in_vain(recipe) == [f"settings without effect in this run: {line}"]


@pytest.mark.parametrize(
    "settings",
    [
        {"train.nft_beta": 1.0},
        {"train.method": "grpo", "train.clip_low": 1e-4},
        {"train.method": "rwr", "train.temperature": 2.0},
        {"train.method": "sft", "reward.combine": "advantages", "train.advantage_std": "global"},
        *({"train.method": name, "train.advantage_clip": 1.0} for name in ("awm", "dgpo", "rvm")),
        {"reward.servers": ("http://a",), "reward.timeout": 9.0},
        {"reward.weights.clip": 1.0, "reward.clip_model": "clip"},
    ],
)
def test_what_is_read_is_not_named(settings):
    c = defaults()
    c.update_from_flattened_dict(settings)
    assert changed_in_vain(c) == []
