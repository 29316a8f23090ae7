"""Settings that a run does not read are named at its start."""

import importlib

import pytest
from tests.grpo.test_recipes import RECIPES

from configs.defaults import defaults
from grpo.settings.limits import flat
from grpo.settings.unused import changed_in_vain, unread

METHODS = ("grpo", "nft", "dpo", "rwr", "sft")


@pytest.mark.parametrize("method", METHODS)
def test_only_settings_that_exist_are_named(method):
    c = defaults()
    c.train.method = method
    assert unread(c).keys() <= flat(c.to_dict()).keys() and changed_in_vain(c) == []


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
        ({"lora.rank": 0, "lora.alpha": 1.0}, "lora.alpha (lora.rank=0)"),
        (
            {"reward.patience": 1.0, "log.wandb.entity": "us"},
            "log.wandb.entity (log.wandb.project is empty); reward.patience (reward.servers=())",
        ),
    ],
)
def test_what_is_changed_in_vain_is_named_with_its_cause(settings, line):
    c = defaults()
    c.update_from_flattened_dict(settings)
    assert changed_in_vain(c) == [f"settings without effect in this run: {line}"]


@pytest.mark.parametrize(
    "settings",
    [
        {"train.nft_beta": 1.0},
        {"train.method": "grpo", "train.clip_low": 1e-4},
        {"train.method": "rwr", "train.temperature": 2.0},
        {"train.method": "sft", "reward.combine": "advantages", "train.advantage_std": "global"},
        {"reward.servers": ("http://a",), "reward.timeout": 9.0},
        {"reward.weights.clip": 1.0, "reward.clip_model": "clip"},
    ],
)
def test_what_is_read_is_not_named(settings):
    c = defaults()
    c.update_from_flattened_dict(settings)
    assert changed_in_vain(c) == []
