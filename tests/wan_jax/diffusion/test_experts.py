"""Which expert computes which step, and with which guidance."""

import numpy as np
import pytest

from wan_jax.diffusion import experts
from wan_jax.diffusion.schedule import euler_sigmas, flow_sigmas


@pytest.mark.parametrize(
    "shift, steps, high",
    [(3, 10, 4), (3, 20, 7), (3, 40, 13), (5, 20, 9), (12, 20, 13), (12, 40, 26)],
)
def test_the_published_split_of_a14b(shift, steps, high):
    """Steps with t >= 875; shift 3 with 10 steps has a step at exactly 875, which belongs to the
    first.
    """
    found = experts.segments(flow_sigmas(steps, shift).timesteps, 0.875)
    assert found == (experts.Segment(0, range(high)), experts.Segment(1, range(high, steps)))


def test_segments_without_a_boundary_or_a_step():
    timesteps = euler_sigmas(4, 3.0).timesteps
    assert experts.segments(timesteps, None) == (experts.Segment(0, range(4)),)
    assert experts.segments(timesteps, 0.001) == (experts.Segment(0, range(4)),)
    assert experts.segments(np.array([800.0, 400.0]), 0.9) == (experts.Segment(1, range(2)),)


@pytest.mark.parametrize(
    "first, second, count, expected",
    [
        (4.0, None, 1, (4.0,)),
        (4.0, 3.0, 1, (4.0,)),
        (4.0, 3.0, 2, (4.0, 3.0)),
        (4.0, None, 2, (4.0, 4.0)),
        (1.0, 5.0, 2, (1.0, 1.0)),
        (4.0, 1.0, 2, (4.0, 1.0)),
    ],
)
def test_guidance_of_each_expert(first, second, count, expected):
    assert experts.guidances(first, second, count) == expected


def test_equal_guidance_shares_one_function():
    made = []
    assert experts.per_guidance(lambda scale: made.append(scale) or len(made), (4.0, 4.0)) == (1, 1)
    assert experts.per_guidance(lambda scale: scale, (4.0, 3.0)) == (4.0, 3.0)
