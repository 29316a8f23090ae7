"""Low-rank adapters on the dense layers of the transformer: y = x W + b + (alpha / rank) (x A) B.

Targets, rank and alpha are those of PEFT. A layer is adapted if its Diffusers name ends in one of
the targets, so ('to_q', 'to_k', 'to_v', 'to_out.0') adapts self- and cross-attention of every
block.
"""

import dataclasses
import zlib
from collections.abc import Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from wan_jax.models.layers import Linear, LoRAParam

Model = TypeVar("Model", bound=nnx.Module)
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Rank and scale of the adapters, and the layers that have one."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ATTENTION_TARGETS

    @property
    def scale(self) -> float:
        """The factor of the adapter's output."""
        return self.alpha / self.rank


def attach(model: Model, config: LoRAConfig, key: jax.Array) -> Model:
    """Add adapters to `model` in place and return it: A ~ normal(1/rank) (PEFT's "gaussian"), B =
    0, both fp32.

    Every draw depends only on `key` and the path of the layer. Raises ValueError when a target
    matches no layer, and on a rank below 1.
    """
    if config.rank < 1:
        raise ValueError(
            f"lora rank {config.rank} must be at least 1; to train all weights set train.lora=None"
        )
    matched = set()
    for path, module in list(nnx.iter_modules(model)):
        if not isinstance(module, Linear):
            continue
        name = "/".join(map(str, path))
        targets = [target for target in config.targets if _matches(name, target)]
        if not targets:
            continue
        matched.update(targets)
        stack, n_in, n_out = module.stack, module.in_features, module.out_features
        layer_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        module.lora_a = LoRAParam(
            jax.random.normal(layer_key, (*stack, n_in, config.rank), jnp.float32) / config.rank
        )
        module.lora_b = LoRAParam(jnp.zeros((*stack, config.rank, n_out), jnp.float32))
        module.lora_scale = config.scale
    unused = [target for target in config.targets if target not in matched]
    if unused:
        raise ValueError(
            f"lora targets {unused} match no dense layer; known endings are to_q, to_k, to_v, "
            "to_out.0, ffn.net.0.proj, ffn.net.2, proj_out"
        )
    return model


def adapted_layers(layers: Iterable[str], targets: Iterable[str]) -> set[str]:
    """Return the dense layers ('blocks/attn1/to_q', ...) among `layers` that match a target."""
    return {layer for layer in layers if any(_matches(layer, target) for target in targets)}


def _matches(path: str, target: str) -> bool:
    """Return whether the Diffusers name of the layer at `path` ends in `target`."""
    name = path.replace("/", "_")
    ending = target.replace(".", "_")
    return name == ending or name.endswith("_" + ending)
