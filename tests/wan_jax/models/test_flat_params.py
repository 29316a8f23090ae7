"""Parameter trees as flat dicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.models import flat_params
from wan_jax.models.layers import Linear


def layers() -> nnx.Module:
    return nnx.Dict(a=Linear(3, 2, rngs=nnx.Rngs(0)), b=Linear(2, 1, bias=False, rngs=nnx.Rngs(1)))


def test_there_and_back():
    state = nnx.state(layers())
    flat = flat_params.flatten(state)
    assert {k: v.shape for k, v in flat.items()} == {
        "a/kernel": (3, 2),
        "a/bias": (2,),
        "b/kernel": (2, 1),
    }
    doubled = flat_params.unflatten(state, {k: 2 * v for k, v in flat.items()})
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    np.testing.assert_array_equal(doubled["a"]["kernel"][...], 2 * flat["a/kernel"])
    with pytest.raises(KeyError, match="a/bias"):
        flat_params.unflatten(state, {k: v for k, v in flat.items() if k != "a/bias"})


def test_abstract_states():
    flat = flat_params.flatten(nnx.state(nnx.eval_shape(layers)))
    assert flat["b/kernel"] == jax.ShapeDtypeStruct((2, 1), jnp.float32)
