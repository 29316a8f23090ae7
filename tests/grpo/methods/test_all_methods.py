"""What every method states, and settings that it refuses."""

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
