"""Classifier-free guidance, with a stand-in for the transformer."""

import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.diffusion.guidance import TextBatch, pair, velocity

RNG = np.random.default_rng(0)
LATENTS = jnp.asarray(RNG.standard_normal((3, 1, 2, 2, 4)), jnp.float32)
TEXT = TextBatch(
    jnp.asarray(RNG.standard_normal((3, 5, 6)), jnp.float32),
    jnp.asarray(RNG.standard_normal((5, 6)), jnp.float32),
    padding=7,
)


def model(latents, timesteps, text, *, text_padding):
    """Depends on each argument, and on each video alone."""
    own = (timesteps * text.sum(axis=(1, 2)) + text_padding)[:, None, None, None, None]
    return latents * own


@pytest.mark.parametrize("timestep", [300.0, np.array([100.0, 200.0, 300.0], np.float32)])
def test_the_formula(timestep):
    conditional = np.asarray(velocity(model, LATENTS, timestep, TEXT, 1.0))
    own = timestep * np.asarray(TEXT.embeddings).sum(axis=(1, 2)) + 7
    expected = np.asarray(LATENTS) * own[:, None, None, None, None]
    np.testing.assert_allclose(conditional, expected, rtol=1e-5)
    own = (timestep * np.asarray(TEXT.negative).sum() + 7) * np.ones(3, np.float32)
    unconditional = np.asarray(LATENTS) * own[:, None, None, None, None]
    guided = np.asarray(velocity(model, LATENTS, timestep, TEXT, 4.5))
    expected = unconditional + 4.5 * (conditional - unconditional)
    # fp32, and a difference of values up to a thousand times as large
    np.testing.assert_allclose(guided, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("guidance, videos", [(0.0, 3), (1.0, 3), (1.5, 6)])
def test_the_negative_prompt_costs_nothing_without_guidance(guidance, videos):
    seen = []

    def spy(latents, *args, **kwargs):
        seen.append(len(latents))
        return model(latents, *args, **kwargs)

    velocity(spy, LATENTS, 300.0, TEXT, guidance)
    assert seen == [videos]


def test_pairs_are_interleaved():
    x, y = jnp.arange(3), jnp.arange(10, 13)
    np.testing.assert_array_equal(pair(x, y), [0, 10, 1, 11, 2, 12])
