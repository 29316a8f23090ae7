"""Component folders of the training scripts: what is saved is loaded."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from examples.tiny_wan import folder, sizes
from wan_jax.models import flat_params
from wan_jax.models.config import TextEncoderConfig, from_dict
from wan_jax.models.text_encoder import UMT5Encoder

SMALL = sizes.TEXT_ENCODER | {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 8, "num_layers": 1}


def build(config):
    return UMT5Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_round_trip(tmp_path):
    flat = flat_params.flatten(nnx.state(build(from_dict(TextEncoderConfig, SMALL))))
    folder.save("text_encoder", flat, SMALL, tmp_path, "model.safetensors")
    config = tmp_path / "config.json"
    assert json.loads(config.read_text()) == SMALL
    assert (tmp_path / "model.safetensors").stat().st_mode == config.stat().st_mode
    shapes = {name: value.shape for name, value in flat.items()}
    stored = folder.load_flat(tmp_path, "text_encoder", shapes)
    loaded = nnx.merge(*folder.load_component(tmp_path, "text_encoder", TextEncoderConfig, build))
    values = flat_params.flatten(nnx.state(loaded))
    assert stored.keys() == values.keys() == flat.keys()
    for name, value in flat.items():
        rounded = np.asarray(value).astype(ml_dtypes.bfloat16)
        assert stored[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(stored[name], rounded, name)
        np.testing.assert_array_equal(values[name], rounded.astype(np.float32), name)
