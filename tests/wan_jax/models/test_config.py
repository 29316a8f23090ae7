"""Configurations of Diffusers checkpoints: what is read, and what is refused by key and value."""

import json

import pytest

from wan_jax.models.config import (
    ConfigError,
    Scheduler,
    TextEncoderConfig,
    TransformerConfig,
    UniPCConfig,
    VAEConfig,
    from_dict,
    load,
    load_scheduler,
)

VAE = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}


def test_known_keys_are_read_and_unknown_ones_ignored():
    config = from_dict(TransformerConfig, {"num_layers": 3, "patch_size": [1, 2, 2], "_x": 1})
    assert config.num_layers == 3 and config.patch_size == (1, 2, 2)
    assert config.width == 40 * 128 and hash(config)


@pytest.mark.parametrize(
    "kind, values, key, value",
    [
        (TransformerConfig, {"cross_attn_norm": False}, "cross_attn_norm", "False"),
        (TransformerConfig, {"qk_norm": None}, "qk_norm", "None"),
        (TransformerConfig, {"patch_size": [2, 2, 2]}, "patch_size", "[2, 2, 2]"),
        (TransformerConfig, {"attention_head_dim": 15}, "attention_head_dim", "15"),
        (TransformerConfig, {"num_layers": 0}, "num_layers", "0"),
        (TransformerConfig, {"num_layers": True}, "num_layers", "True"),
        (TransformerConfig, {"num_layers": 2.5}, "num_layers", "2.5"),
        (TransformerConfig, {"patch_size": [2, 2]}, "patch_size", "[2, 2]"),
        (TransformerConfig, {"eps": float("nan")}, "eps", "nan"),
        (VAEConfig, VAE | {"z_dim": 17}, "z_dim", "17"),
        (VAEConfig, VAE | {"latents_std": [0.0] * 16}, "latents_std", "0"),
        (VAEConfig, VAE | {"attn_scales": [1.0]}, "attn_scales", "[1.0]"),
        (TextEncoderConfig, {"feed_forward_proj": "relu"}, "feed_forward_proj", "relu"),
        (UniPCConfig, {"prediction_type": "epsilon"}, "prediction_type", "epsilon"),
    ],
)
def test_what_cannot_be_run_is_named(kind, values, key, value):
    with pytest.raises(ConfigError) as caught:
        from_dict(kind, values, where="folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json: ") and key in message and value in message


def test_schedulers(tmp_path):
    def read(**values):
        (tmp_path / "s.json").write_text(json.dumps(values))
        return load_scheduler(tmp_path / "s.json")

    unipc = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5}
    assert read(_class_name="UniPCMultistepScheduler", **unipc) == Scheduler("unipc", 5.0, 2)
    euler = read(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0)
    assert euler == Scheduler("flow_match_euler", 3.0)
    with pytest.raises(ConfigError, match="DDIMScheduler"):
        read(_class_name="DDIMScheduler")


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_files_that_cannot_be_read_are_named(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=str(path)):
        load(TransformerConfig, path)
