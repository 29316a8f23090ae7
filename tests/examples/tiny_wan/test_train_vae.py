"""Training of tiny-wan's VAE: how clips start."""

import jax.numpy as jnp
import numpy as np

from examples.tiny_wan.train_vae import temporal_identity


def test_clips_start_as_single_frames():
    flat = {
        "conv/kernel": jnp.ones((3, 3, 3, 2, 2)),
        "conv/bias": jnp.ones(2),
        "flat/kernel": jnp.ones((1, 3, 3, 2, 2)),
        "up/time_conv/kernel": jnp.ones((3, 1, 1, 2, 4)),
    }
    found = {name: np.asarray(value) for name, value in temporal_identity(flat).items()}
    assert not found["conv/kernel"][:2].any() and (found["conv/kernel"][2] == 1).all()
    assert (found["conv/bias"] == 1).all() and (found["flat/kernel"] == 1).all()
    # of the resampler only the last tap copies, twice because it doubles the frames
    assert not found["up/time_conv/kernel"][:2].any()
    np.testing.assert_array_equal(found["up/time_conv/kernel"][2, 0, 0], np.tile(np.eye(2), (1, 2)))
