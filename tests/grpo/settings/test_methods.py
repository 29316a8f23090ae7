"""What each method asks of a recipe."""

import re

import pytest

from grpo import methods
from grpo.settings import parse
from grpo.settings.checks import check_together
from grpo.settings.schema import SETTINGS, make_recipe, values_of
from wan_jax.command_line.cli import UserError

OTHERS = {
    "sample.sde": "cps",
    "sample.sde_window": "random",
    "train.groups": 1,
    "train.best_of": 2,
    "train.objective": "guard",
    "train.credit": "longcat",
    "train.kl_as": "reward",
    "train.kl_target": 0.1,
    "train.kl_reference": "average",
    "train.cfg_distill_weight": 0.5,
    "train.advantage_exp": True,
    "data.noise": "rollout",
}


def test_every_variant_has_a_value_here():
    assert {key for method in methods.all_methods() for key in method.variants} == set(OTHERS)


@pytest.mark.parametrize("method", sorted({*methods.names()} - {"grpo"}))
@pytest.mark.parametrize("key", OTHERS)
def test_variants_of_another_method_are_refused(c, key, method):
    c.train.method = method
    methods.check_variants(c)
    c.update_from_flattened_dict({key: OTHERS[key]})
    for recipe in (c, make_recipe(values_of(c))):
        with pytest.raises(UserError) as error:
            methods.check_variants(recipe)
        assert f"config.{key}={OTHERS[key]}" in str(error.value)
        assert "--config.train.method=grpo" in str(error.value)
        assert f"leave it at {SETTINGS[key].default}" in str(error.value)
    c.train.method = "grpo"
    methods.check_variants(c)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("nft", {"train.timesteps": 4}, "config.train.timesteps=4 must be at most sample.steps=3"),
        ("rwr", {"sample.shared_noise": True}, "config.sample.shared_noise=True with"),
        (
            "dpo",
            {"train.updates_per_epoch": 4, "sample.batch_size": 2},
            "config.train.updates_per_epoch=4 does not divide sample.groups=2",
        ),
        (
            "sft",
            {"train.updates_per_epoch": 4, "sample.batch_size": 2},
            "config.train.updates_per_epoch=4 does not divide sample.groups=2",
        ),
        ("grpo", {"sample.sde_range": (2, 3)}, "sde_range=(2, 3)"),
    ],
)
def test_checks_of_a_method_take_the_config_and_the_recipe(small, method, settings, message):
    small.update_from_flattened_dict({"train.method": method, "train.timesteps": 3})
    check_together(small)
    check_together(make_recipe(values_of(small)))
    small.update_from_flattened_dict(settings)
    for recipe in (small, make_recipe(values_of(small))):
        with pytest.raises(UserError, match=re.escape(message)):
            check_together(recipe)


def test_flow_grpo_does_not_read_timesteps(small):
    small.train.timesteps = 99
    parse.recipe_from_config(small)


@pytest.mark.parametrize(
    ("method", "own"),
    [("grpo", 0.004), ("nft", 1e-4), ("awm", 0.1), ("dgpo", 1e-3)]
    + [(name, 0.0) for name in ("dpo", "rwr", "rvm", "sft", "tgo")],
)
def test_the_weight_of_the_kl(method, own):
    assert methods.kl_weight(method, None) == own and methods.kl_weight(method, 0.5) == 0.5
