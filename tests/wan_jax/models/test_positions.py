"""Rotary embeddings of the token grid, and features of the timestep."""

import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.models.positions import apply_rope, rope_table, timestep_features


def test_rope_pairs_and_limit():
    cos, sin = rope_table((2, 3, 4), 128)
    assert cos.shape == (24, 64) and cos.dtype == np.float32
    np.testing.assert_allclose(cos**2 + sin**2, 1, rtol=1e-6)
    np.testing.assert_array_equal(sin[0], 0)
    token = 1 * 12 + 2 * 4 + 3  # frame 1, row 2, column 3
    np.testing.assert_allclose(
        np.arctan2(sin[token], cos[token])[[0, 22, 43]], [1, 2, 3], rtol=1e-6
    )
    with pytest.raises(ValueError, match="rope_max_seq_len 1024"):
        rope_table((1025, 1, 1), 128)


def test_rope_rotates_pairs_by_their_angle():
    """Attention scores depend on the difference of positions only: a pair is a complex number that
    is multiplied by exp(i angle).
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 3, 12)).astype(np.float32)
    cos, sin = rope_table((1, 2, 3), 12)
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[:, None]
    expected = np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)
    # fp32: two products and a sum of values up to 4
    np.testing.assert_allclose(apply_rope(jnp.asarray(x), cos, sin), expected, atol=1e-6)
    assert apply_rope(jnp.asarray(x, jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


def test_timestep_features():
    features = np.asarray(timestep_features(jnp.array([0.0, 500.0]), 8))
    np.testing.assert_array_equal(features[0], [1] * 4 + [0] * 4)
    angles = 500.0 * 10000.0 ** (-np.arange(4) / 4)
    # fp32 angles up to 500 have an error of 500 x 2^-24
    np.testing.assert_allclose(features[1], [*np.cos(angles), *np.sin(angles)], atol=1e-4)
