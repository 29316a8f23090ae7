"""The device mesh and how arrays lie on it.

Axes: `data` splits the batch; `fsdp` splits the batch as well, and the parameters, which are gathered where they are
used. One device is a mesh of one, so there is one program for one device, several, and several hosts.
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "context")
BATCH_AXES = ("data", "fsdp")
BATCH = P(BATCH_AXES)


def make_mesh(fsdp: int = 1, devices=None, context: int = 1) -> Mesh:
    """A mesh [data, fsdp, context] over all devices (or those given); devices of one `context`, which exchange the most,
    are neighbours. Raises ValueError when fsdp and context do not divide them."""
    devices = jax.devices() if devices is None else devices
    for name, value, among in (("fsdp", fsdp, len(devices)), ("context", context, len(devices) // max(fsdp, 1))):
        if value < 1 or among % value:
            of = f"{len(devices)} devices" + (f" by fsdp={fsdp}, {among}" if name == "context" and fsdp > 1 else "")
            raise ValueError(f"mesh.{name}={value} does not divide the {of}; choose a divisor")
    return Mesh(np.asarray(devices).reshape(-1, fsdp, context), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of [*leading axes, B, ...]: the batch axis over data x fsdp, whole on the devices of a context."""
    return NamedSharding(mesh, P(*[None] * leading, BATCH_AXES))


def check_batch(name: str, batch: int, mesh: Mesh):
    """Raises ValueError unless `batch` divides over data x fsdp."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch < 1 or batch % parts:
        raise ValueError(f"{name}={batch} does not divide over {parts} devices (mesh {describe(mesh)}); make it a "
                         f"multiple of {parts}")


def describe(mesh: Mesh) -> str:
    """'data 2 x fsdp 4 x context 1'"""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def place(x, sharding: NamedSharding) -> jax.Array:
    """x on the devices. Where they are several hosts' too, every process gives the same whole array, and only what its
    own devices hold is copied; `jax.device_put` would compare the processes' arrays first."""
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def param_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """Splits the longest axis that `fsdp` divides (the last one among equals); small arrays stay whole."""
    candidates = [i for i, n in enumerate(shape) if n % fsdp == 0 and n >= fsdp]
    if fsdp == 1 or math.prod(shape) < 2**16 or not candidates:
        return P()
    axis = max(candidates, key=lambda i: (shape[i], i))
    return P(*[None] * axis, "fsdp")


def shard_params(tree, mesh: Mesh):
    """Places a tree of arrays (an `nnx.State` too) on the mesh by `param_spec`."""
    return jax.tree.map(place, tree, param_shardings(tree, mesh))


def param_shardings(tree, mesh: Mesh):
    """The shardings of `shard_params`, as a tree of the same structure (abstract leaves will do)."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda x: NamedSharding(mesh, param_spec(x.shape, fsdp)), tree)


def replicate(tree, mesh: Mesh):
    """Places a tree of arrays whole on every device."""
    return jax.tree.map(lambda x: place(x, replicated(mesh)), tree)


