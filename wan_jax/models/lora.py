"""Low-rank adapters on the transformer's dense layers: y = x W + b + (alpha / rank) (x A) B.

Targets are named as PEFT names them: a module is adapted when its Diffusers name ends in one of the
targets, so ('to_q', 'to_k', 'to_v', 'to_out.0') adapts self- and cross-attention of every block.
Rank and alpha as in PEFT.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from wan_jax.models.layers import Linear, LoRAParam

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ATTENTION_TARGETS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def attach(model: nnx.Module, config: LoRAConfig, key: jax.Array) -> nnx.Module:
    """Adds adapters to `model` in place and returns it: A ~ normal(1/rank) (PEFT's "gaussian"), B =
    0, both fp32.

    Every draw depends on (key, the layer's path) only. Raises ValueError when a target matches no
    layer, and on a rank below 1.
    """
    if config.rank < 1:
        raise ValueError(
            f"lora rank {config.rank} must be at least 1; to train all weights set train.lora=None"
        )
    used = set()
    for path, module in list(nnx.iter_modules(model)):
        if not isinstance(module, Linear):
            continue
        name = "/".join(map(str, path))
        match = [t for t in config.targets if _matches(name, t)]
        if not match:
            continue
        used.update(match)
        *stack, n_in, n_out = module.kernel.shape  # stack is (L,) inside scanned blocks
        sub = jax.random.fold_in(key, zlib.crc32(name.encode()))
        module.lora_a = LoRAParam(
            jax.random.normal(sub, (*stack, n_in, config.rank), jnp.float32) / config.rank
        )
        module.lora_b = LoRAParam(jnp.zeros((*stack, config.rank, n_out), jnp.float32))
        module.lora_scale = config.scale
    unused = [t for t in config.targets if t not in used]
    if unused:
        raise ValueError(
            f"lora targets {unused} match no dense layer; known endings are to_q, to_k, to_v, "
            "to_out.0, ffn.net.0.proj, ffn.net.2, proj_out"
        )
    return model


def adapted_layers(layers: Iterable[str], targets: Iterable[str]) -> set[str]:
    """Those of the dense layers ('blocks/attn1/to_q', ...) that the targets name."""
    return {layer for layer in layers if any(_matches(layer, target) for target in targets)}


def _matches(path: str, target: str) -> bool:
    parts, ending = path.split("/"), target.replace(".", "_").split("/")
    name = "_".join(parts)
    return name == ending[0] or name.endswith("_" + ending[0])


def num_params(state: nnx.State) -> int:
    """Number of elements in a state's arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(state))
