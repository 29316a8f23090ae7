"""The precision of products: what the lowered functions carry, and that the CPU's bits are the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.models import precision
from wan_jax.models.config import TransformerConfig
from wan_jax.models.transformer import WanTransformer3D

TINY = TransformerConfig(
    num_attention_heads=2, attention_head_dim=24, text_dim=24, freq_dim=32, ffn_dim=48, num_layers=2
)
DOT = re.compile(r"stablehlo\.dot_general .*?: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\)")


@pytest.fixture
def restored():
    """JAX's own precision for one test, and afterwards that of the other tests."""
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", None)
    yield
    jax.config.update("jax_default_matmul_precision", before)


@functools.cache
def built(dtype):
    """(graph, state) of a small transformer."""
    make = nnx.jit(lambda: WanTransformer3D(TINY, dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.split(make())


def velocity(dtype):
    """(jitted function, arguments) of a small transformer."""
    graph, state = built(dtype)

    def run(state, x, text):
        return nnx.merge(graph, state)(x, jnp.full(1, 500.0), text)

    text = jax.random.normal(jax.random.key(1), (1, 8, 24)).astype(dtype)
    return jax.jit(run), (state, jax.random.normal(jax.random.key(0), (1, 1, 4, 4, 16)), text)


def dots(dtype) -> list[tuple[str, str, bool]]:
    """(type, type, whether it is to be exact) of each product of a transformer."""
    run, arguments = velocity(dtype)
    text = run.lower(*arguments).as_text()
    found = [(m[1], m[2], "HIGHEST" in m[0]) for m in DOT.finditer(text)]
    assert len(found) > 10
    return found


@pytest.mark.slow
def test_products_carry_the_precision(restored):
    plain = dots(jnp.float32)
    precision.use("default")
    assert dots(jnp.float32) == plain and not all(exact for *_, exact in plain)
    run, arguments = velocity(jnp.float32)
    before = np.asarray(run(*arguments))
    precision.use("float32")
    assert set(dots(jnp.float32)) == {("f32", "f32", True)}
    run, arguments = velocity(jnp.float32)
    np.testing.assert_array_equal(np.asarray(run(*arguments)), before)


def test_products_in_bfloat16_stay_products_in_bfloat16(restored):
    """XLA ignores the precision of products of bfloat16 values."""
    plain = [types for *types, _ in dots(jnp.bfloat16)]
    assert plain.count(["bf16", "bf16"]) > 10
    precision.use("float32")
    assert [types for *types, _ in dots(jnp.bfloat16)] == plain


@pytest.mark.parametrize(
    "name, of_jax", [("default", None), ("tf32", "tensorfloat32"), ("float32", "float32")]
)
def test_names_are_those_of_jax(restored, monkeypatch, name, of_jax):
    """And only float32 is exact, but on the CPU, where all are."""
    precision.use(name)
    assert jax.config.jax_default_matmul_precision == of_jax
    assert precision.is_exact()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert precision.is_exact() == (name == "float32")
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 by JAX's other name
    assert precision.is_exact()


def test_precision_of_sampling():
    assert precision.for_dtype("auto", "float32", "cuda") == "float32"
    assert precision.for_dtype("auto", "bfloat16", "cuda") == "default"
    assert precision.for_dtype("auto", "float32", "cpu") == "default"
    assert precision.for_dtype("tf32", "float32", "cuda") == "tf32"


def test_descriptions(restored):
    assert precision.describe("default", "cuda").startswith("TF32")
    assert precision.describe("float32", "cuda") == "float32"
    jax.config.update("jax_default_matmul_precision", "bfloat16")
    assert precision.describe("default", "cuda").startswith("bfloat16 ")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="matmul_precision='high'"):
        precision.use("high")
