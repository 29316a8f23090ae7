"""Muon and Adam: orthogonal updates of matrices, and which parameters get them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.tiny_wan.optim import muon_or_adam, orthogonalise, scale_by_muon


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (3, 8, 8)])
def test_singular_values_become_about_one(shape):
    """Five iterations bring them between 0.6 and 1.3; bf16 adds 2 %."""
    matrix = jax.random.normal(jax.random.key(0), shape)
    found = orthogonalise(matrix)
    assert found.dtype == jnp.float32 and found.shape == shape
    singular = np.linalg.svd(np.asarray(found), compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3
    # the signs of the singular values stay
    assert float((matrix * found).sum()) > 0


def test_muon_has_momentum_and_scales_tall_outputs():
    wide, tall = jnp.ones((4, 16)), jnp.ones((16, 4))
    muon = scale_by_muon(momentum=0.5)
    state = muon.init({"wide": wide, "tall": tall})
    updates, state = muon.update({"wide": wide, "tall": tall}, state)
    ratio = jnp.linalg.norm(updates["wide"]) / jnp.linalg.norm(updates["tall"])
    assert float(ratio) == pytest.approx(2.0, rel=0.02)  # sqrt(16 / 4), in bf16
    _, state = muon.update({"wide": 0 * wide, "tall": 0 * tall}, state)
    np.testing.assert_array_equal(state["wide"], 0.5 * wide)


@pytest.mark.slow
def test_outer_layers_and_vectors_use_adam():
    """Adam's first update of equal gradients is 1 everywhere; Muon's is not."""
    names = ("blocks/ffn/kernel", "proj_out/kernel", "patch_embedding/kernel", "blocks/bias")
    values = {name: jnp.zeros((4, 4) if name.endswith("kernel") else 4) for name in names}
    optimiser = muon_or_adam(values, adam_scale=0.1)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.01), values)
    updates, _ = optimiser.update(grads, optimiser.init(values), values)
    for name in names[1:]:
        np.testing.assert_allclose(updates[name], 0.1, rtol=1e-4, err_msg=name)
    assert float(jnp.abs(updates[names[0]] - 0.1).min()) > 0.05
