"""How a run is placed on the devices where the recipe leaves that open: the mesh (`config.mesh`) and
rematerialisation (`config.model.remat`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from grpo.learning.optimiser import OptimiserConfig
from grpo.learning.policy import Policy, make_structure
from grpo.settings.parse import Settings
from grpo.settings.schema import Recipe
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.models.presets import Preset
from wan_jax.models.quantised import Quantisation

# share of a device's memory for weights, states and the activations that `save_matmuls` keeps,
# where model.remat is 'auto'
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
    optimiser: OptimiserConfig,
) -> int:
    """Return the bytes of a run's weights and states on its devices together, without activations.
    They are split over `mesh.fsdp`.

    For each trained parameter these are 4 bytes of weight, those of moments and average, and 4 of each
    lagged copy, for every trained expert, and 4 of gradient for the one that is being updated. They
    include the frozen weights of all experts; of one where `offload` may put the other into host
    memory; of none in full fine-tuning without a reference. Full fine-tuning also computes with a
    copy of the weights in the model's type. An evaluation trains nothing and has only the frozen
    weights.

    Args:
        policy: the structure of one expert.
        experts: number of the model's experts.
        trained: number of them that are trained; 0 in evaluations.
        reference: whether the method needs the base model's velocity.
        lagged: number of copies of earlier weights that the method keeps.
        offload: config.model.offload.
        offload_optimiser: whether moments and average are in host memory.
        optimiser: settings of the optimiser.
    """
    count = sum(x.size for x in policy.trainable.values())
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(policy.base))
    frozen = weights * (experts if offload == "never" else 1)
    if not trained:
        return frozen
    full = policy.adapters is None
    frozen = 0 if full and not reference else frozen
    each = 4 + (0 if offload_optimiser else optimiser.bytes_per_parameter) + 4 * lagged
    return frozen + (weights if full else 0) + count * (each * trained + 4)


def state_of(recipe: Recipe, settings: Settings, preset: Preset, trained: int) -> int:
    """Return the `state_bytes` of a recipe that trains `trained` experts of a model."""
    weights = recipe.model.weights
    policy = make_structure(
        preset.transformer,
        lora=settings.lora,
        dtype=settings.dtype,
        attention="xla",
        remat="none",
        quantisation=None if weights == "dtype" else Quantisation(weights),
    )
    return state_bytes(
        policy,
        experts=len(preset.experts),
        trained=trained,
        reference=settings.method.needs_reference,
        lagged=len(settings.method.lagged),
        offload=recipe.model.offload,
        offload_optimiser=recipe.train.offload_optimiser,
        optimiser=settings.optimiser,
    )


def choose_mesh(
    recipe: Recipe,
    settings: Settings,
    preset: Preset,
    *,
    trained: int,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    memory: float | None = None,
) -> tuple[jax.sharding.Mesh, str]:
    """Return the mesh that `config.mesh` asks for, with its zeros chosen by `mesh.choose`, and one
    line about it for the log.

    trained: number of trained experts, 0 in evaluations. devices: None for all. memory: bytes of a
    device; None: as the backend reports. Raises ValueError where mesh, devices and batch do not
    fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    if memory is None:
        memory = float((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0))
    state = state_of(recipe, settings, preset, trained)
    batch, asked = recipe.sample.batch_size, recipe.mesh
    fsdp, context = mesh_lib.choose(
        len(devices), batch, state, memory, fsdp=asked.fsdp, context=asked.context
    )
    mesh = mesh_lib.make_mesh(fsdp, devices, context)
    mesh_lib.check_batch("config.sample.batch_size", batch, mesh)
    limit = f" of {memory / 1e9:.0f}" if memory else ""
    content = "weights, gradients, moments and averages" if trained else "weights"
    return (
        mesh,
        f"mesh {mesh_lib.describe(mesh)}: {content} take about {state / fsdp / 1e9:.3g}{limit} GB "
        "a device",
    )


def choose_remat(
    recipe: Recipe,
    settings: Settings,
    preset: Preset,
    mesh: jax.sharding.Mesh,
    *,
    tokens: int,
    trained: int,
    memory: int | None,
) -> str:
    """Return how blocks are rematerialised: `config.model.remat`, or the choice for 'auto'.

    That is 'save_matmuls' where weights, states and the activations which it keeps fit into SHARE
    of a device's memory, else 'block', which is also the choice where the memory is unknown.

    `save_matmuls` keeps, for each of a micro-batch's `tokens` a video and in every layer: q, k, v,
    both results of self-attention and of cross-attention, before and after the dense layer, the
    query of cross-attention, and both products of the feed-forward; twice where guidance is
    trained, with each video twice. trained: number of trained
    experts. memory: bytes of a device; None: unknown.
    """
    if recipe.model.remat != "auto":
        return recipe.model.remat
    if not memory:
        return "block"
    config = preset.transformer
    passes = 2 if recipe.sample.guidance > 1 and settings.method.guided else 1
    videos = passes * recipe.sample.batch_size // mesh_lib.batch_shards(mesh)
    rows = videos * tokens // mesh.shape["context"]
    values = rows * config.num_layers * (9 * config.width + config.ffn_dim)
    activations = values * jnp.dtype(settings.dtype).itemsize
    state = state_of(recipe, settings, preset, trained) / mesh.shape["fsdp"]
    return "save_matmuls" if activations + state <= SHARE * memory else "block"
