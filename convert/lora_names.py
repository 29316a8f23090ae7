"""The names of a transformer's dense layers: ours, Diffusers' and Wan's original ones."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from convert import key_table
from wan_jax.models import flat_params
from wan_jax.models.lora import adapted_layers
from wan_jax.storage import model_dir

# our adapters: {'blocks/attn1/to_q/lora_a': [L, in, r], '.../lora_b': [L, r, out]}, fp32
Flat = dict[str, np.ndarray]
# a transformer's dense layers: {'blocks/attn1/to_q': (L, in, out)}
Kernels = Mapping[str, tuple[int, ...]]

# usual targets
ENDINGS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out")
ORIGINAL = {  # Diffusers' names, without `blocks.{i}.`, to Wan's original ones
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
}


def dense_layers(config) -> dict[str, tuple[int, ...]]:
    """The layers of a `TransformerConfig` that a file can adapt, {'blocks/attn1/to_q': (L, in,
    out)}.

    Without the patch embedding, which is a convolution in Diffusers.
    """
    flat = flat_params.flatten(model_dir.abstract("transformer", config)[1])
    return {
        path.removesuffix("/kernel"): tuple(leaf.shape)
        for path, leaf in flat.items()
        if path.endswith("/kernel") and path != "patch_embedding/kernel"
    }


def modules(kernels: Kernels) -> dict[str, tuple[str, int | None]]:
    """Diffusers' module names: {'blocks.0.attn1.to_q': ('blocks/attn1/to_q', 0)}; the number is
    None outside blocks.
    """
    table = key_table.entries(
        "transformer", {f"{layer}/kernel": shape for layer, shape in kernels.items()}
    )
    return {e.key.removesuffix(".weight"): (e.path.removesuffix("/kernel"), e.layer) for e in table}


def original_name(module: str) -> str:
    """'blocks.0.attn1.to_q' to 'blocks.0.self_attn.q'."""
    block, name = re.fullmatch(r"(blocks\.\d+\.)?(.+)", module).groups(default="")
    return block + ORIGINAL[name]


def layer_targets(layers: Iterable[str], kernels: Kernels) -> tuple[str, ...]:
    """The shortest target names, as PEFT's `target_modules`, that adapt exactly these layers of the
    model.
    """
    layers, targets = set(layers), {}
    for module, (layer, _) in modules(kernels).items():
        if layer not in layers:
            continue
        parts = re.sub(r"^blocks\.\d+\.", "", module).split(".")
        endings = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)] + [
            layer.replace("/", ".")
        ]
        usual = [e for e in endings if e in ENDINGS] + [e for e in endings if not e[0].isdigit()]
        targets[next(e for e in usual if adapted_layers(kernels, (e,)) <= layers)] = None
    return tuple(
        sorted(targets, key=lambda t: (ENDINGS.index(t) if t in ENDINGS else len(ENDINGS), t))
    )
