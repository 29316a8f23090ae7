"""Small VAEs with random weights for the tests, from the same seed as the recorded ones."""

import importlib.util
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.models import flat_params
from wan_jax.models.config import VAEConfig, from_dict
from wan_jax.models.vae import AutoencoderKLWan
from wan_jax.storage import key_table

GOLDEN = pathlib.Path(__file__).parent / "golden"
spec = importlib.util.spec_from_file_location("make_vae", GOLDEN / "make_vae.py")
maker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maker)

BOTH = pytest.mark.parametrize("settings", [maker.CONFIG, maker.CONFIG_22], ids=["2.1", "2.2"])
WAN_21 = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
WAN_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    # some published files have this key, the class has not
    "latents_std": [1.0] * 48,
    "clip_output": False,
}


def abstract(settings: dict, dtype=jnp.float32):
    config = from_dict(VAEConfig, settings)
    return nnx.split(
        nnx.eval_shape(lambda: AutoencoderKLWan(config, dtype=dtype, rngs=nnx.Rngs(0)))
    )


def build(settings: dict, weights: dict, dtype=jnp.float32) -> AutoencoderKLWan:
    """The VAE with the tensors of a Diffusers state dict (numpy)."""
    graphdef, state = abstract(settings, dtype)
    flat = key_table.to_ours(
        "vae", weights, {k: v.shape for k, v in flat_params.flatten(state).items()}
    )
    return nnx.merge(
        graphdef, flat_params.unflatten(state, {k: jnp.asarray(v, dtype) for k, v in flat.items()})
    )


def random_model(settings=maker.CONFIG, seed=maker.SEED, dtype=jnp.float32) -> AutoencoderKLWan:
    shapes = {k: v.shape for k, v in flat_params.flatten(abstract(settings)[1]).items()}
    table = key_table.entries("vae", shapes)
    return build(settings, maker.random_weights({e.key: e.shape for e in table}, seed), dtype)


# most of the time is compilation; LLVM without optimisation compiles three times faster and
# computes the same
quick_jit = partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def largest_difference(a, b) -> float:
    assert a.shape == b.shape
    return float(jnp.max(jnp.abs(a - b)))
