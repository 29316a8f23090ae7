"""Tests of the key table: the published sizes, the keys of Diffusers, and the rule of the names."""

import numpy as np
import pytest

from tests import tiny
from wan_jax.models import config as config_lib
from wan_jax.models import flat_params
from wan_jax.storage import key_table, model_dir

WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}


WAN_VAE = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}


WAN_VAE_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


@pytest.mark.parametrize(
    "component, settings, keys, parameters",
    [
        ("transformer", WAN_1_3B, 825, 1_418_996_800),
        ("transformer", {}, 1095, 14_288_491_584),
        ("vae", WAN_VAE, 194, 126_892_531),
        ("vae", WAN_VAE_22, 196, 704_688_668),
        ("text_encoder", {}, 242, 5_680_910_336),
    ],
)
def test_published_sizes(component, settings, keys, parameters):
    shapes = tiny.state_dict_shapes(component, settings)
    assert len(shapes) == keys and sum(int(np.prod(s)) for s in shapes.values()) == parameters


@pytest.mark.parity
@pytest.mark.parametrize(
    "component, settings",
    [("transformer", WAN_1_3B), ("transformer", {}), ("vae", WAN_VAE), ("vae", WAN_VAE_22)],
)
def test_keys_and_shapes_of_diffusers(component, settings):
    import diffusers
    import torch

    peer = {"transformer": diffusers.WanTransformer3DModel, "vae": diffusers.AutoencoderKLWan}[
        component
    ]
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in peer(**settings).state_dict().items()}
    assert tiny.state_dict_shapes(component, settings) == theirs


def test_key_rule_keeps_names_that_end_in_a_number():
    table = {
        e.path: e.key
        for e in key_table.entries(
            "text_encoder", {"encoder/block/layer_1/DenseReluDense/wi_0/kernel": (1, 4, 6)}
        )
    }
    assert table == {
        "encoder/block/layer_1/DenseReluDense/wi_0/kernel": "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    }
    config = config_lib.from_dict(config_lib.TransformerConfig, tiny.SETTINGS["transformer"])
    shapes = {
        k: v.shape
        for k, v in flat_params.flatten(model_dir.abstract("transformer", config)[1]).items()
    }
    keys = {e.key for e in key_table.entries("transformer", shapes)}
    assert {
        "condition_embedder.time_embedder.linear_1.weight",
        "blocks.1.ffn.net.0.proj.bias",
        "blocks.0.attn2.to_out.0.weight",
        "blocks.1.norm2.weight",
        "blocks.0.scale_shift_table",
    } <= keys


def test_matrices_are_copied_whole():
    """Of several blocks, of which the last ones are not full; and vectors."""
    rng = np.random.default_rng(0)
    for source in (rng.random((300, 530)).T, rng.random(7), np.float32(rng.random((2, 3, 4)))):
        target = np.zeros(source.shape, source.dtype)
        key_table.copy_in_blocks(source, target)
        np.testing.assert_array_equal(target, source)
