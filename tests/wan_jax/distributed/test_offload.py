"""The weights of experts on the device and in host memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.distributed import offload as offload_lib


@pytest.mark.parametrize("offload", [False, True])
def test_weights_come_back_as_they_were(offload):
    states = [nnx.State({"a": nnx.Param(jnp.arange(8.0) + i)}) for i in range(2)]
    calls = []

    def loader(i):
        calls.append(i)
        return states[i]

    weights = offload_lib.Weights([lambda: loader(0), lambda: loader(1)], offload)
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
        assert offload_lib.choose_offload(setting, count, size, limit) == expected, (
            setting,
            count,
            size,
            limit,
        )
    with pytest.raises(ValueError, match="auto, never, always"):
        offload_lib.choose_offload("sometimes", 2, 1, 1)
