"""The device mesh and how arrays lie on it.

| axis | the batch | parameters, gradients, optimiser | a video's tokens |
|---|---|---|---|
| `data` | split | whole | whole |
| `fsdp` | split | split, gathered a block at a time where they are used | whole |
| `context` | whole | whole | split, in the transformer alone (`layout.py`) |

So a batch has to divide over data x fsdp. Latents, noise and log-probs are split by videos only:
the devices of one `context` hold the same ones, bit for bit, and what is not the transformer they
compute alike. One device is a mesh of one, so there is one program for one device, several, and
several hosts. `choose` says which mesh is taken by default.
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
    """A mesh [data, fsdp, context] over all devices (or those given); those of one `context`, which
    exchange the most, are neighbours. Raises ValueError when fsdp and context do not divide them.
    """
    devices = jax.devices() if devices is None else devices
    for name, value, among in (
        ("fsdp", fsdp, len(devices)),
        ("context", context, len(devices) // max(fsdp, 1)),
    ):
        if value < 1 or among % value:
            of = f"{len(devices)} devices" + (
                f" by fsdp={fsdp}, {among}" if name == "context" and fsdp > 1 else ""
            )
            raise ValueError(f"mesh.{name}={value} does not divide the {of}; choose a divisor")
    return Mesh(np.asarray(devices).reshape(-1, fsdp, context), AXES)


def choose(
    devices: int, batch: int, state: float, memory: float, *, fsdp: int = 0, context: int = 0
) -> tuple[int, int]:
    """(fsdp, context) for so many devices; what is given and not 0 is kept.

    context: 1, unless the batch has fewer videos than there are devices; then the fewest devices a
    video that leave none idle, devices / gcd(devices, batch). fsdp: the fewest devices over which
    `state`, the bytes of weights, gradients, moments and averages, is at most half of a device's
    `memory`, as the other half is for activations: 1 where it fits whole (data parallel), all where
    it fits nowhere. memory 0: not known, as on CPUs; nothing is split.
    """
    if not context:
        context = devices // math.gcd(devices, batch) if 0 < batch < devices else 1
        if fsdp and devices // context % fsdp:
            context = 1
    if not fsdp:
        most = max(devices // context, 1)
        fits = [
            n
            for n in range(1, most + 1)
            if most % n == 0 and (not memory or state / n <= memory / 2)
        ]
        fsdp = fits[0] if fits else most
    return fsdp, context


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of [*leading axes, B, ...]: the batch axis over data x fsdp, whole on the devices of
    a context.
    """
    return NamedSharding(mesh, P(*[None] * leading, BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(name: str, batch: int, mesh: Mesh):
    """Raises ValueError unless `batch` divides over data x fsdp."""
    parts = batch_shards(mesh)
    if batch < 1 or batch % parts:
        raise ValueError(
            f"{name}={batch} does not divide over {parts} devices (mesh {describe(mesh)}); make it "
            f"a multiple of {parts}"
        )


def describe(mesh: Mesh) -> str:
    """'data 2 x fsdp 4 x context 1'"""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def place(x, sharding: NamedSharding) -> jax.Array:
    """x on the devices. Where they are several hosts' too, every process gives the same whole
    array, and only what its own devices hold is copied; `jax.device_put` would compare the
    processes' arrays first.
    """
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


ROWS = 256  # fewest rows of a kernel [..., in, out] that is split by them


def param_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """Splits a kernel [..., in, out] by `in`, where it has `ROWS` of them, else the longest axis
    that `fsdp` divides (the last one among equals); small arrays stay whole.

    Shards by `in` stand one after the other in the gathered kernel. Split by `out` they have to be
    transposed, which XLA for GPUs does to all blocks' kernels ahead of the scan: 5.6 GB of a
    rollout of 14B over fsdp=4.
    """
    candidates = [i for i, n in enumerate(shape) if n % fsdp == 0 and n >= fsdp]
    if fsdp == 1 or math.prod(shape) < 2**16 or not candidates:
        return P()
    rows = len(shape) - 2
    axis = (
        rows
        if rows in candidates and shape[rows] >= ROWS
        else max(candidates, key=lambda i: (shape[i], i))
    )
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
