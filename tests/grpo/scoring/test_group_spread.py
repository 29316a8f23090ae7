"""How different the videos of a group are."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from grpo.scoring.group_spread import VALUES, group_spread, sampled_values


def test_spread_is_the_deviation_within_groups():
    """Not that between groups; videos that are not finite do not count."""
    rng = np.random.default_rng(0)
    deviation = np.repeat([0.5, 0.1], 4)
    values = rng.standard_normal((300, 8)) * deviation + np.repeat([0.0, 9.0], 4)
    groups = values.reshape(300, 2, 4)
    assert group_spread(values, 4) == pytest.approx(groups.std(axis=2).mean())
    values[7, 1] = np.nan
    left = [groups[:, 0][:, [0, 2, 3]].std(axis=1).mean(), groups[:, 1].std(axis=1).mean()]
    assert group_spread(values, 4) == pytest.approx(np.mean(left))
    assert group_spread(np.ones((3, 4)), 4) == 0 and math.isnan(group_spread(np.ones((3, 4)), 1))


def test_sampled_values_cover_a_video():
    latents = jnp.arange(2 * 3 * 40 * 40, dtype=jnp.float32).reshape(2, 3, 40, 40, 1)
    values = np.asarray(sampled_values(latents))
    assert values.shape[1] == 2 and VALUES // 2 < values.shape[0] <= VALUES
    assert values[0, 0] == 0 and values[-1, 0] > 0.99 * 4800
    np.testing.assert_array_equal(values[:, 1] - values[:, 0], 4800)
    few = jnp.ones((2, 1, 2, 2, 3))
    assert sampled_values(few).shape == (12, 2)
