"""The weights that a training run saved, and the transformers with them.

`load_trained` reads the arrays of a checkpoint; `load_transformers` builds the transformers of a
model with them, for sampling and evaluation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.distributed import memory
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.distributed.offload import Weights, choose_offload
from wan_jax.errors import UserError
from wan_jax.models import flat_params, lora, sharded_forward
from wan_jax.models.layers import LoRAParam
from wan_jax.models.lora import LoRAConfig
from wan_jax.models.quantised import Quantisation
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.storage import checkpoint as checkpoint_lib
from wan_jax.storage import merged_loras, model_dir


def load_trained(path) -> tuple[LoRAConfig | None, dict[str, dict[str, np.ndarray]], dict]:
    """Read the weights to sample with from a run folder (its newest checkpoint) or from a folder
    `checkpoints/<epoch>`.

    Returns (LoRA settings, None after full fine-tuning; {expert: {path: float32 array}} of the
    trained experts; meta of the checkpoint). Raises `UserError` when there is no complete
    checkpoint, or when it is damaged.
    """
    checkpoints, epoch = checkpoint_lib.find(path)
    meta = checkpoints.check(epoch, ("meta", "trained"))
    trained = checkpoints.load_trained(epoch)
    config = None
    if settings := meta["lora"]:
        config = LoRAConfig(
            rank=settings["rank"], alpha=settings["alpha"], targets=tuple(settings["targets"])
        )
    return config, checkpoint_lib.split_experts(trained, meta["experts"]), meta


def used_single_expert(path) -> bool:
    """Return whether a checkpoint's run used the first of two experts alone (`model.single_expert`).
    Raises `UserError` as `load_trained` does.
    """
    checkpoints, epoch = checkpoint_lib.find(path)
    return bool(checkpoints.meta(epoch)["config"].get("model", {}).get("single_expert"))


def base_note(path, quantisation: Quantisation | None) -> str:
    """Return a sentence where the adapters of a checkpoint were trained on base weights that are stored
    otherwise than in `quantisation`; "" where they were not. Raises `UserError` as `load_trained` does,
    and where all weights were trained and these are quantised.
    """
    checkpoints, epoch = checkpoint_lib.find(path)
    meta = checkpoints.meta(epoch)
    check_quantised(path, meta, quantisation)
    before = meta["config"].get("model", {}).get("weights", "dtype")
    now = quantisation.kind if quantisation else "dtype"
    if before == now or not meta["lora"]:
        return ""
    return f"{path} was trained on a base with weights={before}, and this one has weights={now}"


def check_quantised(path, meta: dict, quantisation: Quantisation | None) -> None:
    """Raise `UserError` where a checkpoint has all weights, and they are to be quantised."""
    if quantisation is not None and not meta["lora"]:
        raise UserError(
            f"checkpoint {path} has trained all weights, which are not quantised "
            f"({quantisation.kind}): set --config.model.weights=dtype, in sampling --weights=dtype"
        )


def load_transformers(
    model: model_dir.ModelDir,
    checkpoint: str | None,
    dtype,
    attention: str,
    mesh,
    offload: str,
    quantisation: Quantisation | None = None,
) -> tuple[nnx.GraphDef, Weights]:
    """Load the transformers of a model, with the trained weights or adapters of a checkpoint.

    Args:
        model: the converted model, with LoRAs to merge (`merged_loras`).
        checkpoint: a path for `load_trained`; None for the base model.
        dtype: storage and compute type of the transformers.
        attention: a backend of `attention.choose_backend`.
        mesh: the mesh to shard them on.
        offload: whether the idle expert of two is in host memory, one of `offload.OFFLOAD`.
        quantisation: of the weights of the blocks; None: stored in `dtype`.

    Returns the graph that all experts share, and their weights. Raises `UserError` when the
    checkpoint belongs to another model, or needs a LoRA merged that the model has not.
    """
    # The checkpoint, and whether it belongs to this model.
    lora_config = None
    trained = {}
    beyond: tuple[merged_loras.MergedLoRA, ...] = ()
    if checkpoint is not None:
        lora_config, trained, meta = load_trained(checkpoint)
        check_quantised(checkpoint, meta, quantisation)
        model.check_same(meta.get("model_digest"), meta["model"], str(checkpoint))
        merged_loras.check(model, meta, checkpoint)
        beyond = merged_loras.beyond(model, meta)
        if extra := sorted(set(trained) - set(model.experts)):
            raise UserError(
                f"checkpoint {checkpoint} trained {', '.join(extra)}, which {model.path} does not have: "
                "it was trained from another model; see 'model' in its config.json"
            )

    # The graph and the abstract arrays of one transformer, with adapters if they were trained.
    def build():
        module = WanTransformer3D(
            model.config("transformer"),
            dtype=dtype,
            attention=attention,
            quantisation=quantisation,
            remat="block",  # there is no backward pass to save activations for
            rngs=nnx.Rngs(0),
        )
        if lora_config:
            lora.attach(module, lora_config, jax.random.key(0))
        return sharded_forward.attach(module, mesh)

    graphdef, adapters, base = nnx.split(nnx.eval_shape(build), LoRAParam, ...)

    # The arrays of one expert.
    def load(expert: str) -> nnx.State:
        values = trained.get(expert)
        # trained weights, unlike adapters, replace the model's, with what was merged into these
        replaced = values is not None and not lora_config
        source = dataclasses.replace(model, changes=None) if replaced else model
        _, state = model_dir.build(
            expert, source, dtype=dtype, mesh=mesh, attention=attention, quantisation=quantisation
        )
        target = adapters if lora_config else state
        flat = flat_params.flatten(target)
        if values is None and not lora_config:
            return state
        if values is None:  # the run did not train this expert: adapters without effect
            values = {k: np.zeros(v.shape, np.float32) for k, v in flat.items()}
        wrong = {
            k
            for k in flat.keys() | values.keys()
            if k not in flat or k not in values or flat[k].shape != values[k].shape
        }
        if wrong:
            raise UserError(
                f"checkpoint {checkpoint} does not fit this model ({len(wrong)} arrays differ, "
                f"e.g. {min(wrong)}): it was trained from another one; see 'model' in its "
                "config.json"
            )
        if replaced and beyond:
            changes = merged_loras.changes_of(model, beyond, expert)
            values = changes.applied(values)
            changes.report(expert, ", ".join(map(str, beyond)))
        cast = {k: jnp.asarray(v).astype(flat[k].dtype) for k, v in values.items()}
        placed = flat_params.unflatten(target, sharding_lib.shard_params(cast, mesh))
        return nnx.merge_state(placed, state) if lora_config else placed

    # On the device or in host memory.
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base)) // mesh.shape["fsdp"]
    offloaded = choose_offload(
        offload, len(model.experts), size, memory.limit(mesh.local_devices[0])
    )
    return graphdef, Weights([functools.partial(load, name) for name in model.experts], offloaded)
