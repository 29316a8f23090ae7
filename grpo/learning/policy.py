"""The policy: the transformer, what of it is trained, and the reference it is held near.

With LoRA the trained arrays are the adapters, and the reference is the same frozen arrays without
them. With full fine-tuning the trained arrays are fp32 copies of all weights, cast to the model's
dtypes where they are used, and the reference is the frozen original.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from wan_jax.distributed import sharding as sharding_lib
from wan_jax.models import flat_params, sharded_forward
from wan_jax.models import lora as lora_lib
from wan_jax.models.config import TransformerConfig
from wan_jax.models.layers import LoRAParam
from wan_jax.models.lora import LoRAConfig
from wan_jax.models.transformer import WanTransformer3D

Flat = dict[str, jax.Array]

# Of rollout and update. XLA may otherwise leave out roundings to bfloat16 inside what it fuses,
# which differs between the two: without the first option the first update's ratio was off by 6e-4
# (bfloat16, 2048 latents a video), with it by 2e-5. Large products are the vendor's library's
# (cuBLASLt, hipBLASLt), where bias, GELU and the adapters' share are part of the product; Triton's
# would leave them to kernels of their own. Products that share a factor are not merged: the last
# layers of policy and reference were, their bias then came after the rounding, and the ratio was
# off by 2e-4.
COMPILER_OPTIONS = {
    "xla_allow_excess_precision": False,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_cublaslt": True,
    "xla_gpu_dot_merger_threshold_mb": 0,
}


@dataclasses.dataclass(frozen=True)
class Policy:
    """Static structure only; the arrays travel beside it: `trainable` (flat dict, fp32) and
    `frozen` (an nnx.State).
    """

    base_graph: nnx.GraphDef
    graph: nnx.GraphDef  # with adapters; equal to base_graph without LoRA
    adapters: nnx.State | None  # abstract LoRA state, None for full fine-tuning
    base: nnx.State  # abstract base state
    lora: LoRAConfig | None

    @property
    def trainable(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the trained arrays, fp32."""
        arrays = flat_params.flatten(self.base if self.adapters is None else self.adapters)
        return {path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in arrays.items()}

    def module(self, trainable: Flat, frozen: nnx.State) -> WanTransformer3D:
        """The transformer under training."""
        if self.adapters is not None:
            return nnx.merge(self.graph, flat_params.unflatten(self.adapters, trainable), frozen)
        dtypes = {path: leaf.dtype for path, leaf in flat_params.flatten(self.base).items()}
        return nnx.merge(
            self.graph,
            flat_params.unflatten(
                self.base, {k: v.astype(dtypes[k]) for k, v in trainable.items()}
            ),
        )

    def reference(self, frozen: nnx.State) -> WanTransformer3D:
        """The transformer before training."""
        return nnx.merge(self.base_graph, frozen)


@functools.cache
def make_structure(
    config: TransformerConfig,
    *,
    lora: LoRAConfig | None,
    dtype,
    attention: str,
    remat: str,
    mesh=None,
) -> Policy:
    """The policy without arrays: enough to trace, lower and compile what it takes part in. mesh: as
    of its arrays.
    """
    key = jax.random.key(0)  # of adapters that are never drawn

    def structure(lora):
        return nnx.eval_shape(
            lambda: sharded_forward.attach(_build(config, lora, key, dtype, attention, remat), mesh)
        )

    base_graph, base = nnx.split(structure(None))
    if lora is None:
        return Policy(base_graph, base_graph, None, base, None)
    graph, adapters, _ = nnx.split(structure(lora), LoRAParam, ...)
    return Policy(base_graph, graph, adapters, base, lora)


def make_policy(
    config: TransformerConfig,
    frozen: nnx.State,
    mesh,
    *,
    lora: LoRAConfig | None,
    key,
    dtype,
    attention: str,
    remat: str,
) -> tuple[Policy, Flat]:
    """The policy and its initial trainable arrays, placed on the mesh. `frozen` is the loaded base
    state.
    """
    policy = make_structure(
        config, lora=lora, dtype=dtype, attention=attention, remat=remat, mesh=mesh
    )
    if lora is None:
        trainable = {k: jnp.array(v, jnp.float32) for k, v in flat_params.flatten(frozen).items()}
    else:
        init = jax.jit(
            lambda: nnx.split(_build(config, lora, key, dtype, attention, remat), LoRAParam, ...)[1]
        )
        trainable = flat_params.flatten(init())
    return policy, sharding_lib.shard_params(trainable, mesh)


def _build(
    config, lora: LoRAConfig | None, key, dtype, attention: str, remat: str
) -> WanTransformer3D:
    model = WanTransformer3D(
        config, dtype=dtype, attention=attention, remat=remat, rngs=nnx.Rngs(0)
    )
    return lora_lib.attach(model, lora, key) if lora else model
