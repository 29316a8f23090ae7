"""Which expert makes which step, with which guidance, and where its weights lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
    parts = experts.segments(flow_sigmas(steps, shift).timesteps, 0.875)
    assert parts == (experts.Segment(0, range(high)), experts.Segment(1, range(high, steps)))


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


def test_equal_guidance_shares_one_program():
    made = []
    assert experts.per_guidance(lambda scale: made.append(scale) or len(made), (4.0, 4.0)) == (1, 1)
    assert experts.per_guidance(lambda scale: scale, (4.0, 3.0)) == (4.0, 3.0)


@pytest.mark.parametrize("offload", [False, True])
def test_weights_come_back_as_they_were(offload):
    states = [nnx.State({"a": nnx.Param(jnp.arange(8.0) + i)}) for i in range(2)]
    calls = []

    def loader(i):
        calls.append(i)
        return states[i]

    weights = experts.Weights([lambda: loader(0), lambda: loader(1)], offload)
    for i in (0, 0, 1, 0, 1):
        leaf = jax.tree.leaves(weights(i))[0]
        assert (
            isinstance(leaf, jax.Array)
            and leaf.sharding.memory_kind == states[i]["a"].sharding.memory_kind
        )
        np.testing.assert_array_equal(leaf, np.arange(8.0) + i)
    assert calls == [0, 1]
    if offload:
        assert weights(1) is weights(1)
        first = weights(0)
        assert weights(0) is first and weights.current[0] == 0
        weights(1)
        assert all(x.is_deleted() for x in jax.tree.leaves(first))  # the device never holds both


def test_offload_is_chosen_by_what_fits():
    for setting, count, size, limit, expected in (
        ("auto", 2, 30, 100, True),
        ("auto", 2, 20, 100, False),
        ("auto", 1, 90, 100, False),
        ("auto", 2, 90, None, False),
        ("always", 2, 1, 100, True),
        ("never", 2, 90, 100, False),
        ("always", 1, 1, 100, False),
    ):
        assert experts.choose_offload(setting, count, size, limit) == expected, (
            setting,
            count,
            size,
            limit,
        )
    with pytest.raises(ValueError, match="auto, never, always"):
        experts.choose_offload("sometimes", 2, 1, 1)
