"""What every method states, and settings that it refuses."""

import dataclasses

import pytest

from configs import tiny_ocr, wan21_1_3b_ocr
from grpo import methods
from grpo.settings import parse
from wan_jax.errors import UserError


@pytest.mark.parametrize(
    "values, found",
    [
        ({"train.method": "ppo"}, "train.method"),
        ({"train.timesteps": 0}, "train.timesteps=0"),
        ({"train.timesteps": 5}, "train.timesteps=5 .*sample.steps=4"),
        ({"train.nft_beta": 0.0}, "train.nft_beta=0.0"),
        ({"sample.shared_noise": True}, "sample.shared_noise=True"),
        ({"train.old_most": 1.0}, "train.old_most=1.0"),
        ({"train.dpo_beta": -1.0}, "train.dpo_beta=-1.0"),
        ({"train.temperature": 0.0}, "train.temperature=0.0"),
        ({"train.reference_every": -1}, "train.reference_every=-1"),
        ({"train.kl_weight": -1.0}, "train.kl_weight=-1.0"),
        ({"train.updates_per_epoch": 2}, "train.updates_per_epoch=2 .*sample.groups=9"),
        ({"sample.sde": "cps"}, "sample.sde=cps .*train.method=grpo"),
        ({"train.objective": "guard"}, "train.objective=guard .*--config.train.method=grpo"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(values, found):
    config = tiny_ocr.get_config()
    config.train.method = "dpo"
    config.sample.groups, config.sample.batch_size = 9, 6
    config.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=found):
        parse.recipe_from_config(config)


# {method: {setting: field}} of the settings that are no field of every method on finished videos
FIELDS = {
    "nft": {
        "train.nft_beta": "beta",
        "train.advantage_clip": "advantage_clip",
        "train.old_rate": "old_rate",
        "train.old_most": "old_most",
    },
    "rwr": {"train.temperature": "temperature"},
    "tgo": {"train.tgo_temperature": "temperature", "train.tgo_confidence": "confidence"},
    "dpo": {"train.dpo_beta": "beta", "train.reference_every": "reference_every"},
    "dgpo": {"train.dgpo_beta": "beta", "train.dgpo_clip": "clip"},
}
COMMON = {"train.timesteps": "timesteps", "train.guided": "train_guided"}
ELSEWHERE = {"train.kl_weight", "train.kl_gate", "train.max_velocity_distance"}


@pytest.mark.parametrize("name", sorted({*methods.names()} - {"grpo"}))
def test_settings_reach_the_method(name):
    """Each by itself. DPO and TGO have the reference in their loss, and no KL beside it."""
    fields = COMMON | FIELDS.get(name, {})
    assert {*methods.method_class(name).reads} <= fields.keys() | ELSEWHERE
    values = {"train.timesteps": 3, "train.guided": True, "train.reference_every": 3}
    values |= {"train.advantage_clip": 3.0, "train.kl_weight": 0.3}
    own = {"dpo": 0.0, "tgo": 0.0}
    for key, field in {**fields, "train.kl_weight": "kl_weight"}.items():
        config = tiny_ocr.get_config()
        config.train.method, config.sample.guidance = name, 3.0
        plain = parse.from_config(config).method
        value = values.get(key, 0.3)
        config.update_from_flattened_dict({key: value})
        found = parse.from_config(config).method
        wanted = own.get(name, value) if field == "kl_weight" else value
        assert getattr(found, field) == wanted
        assert found == dataclasses.replace(plain, **{field: wanted})
        assert wanted == own.get(name) or found != plain


def test_a_method_is_a_file():
    assert {"grpo", "nft", "dpo", "rwr", "sft"} <= set(methods.names())
    for method in methods.all_methods():
        config = wan21_1_3b_ocr.get_config()
        config.train.method = method.name
        made = parse.from_config(config).method
        assert type(made) is method
        # what samples is one of the copies that the state keeps, and each copy has a share
        assert made.sampler in (None, *made.lagged)
        assert made.share_kept(1, True).keys() == set(made.lagged)
        # it trains either on steps or on finished videos
        assert made.keeps_steps == (made.levels is None)
