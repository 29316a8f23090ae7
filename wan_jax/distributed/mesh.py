"""The device mesh [data, fsdp, context], and which sizes it gets by default.

| axis | batch | parameters, gradients, optimiser | tokens of a video |
|---|---|---|---|
| `data` | split | whole | whole |
| `fsdp` | split | split; gathered one block at a time where they are used | whole |
| `context` | whole | whole | split, inside the transformer only |

A batch must therefore divide over data x fsdp. Latents, noise and log-probs are split by videos
only: the devices of one `context` group have identical copies, and compute everything outside the
transformer redundantly. A single device is a mesh of size 1, so the same code runs on one device,
on several, and on several hosts.

How arrays are sharded on the mesh: `wan_jax.distributed.sharding`. How the transformer computes on
sharded weights and tokens: `wan_jax.models.sharded_forward`.
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh

AXES = ("data", "fsdp", "context")
BATCH_AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1, devices=None, context: int = 1) -> Mesh:
    """Return a mesh [data, fsdp, context] over `devices` (None: all). The devices of one `context`
    group, which exchange the most data, are neighbours.

    Raises ValueError when fsdp and context do not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    for name, value, among in (
        ("fsdp", fsdp, len(devices)),
        ("context", context, len(devices) // max(fsdp, 1)),
    ):
        if value < 1 or among % value:
            of = f"{len(devices)} devices" + (
                f" / fsdp={fsdp} = {among}" if name == "context" and fsdp > 1 else ""
            )
            raise ValueError(
                f"mesh.{name}={value} does not divide the {of}; choose a divisor of {among}"
            )
    return Mesh(np.asarray(devices).reshape(-1, fsdp, context), AXES)


def choose(
    devices: int, batch: int, state: float, memory: float, *, fsdp: int = 0, context: int = 0
) -> tuple[int, int]:
    """Return (fsdp, context) for this number of devices; a given value other than 0 is used as is.

    context: 1, unless the batch has fewer videos than there are devices; then the fewest devices
    per video that leave no device idle, devices / gcd(devices, batch). fsdp: the fewest devices
    over which `state` (bytes of weights, gradients, moments and averages) takes at most half of the
    `memory` of a device, because the other half is for activations: 1 if it fits whole (data
    parallel), all devices if it fits nowhere. memory: bytes of a device; 0 if unknown, as on CPUs,
    and then nothing is split.
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


def batch_shards(mesh: Mesh) -> int:
    """Return the number of shards of a batch: data x fsdp."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(name: str, batch: int, mesh: Mesh):
    """Raise ValueError unless `batch` divides over data x fsdp."""
    shards = batch_shards(mesh)
    if batch < 1 or batch % shards:
        raise ValueError(
            f"{name}={batch} does not divide over {shards} devices (mesh {describe(mesh)}); make "
            f"it a multiple of {shards}"
        )


def describe(mesh: Mesh) -> str:
    """Return the sizes of the axes as text: 'data 2 x fsdp 4 x context 1'."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
