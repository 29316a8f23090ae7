"""Dense layers of one input, computed as one product, are the layers themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.models.layers import Linear, LoRAParam, fused_dense

SIZES = (6, 4, 5)


def layers(adapted=(), scales=(2.0, 2.0, 2.0)):
    rng = np.random.default_rng(0)
    made = [Linear(8, n, rngs=nnx.Rngs(i)) for i, n in enumerate(SIZES)]
    for i, layer in enumerate(made):
        layer.bias[...] = jnp.asarray(rng.standard_normal(SIZES[i]), jnp.float32)
        a, b = (
            jnp.asarray(rng.standard_normal(shape), jnp.float32)
            for shape in ((8, 3), (3, SIZES[i]))
        )
        if i in adapted:
            layer.lora_a, layer.lora_b, layer.lora_scale = LoRAParam(a), LoRAParam(b), scales[i]
    return made


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "adapted, scales, products",
    [
        ((), (2.0,) * 3, 1),
        ((0, 1, 2), (2.0,) * 3, 3),
        ((0, 2), (2.0,) * 3, 7),
        ((0, 1, 2), (2.0, 0.5, 1.0), 9),
    ],
)
def test_fused_layers_are_the_layers(adapted, scales, products):
    made, x = layers(adapted, scales), jax.random.normal(jax.random.key(0), (2, 7, 8))
    expected = []
    for i, layer in enumerate(made):
        y = np.asarray(x, np.float64) @ np.asarray(layer.kernel[...], np.float64) + np.asarray(
            layer.bias[...]
        )
        if i in adapted:
            y += (
                scales[i]
                * (np.asarray(x, np.float64) @ np.asarray(layer.lora_a[...]))
                @ np.asarray(layer.lora_b[...])
            )
        expected.append(y)
    for y, alone, wanted in zip(fused_dense(made, x), [layer(x) for layer in made], expected):
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(alone, wanted, rtol=0, atol=1e-5)
    assert str(jax.make_jaxpr(lambda x: fused_dense(made, x))(x)).count("dot_general") == products


@pytest.mark.slow
def test_gradients_of_fused_adapters_are_their_own():
    made, x = layers((0, 1, 2)), jax.random.normal(jax.random.key(0), (7, 8))

    def loss(outputs):
        return sum(jnp.sum(jnp.sin((i + 1) * y)) for i, y in enumerate(outputs))

    graph, adapters, rest = nnx.split(made, LoRAParam, ...)
    together = jax.grad(lambda s: loss(fused_dense(nnx.merge(graph, s, rest), x)))(adapters)
    alone = jax.grad(lambda s: loss([layer(x) for layer in nnx.merge(graph, s, rest)]))(adapters)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
