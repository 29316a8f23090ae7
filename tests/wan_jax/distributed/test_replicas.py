"""The comparison of copies of the same weights between devices and processes."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from wan_jax.distributed import multihost, replicas
from wan_jax.errors import UserError


def placed(spec, wrong: int | None = None) -> jax.Array:
    """float32 [8, 4] on a mesh of two replicas of four shards; device number `wrong` holds another
    value in it.
    """
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding, value = NamedSharding(mesh, spec), np.arange(32, dtype=np.float32).reshape(8, 4)
    shards = [
        jax.device_put(value[index] + (device.id == wrong), device)
        for device, index in sharding.devices_indices_map(value.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(value.shape, sharding, shards)


def check(tree, monkeypatch):
    """`check_same` as if devices 0 to 3 were process 0's and 4 to 7 process 1's."""
    digests = replicas.replica_digests(tree)
    gathered = [
        {
            devices: {d: digest for d, digest in of_device.items() if devices and d // 4 == process}
            for devices, of_device in digests.items()
        }
        for process in (0, 1)
    ]
    monkeypatch.setattr(multihost, "gather", lambda value: gathered)
    replicas.check_same(tree, "the weights")


@pytest.mark.parametrize(
    "spec, wrong, message",
    [
        (P(), 5, "process 1 differ from those of process 0 .1 of 2"),
        (P("fsdp"), 6, "process 1 differ from those of"),
        (P(None, "fsdp"), 7, "process 1 differ"),
        (P("fsdp"), 1, "process 1 differ from those of process 0"),
        (P("data"), 2, "process 0 differ from each other"),
        (P(), 3, "process 0 differ from each other"),
    ],
)
def test_weights_that_differ_between_two_holders_of_a_shard(spec, wrong, message, monkeypatch):
    tree = {"a": placed(P()), "b": placed(spec)}
    check(tree, monkeypatch)
    with pytest.raises(UserError, match="the weights of " + message):
        check(tree | {"b": placed(spec, wrong)}, monkeypatch)


def test_shards_that_one_device_holds_are_not_compared(monkeypatch):
    spec = P("data", "fsdp")
    check({"a": placed(spec, 3)}, monkeypatch)
    assert list(replicas.replica_digests({"a": placed(spec)})) == [()]
