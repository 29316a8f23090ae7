"""How a run is spread over the devices where the recipe leaves that open (`config.mesh`)."""

import jax
import jax.numpy as jnp
import ml_collections

from grpo.learning.policy import Policy, make_structure
from grpo.settings.parse import Settings
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.models.config import TransformerConfig

# of a device's memory, for weights, states and what `save_matmuls` keeps, where model.remat is
# 'auto'
SHARE = 0.7


def state_bytes(
    policy: Policy,
    *,
    experts: int,
    trained: int,
    reference: bool,
    lagged: int = 0,
    offload: str,
    offload_optimiser: bool,
) -> int:
    """Bytes that a run holds on its devices beside activations, if it had one: all of them fall
    with `mesh.fsdp`.

    For each trained parameter 4 bytes of weight, 8 of moments and 4 of average for every trained
    expert, 4 of old weights where the method keeps them, and 4 of gradient for the one being
    updated. Frozen weights of all experts, of one where `offload` (config.model.offload) lets the
    other wait in host memory, of none in full fine-tuning without a `reference`; full fine-tuning
    computes with a copy of the weights in their own type. Where nothing is trained, an evaluation,
    the frozen weights are all.
    """
    count = sum(x.size for x in policy.trainable.values())
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(policy.base))
    frozen = weights * (experts if offload == "never" else 1)
    if not trained:
        return frozen
    full = policy.adapters is None
    frozen = 0 if full and not reference else frozen
    held = 4 + (0 if offload_optimiser else 12) + 4 * lagged
    return frozen + (weights if full else 0) + count * (held * trained + 4)


def state_of(
    c: ml_collections.ConfigDict, s: Settings, config: TransformerConfig, experts: int, trained: int
) -> int:
    """`state_bytes` of a recipe."""
    policy = make_structure(config, lora=s.lora, dtype=s.dtype, attention="xla", remat="none")
    return state_bytes(
        policy,
        experts=experts,
        trained=trained,
        reference=s.method.needs_reference,
        lagged=len(s.method.lagged),
        offload=c.model.offload,
        offload_optimiser=c.train.offload_optimiser,
    )


def choose_mesh(
    c: ml_collections.ConfigDict,
    s: Settings,
    config: TransformerConfig,
    *,
    experts: int,
    trained: int,
    devices=None,
    memory: float | None = None,
) -> tuple[jax.sharding.Mesh, str]:
    """The mesh that `c.mesh` asks for, its zeros filled in by `mesh.choose`, and one line about it
    for the log.

    memory: bytes of a device; None: as the backend says. Raises ValueError where mesh, devices and
    batch do not fit.
    """
    devices = jax.devices() if devices is None else devices
    if memory is None:
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    state = state_of(c, s, config, experts, trained)
    fsdp, context = mesh_lib.choose(
        len(devices), c.sample.batch_size, state, memory, fsdp=c.mesh.fsdp, context=c.mesh.context
    )
    mesh = mesh_lib.make_mesh(fsdp, devices, context)
    mesh_lib.check_batch("config.sample.batch_size", c.sample.batch_size, mesh)
    limit = f" of {memory / 1e9:.0f}" if memory else ""
    what = "weights, gradients, moments and averages" if trained else "weights"
    return (
        mesh,
        f"mesh {mesh_lib.describe(mesh)}: {what} take about {state / fsdp / 1e9:.3g}{limit} GB a "
        "device",
    )


def choose_remat(
    c: ml_collections.ConfigDict,
    s: Settings,
    config: TransformerConfig,
    mesh: jax.sharding.Mesh,
    *,
    tokens: int,
    experts: int,
    trained: int,
    memory: int | None,
) -> str:
    """`c.model.remat`; where that is 'auto', 'save_matmuls' if what it keeps fits into SHARE of a
    device's memory beside weights and states, else 'block', and 'block' where the device states no
    memory.

    Kept of each of a micro-batch's `tokens` a video, in every layer: q, k, v, what follows
    attention, the query of the text, what follows that, both products of the feed-forward; twice
    where guidance is trained, with each video twice.
    """
    if c.model.remat != "auto":
        return c.model.remat
    if not memory:
        return "block"
    passes = 2 if c.sample.guidance > 1 and s.method.guided else 1
    rows = (
        passes
        * c.sample.batch_size
        // mesh_lib.batch_shards(mesh)
        * tokens
        // mesh.shape["context"]
    )
    kept = (
        rows * config.num_layers * (7 * config.width + config.ffn_dim) * jnp.dtype(s.dtype).itemsize
    )
    state = state_of(c, s, config, experts, trained) / mesh.shape["fsdp"]
    return "save_matmuls" if kept + state <= SHARE * memory else "block"
