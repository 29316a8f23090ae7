"""The policy: the transformer, its trained arrays, and the reference of the KL.

With LoRA the trained arrays are the adapters, and the reference is the same frozen weights without
them. In full fine-tuning the trained arrays are fp32 copies of all weights, which are cast to the
model's dtypes before use, and the reference is the frozen original.
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
from wan_jax.models.quantised import Quantisation
from wan_jax.models.transformer import WanTransformer3D

Flat = dict[str, jax.Array]

# Compiler options of rollout and update, which make both round alike. Deviations are those of the
# importance ratio from 1 in the first update.
# - excess precision: XLA otherwise omits roundings to bfloat16 inside fused operations, which differ
#   between rollout and update (6e-4 in bfloat16 with 2048 latents a video; 2e-5 with the option).
# - Triton, cublaslt: large products use the vendor's library (cuBLASLt, hipBLASLt), which includes
#   bias, GELU and the adapters' part in the product. Triton's products need kernels of their own for
#   them.
# - dot merger: products with a common factor are not merged. The last layers of policy and reference
#   were; their bias was then added after the rounding (2e-4).
COMPILER_OPTIONS = {
    "xla_allow_excess_precision": False,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_cublaslt": True,
    "xla_gpu_dot_merger_threshold_mb": 0,
}


@dataclasses.dataclass(frozen=True)
class Policy:
    """The static structure of the policy. Its arrays are separate: `trainable`, fp32 by name, and
    `frozen`, an nnx.State.

    Attributes:
        base_graph: graph of the transformer without adapters.
        graph: graph of the transformer with adapters; equal to base_graph in full fine-tuning.
        adapters: abstract state of the adapters; None in full fine-tuning.
        base: abstract state of the transformer without adapters.
        lora: the adapters' configuration; None in full fine-tuning.
    """

    base_graph: nnx.GraphDef
    graph: nnx.GraphDef
    adapters: nnx.State | None
    base: nnx.State
    lora: LoRAConfig | None

    @property
    def trainable(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The trained arrays, abstract fp32, by name."""
        arrays = flat_params.flatten(self.base if self.adapters is None else self.adapters)
        return {path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in arrays.items()}

    def module(self, trainable: Flat, frozen: nnx.State) -> WanTransformer3D:
        """Return the transformer with the trained arrays."""
        if self.adapters is not None:
            return merge(self.graph, flat_params.unflatten(self.adapters, trainable), frozen)
        dtypes = {path: leaf.dtype for path, leaf in flat_params.flatten(self.base).items()}
        cast = {path: x.astype(dtypes[path]) for path, x in trainable.items()}
        return merge(self.graph, flat_params.unflatten(self.base, cast))

    def reference(self, frozen: nnx.State) -> WanTransformer3D:
        """Return the transformer before training."""
        return merge(self.base_graph, frozen)


def merge(graph: nnx.GraphDef, *states: nnx.State) -> WanTransformer3D:
    """Return the transformer of a graph and its states."""
    module = nnx.merge(graph, *states)
    assert isinstance(module, WanTransformer3D)
    return module


@functools.cache
def make_structure(
    config: TransformerConfig,
    *,
    lora: LoRAConfig | None,
    dtype,
    attention: str,
    remat: str,
    quantisation: Quantisation | None = None,
    mesh=None,
) -> Policy:
    """Return the structure of the policy, to trace, lower and compile functions with.

    lora: None for full fine-tuning. dtype: of weights and products. quantisation: of the
    frozen weights of the blocks. mesh: of the arrays.
    """
    key = jax.random.key(0)  # unused: no array is drawn

    def structure(lora):
        return nnx.eval_shape(
            lambda: sharded_forward.attach(
                _build(config, lora, key, dtype, attention, remat, quantisation), mesh
            )
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
    quantisation: Quantisation | None = None,
) -> tuple[Policy, Flat]:
    """Return the policy and its initial trained arrays, placed on the mesh.

    frozen: the loaded state of the transformer. key: of the adapters' initial values. The other
    arguments are those of `make_structure`.
    """
    policy = make_structure(
        config,
        lora=lora,
        dtype=dtype,
        attention=attention,
        remat=remat,
        quantisation=quantisation,
        mesh=mesh,
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
    config, lora: LoRAConfig | None, key, dtype, attention: str, remat: str, quantisation=None
) -> WanTransformer3D:
    """Return the transformer, with adapters where `lora` is not None."""
    model = WanTransformer3D(
        config,
        dtype=dtype,
        attention=attention,
        remat=remat,
        quantisation=quantisation,
        rngs=nnx.Rngs(0),
    )
    return lora_lib.attach(model, lora, key) if lora else model
