"""Tests of the names of dense layers, and of the targets that adapt given layers."""

import pytest

from tests import tiny
from wan_jax.models import config as config_lib
from wan_jax.models import lora
from wan_jax.storage import lora_names

ATTENTION = lora.ATTENTION_TARGETS
FFN = (*ATTENTION, "ffn.net.0.proj", "ffn.net.2")
EVERYTHING = (*FFN, "proj_out", "time_proj", "linear_1", "linear_2")


@pytest.fixture(scope="module")
def kernels():
    config = config_lib.from_dict(config_lib.TransformerConfig, tiny.SETTINGS["transformer"])
    return lora_names.dense_layers(config)


def test_names_cover_every_dense_layer(kernels):
    modules = lora_names.modules(kernels)
    assert len({lora_names.original_name(m) for m in modules}) == len(modules) == 10 * 2 + 6
    assert lora_names.original_name("blocks.11.attn2.to_out.0") == "blocks.11.cross_attn.o"
    assert lora_names.original_name("blocks.0.ffn.net.0.proj") == "blocks.0.ffn.0"


@pytest.mark.parametrize(
    "targets",
    [
        ATTENTION,
        (*FFN, "proj_out"),
        EVERYTHING,
        FFN,
        ("attn1.to_q",),
        ("to_v", "attn2.to_q"),
        ("text_embedder.linear_1",),
    ],
)
def test_targets_are_read_from_the_layers(kernels, targets):
    found = lora_names.layer_targets(lora.adapted_layers(kernels, targets), kernels)
    assert sorted(found) == sorted(targets)
