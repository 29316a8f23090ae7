"""The layers of the VAEs against XLA's own convolutions and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.random_vae import relative_error
from wan_jax.models.vae_layers import (
    CausalConv3d,
    ChannelNorm,
    Conv2d,
    History,
    average_down,
    duplicate_up,
    patchify,
    unpatchify,
    upsampled_conv,
)


@pytest.mark.parametrize(
    "make, fan_in",
    [
        (lambda **kw: CausalConv3d(8, 64, (3, 3, 3), **kw), 8 * 27),
        (lambda **kw: Conv2d(8, 64, **kw), 8 * 9),
    ],
)
def test_initialisation_keeps_the_variance(make, fan_in):
    layer = make(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert float(layer.kernel[...].astype(jnp.float32).std()) == pytest.approx(
        fan_in**-0.5, rel=0.05
    )
    assert layer.kernel[...].dtype == layer.bias[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer.bias[...], 0)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("window", [(3, 3, 3), (3, 1, 1), (1, 1, 1)])
def test_causal_convolution_is_a_left_padded_3d_convolution(window):
    layer = CausalConv3d(3, 4, window, dtype=jnp.float32, rngs=nnx.Rngs(1))
    layer.bias[...] = jnp.arange(4.0)
    kt, kh, kw = window
    rng = np.random.default_rng(0)
    for frames in (1, 2, 5):
        x = jnp.asarray(rng.standard_normal((2, frames, 4, 5, 3)), jnp.float32)
        expected = jax.lax.conv_general_dilated(
            x,
            layer.kernel[...],
            (1, 1, 1),
            [(kt - 1, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)],
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        ) + jnp.arange(4.0)
        assert relative_error(layer(x), expected) < 1e-6, frames


def test_upsampled_convolution_is_the_convolution_of_the_doubled_frame():
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 3, 4, 6, 5), (3, 3, 5, 7))
    )
    doubled = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3).reshape(6, 8, 12, 5)
    expected = jax.lax.conv_general_dilated(
        doubled, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert relative_error(upsampled_conv(x, kernel), expected.reshape(2, 3, 8, 12, 7)) < 1e-6


def test_norm():
    x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    norm = ChannelNorm(6, dtype=jnp.float32)
    norm.scale[...] = jnp.arange(1.0, 7.0)
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True) * np.sqrt(6) * np.arange(1, 7)
    assert relative_error(norm(x), expected) < 1e-6
    half = jnp.asarray(x, jnp.bfloat16)
    # rounded twice by 2**-9
    assert norm(half).dtype == jnp.bfloat16 and relative_error(norm(half), expected) < 4e-3
    sums = [e for e in jax.make_jaxpr(norm)(half).jaxpr.eqns if e.primitive.name == "reduce_sum"]
    assert len(sums) == 1 and sums[0].invars[0].aval.dtype == jnp.float32, (
        "squares in bfloat16 lose digits"
    )
    gradient = jax.grad(lambda x: norm(x).sum())(jnp.zeros((6,)))
    assert bool(jnp.isfinite(gradient).all())


def test_history_is_the_last_two_frames():
    """Also where a chunk has fewer: zeros before the first frames, older frames later."""
    x = jnp.arange(1.0, 6.0).reshape(1, 5, 1, 1, 1)
    history = ()
    for frames, before, after in (
        (x[:, :1], None, [0, 1]),
        (x[:, 1:2], [0, 1], [1, 2]),
        (x[:, :0], [1, 2], [1, 2]),
        (x[:, 2:], [1, 2], [4, 5]),
    ):
        current = History(history)
        assert current.starts_video == (before is None)
        found = current.exchange(frames)
        assert (found is None) == (before is None)
        if before is not None:
            np.testing.assert_array_equal(found.ravel(), before)
        (left,) = history = current.frames
        np.testing.assert_array_equal(left.ravel(), after)


def test_patches_there_and_back():
    x = jnp.arange(2 * 3 * 4 * 6 * 3.0).reshape(2, 3, 4, 6, 3)
    patches = patchify(x, 2)
    assert patches.shape == (2, 3, 2, 3, 12)
    # channel slowest, then column, then row
    np.testing.assert_array_equal(
        patches[0, 0, 0, 0].reshape(3, 2, 2), x[0, 0, :2, :2].transpose(2, 1, 0)
    )
    np.testing.assert_array_equal(unpatchify(patches, 2), x)


def test_shortcuts():
    """A constant stays a constant, but for the zero frame in front; groups are averaged in order."""
    ones = jnp.ones((1, 3, 4, 4, 2))
    down = average_down(ones, 4, 2, 2)
    assert down.shape == (1, 2, 2, 2, 4)
    np.testing.assert_array_equal(down[0, 0, 0, 0], [0, 1, 0, 1])  # 8 values a channel, in halves
    np.testing.assert_array_equal(down[:, 1], 1)
    x = jnp.arange(2.0).reshape(1, 2, 1, 1, 1)
    for starts_video, frames in ((True, [0, 1, 1]), (False, [0, 0, 1, 1])):
        up = duplicate_up(x, 1, 2, 2, starts_video)
        assert up.shape == (1, len(frames), 2, 2, 1)
        np.testing.assert_array_equal(up[0, :, 0, 0, 0], frames)
        np.testing.assert_array_equal(up[0, :, 1, 1, 0], frames)
