"""The transformers as a training run left them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.diffusion import experts
from wan_jax.distributed import memory, sharding
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.errors import UserError
from wan_jax.models import lora
from wan_jax.models import params as P
from wan_jax.models.layers import LoRAParam
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.storage import model_dir
from wan_jax.storage.checkpoint import load_trained


def load_transformers(
    model: model_dir.ModelDir, checkpoint: str | None, dtype, attention: str, mesh, offload: str
):
    """(graphdef, `experts.Weights`) of the base transformers, with a run's trained weights or
    adapters when given.
    """
    lora_settings, trained = None, {}
    if checkpoint is not None:
        lora_settings, trained, meta = load_trained(checkpoint)
        model.check_same(meta.get("model_digest"), meta["model"], str(checkpoint))
        if extra := sorted(set(trained) - set(model.experts)):
            raise UserError(
                f"checkpoint {checkpoint} trained {', '.join(extra)}, which {model.path} has not: "
                "it was trained from another model; see 'model' in its config.json"
            )

    def build():
        module = WanTransformer3D(
            model.config("transformer"),
            dtype=dtype,
            attention=attention,
            remat="block",
            # there is no backward pass: nothing is kept for one
            rngs=nnx.Rngs(0),
        )
        if lora_settings:
            lora.attach(module, lora_settings, jax.random.key(0))
        return sharding.attach(module, mesh)

    graphdef, adapters, base = nnx.split(nnx.eval_shape(build), LoRAParam, ...)

    def load(expert: str) -> nnx.State:
        _, state = model_dir.build(expert, model, dtype=dtype, mesh=mesh, attention=attention)
        target = adapters if lora_settings else state
        flat, values = P.flatten(target), trained.get(expert)
        if values is None and not lora_settings:
            return state
        if values is None:  # the run did not train this expert: adapters that do nothing
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
        values = mesh_lib.shard_params(
            {k: jnp.asarray(v).astype(flat[k].dtype) for k, v in values.items()}, mesh
        )
        values = P.unflatten(target, values)
        return nnx.merge_state(values, state) if lora_settings else values

    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base)) // mesh.shape["fsdp"]
    offloaded = experts.choose_offload(
        offload, len(model.experts), size, memory.limit(mesh.local_devices[0])
    )
    weights = experts.Weights([functools.partial(load, name) for name in model.experts], offloaded)
    return graphdef, weights
