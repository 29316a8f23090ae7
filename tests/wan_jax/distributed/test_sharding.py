"""How weights and batches are sharded on the mesh."""

import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.distributed import sharding as sharding_lib
from wan_jax.distributed.mesh import make_mesh


@pytest.mark.parametrize(
    "shape, shard",
    [
        ((2, 256, 512), (2, 64, 512)),  # a kernel with enough rows: by them
        ((2, 32, 2048), (2, 32, 512)),  # with few rows: its longest axis
        ((256, 256), (64, 256)),
        ((40, 5120), (40, 1280)),
        ((512,), (512,)),  # small
        ((255, 1023), (255, 1023)),  # nothing divides
    ],
)
def test_shards_of_a_weight(shape, shard):
    mesh = make_mesh(4)
    placed = sharding_lib.shard_params({"w": jnp.ones(shape)}, mesh)["w"]
    assert placed.sharding.shard_shape(shape) == shard
    assert placed.sharding == sharding_lib.param_shardings({"w": placed}, mesh)["w"]
    assert sharding_lib.param_spec(shape, 1) == sharding_lib.param_spec((3,), 4)  # replicated


def test_batches_and_copies():
    mesh = make_mesh(2, context=2)
    value = np.arange(3 * 8 * 5.0).reshape(3, 8, 5)
    batch = sharding_lib.place(value, sharding_lib.batch_sharding(mesh, 1))
    assert batch.sharding.shard_shape(value.shape) == (3, 2, 5)
    whole = sharding_lib.replicate({"a": value}, mesh)["a"]
    assert whole.sharding == sharding_lib.replicated(mesh)
    for placed in (batch, whole):
        np.testing.assert_array_equal(placed, value)
        assert len(placed.addressable_shards) == 8
