"""How arrays are sharded on the mesh of `wan_jax.distributed.mesh`.

| array | sharding | function |
|---|---|---|
| a weight, its gradient, moments and average | one axis over `fsdp`, or replicated | `param_spec` |
| a batch [B, ...] | B over data x fsdp | `batch_sharding` |
| everything else | replicated | `replicated` |

`param_spec` is the only rule for weights: `param_shardings` applies it to a tree of (abstract)
arrays, `shard_params` places a tree by it. `place` puts one array on the devices.
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from wan_jax.distributed.mesh import BATCH_AXES

BATCH = P(BATCH_AXES)  # of an array [B, ...]
MIN_ROWS = 256  # a kernel [..., in, out] is split by `in` if it has at least this many rows


def param_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """Return the sharding of a weight over `fsdp` devices.

    A kernel [..., in, out] is split by `in` if it has at least `MIN_ROWS` rows; another array along
    the longest axis that `fsdp` divides (the last one among equals). Arrays of less than 2^16
    elements are replicated.

    Shards by `in` are contiguous in the gathered kernel. Shards by `out` have to be transposed,
    which XLA for GPUs does to the kernels of all blocks before the scan: 5.6 GB of a rollout of 14B
    over fsdp=4.
    """
    candidates = [i for i, n in enumerate(shape) if n % fsdp == 0 and n >= fsdp]
    if fsdp == 1 or math.prod(shape) < 2**16 or not candidates:
        return P()
    rows = len(shape) - 2
    axis = (
        rows
        if rows in candidates and shape[rows] >= MIN_ROWS
        else max(candidates, key=lambda i: (shape[i], i))
    )
    return P(*[None] * axis, "fsdp")


def param_shardings(tree, mesh: Mesh):
    """Return the shardings of a tree of weights by `param_spec`, in a tree of the same structure.
    The leaves may be abstract.
    """
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda x: NamedSharding(mesh, param_spec(x.shape, fsdp)), tree)


def shard_params(tree, mesh: Mesh):
    """Place a tree of weights (also an `nnx.State`) on the mesh by `param_spec`."""
    return jax.tree.map(place, tree, param_shardings(tree, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array of which every device has a copy."""
    return NamedSharding(mesh, P())


def replicate(tree, mesh: Mesh):
    """Place a copy of each array of a tree on every device."""
    return jax.tree.map(lambda x: place(x, replicated(mesh)), tree)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Return the sharding of [..., B, ...] with `leading` axes before B: B over data x fsdp, and
    identical copies on the devices of a context group.
    """
    return NamedSharding(mesh, P(*[None] * leading, BATCH_AXES))


def place(x, sharding: NamedSharding) -> jax.Array:
    """Place an array on the devices of `sharding`.

    On several hosts every process gives the same whole array, and each copies only the shards of
    its own devices; `jax.device_put` would first compare the arrays of all processes.
    """
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
