"""Names of a transformer's layers: ours, those of Diffusers and Wan's original ones."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from wan_jax.models import flat_params
from wan_jax.models.lora import adapted_layers
from wan_jax.storage import key_table, model_dir

# our adapters: {'blocks/attn1/to_q/lora_a': [L, in, r], '.../lora_b': [L, r, out]}, fp32
Flat = dict[str, np.ndarray]
# a transformer's dense layers: {'blocks/attn1/to_q': (L, in, out)}
Kernels = Mapping[str, tuple[int, ...]]

# target names in common use, in the order in which they are listed
ENDINGS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out")
PATCH = "patch_embedding"  # a convolution in Diffusers, a dense layer here
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
    # what only differences change, not adapters
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
    PATCH: PATCH,
}


@dataclasses.dataclass(frozen=True)
class Parameters:
    """All that a LoRA file can change of a transformer when it is merged.

    Attributes:
        kernels: the dense layers, the patch embedding included.
        differences: the entry of the key table that `.diff` (of a weight) or `.diff_b` (of a bias)
            changes, by (Diffusers' or the original name of the layer, 'diff' or 'diff_b'). A
            modulation is also ('blocks.0', 'diff_m'), as LightX2V writes it.
    """

    kernels: Kernels
    differences: Mapping[tuple[str, str], key_table.Entry]


def dense_layers(config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the layers that a file can adapt: {'blocks/attn1/to_q': (L, in, out)}.

    config: a `TransformerConfig`. The patch embedding, a convolution in Diffusers, is left out.
    """
    return {layer: shape for layer, shape in _kernels(_shapes(config)).items() if layer != PATCH}


def parameters(config) -> Parameters:
    """Return what a LoRA file can change of a transformer. config: a `TransformerConfig`."""
    shapes = _shapes(config)
    differences = {}
    for entry in key_table.entries("transformer", shapes, config.patch_size):
        kind = "diff_b" if entry.key.endswith(".bias") else "diff"
        name = entry.key.removesuffix(".bias").removesuffix(".weight")
        original = original_name(name)
        differences |= {(name, kind): entry, (original, kind): entry}
        if original.endswith(".modulation"):
            differences[original.removesuffix(".modulation"), "diff_m"] = entry
    return Parameters(_kernels(shapes), differences)


def _shapes(config) -> dict[str, tuple[int, ...]]:
    flat = flat_params.flatten(model_dir.abstract("transformer", config)[1])
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def _kernels(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        path.removesuffix("/kernel"): shape
        for path, shape in shapes.items()
        if path.endswith("/kernel")
    }


def modules(kernels: Kernels) -> dict[str, tuple[str, int | None]]:
    """Return Diffusers' module names with our layers: {'blocks.0.attn1.to_q': ('blocks/...', 0)}.

    The number is the block's, None outside blocks.
    """
    table = key_table.entries(
        "transformer", {f"{layer}/kernel": shape for layer, shape in kernels.items()}
    )
    return {e.key.removesuffix(".weight"): (e.path.removesuffix("/kernel"), e.layer) for e in table}


def original_name(module: str) -> str:
    """Return Wan's original name of a module: 'blocks.0.self_attn.q' for 'blocks.0.attn1.to_q'."""
    if module == "scale_shift_table":  # outside of the blocks
        return "head.modulation"
    name = re.sub(r"^blocks\.\d+\.", "", module)
    return module.removesuffix(name) + ORIGINAL[name]


def layer_targets(layers: Iterable[str], kernels: Kernels) -> tuple[str, ...]:
    """Return the shortest target names, as in PEFT's `target_modules`, that adapt only `layers`."""
    wanted, targets = set(layers), set()
    for module, (layer, _) in modules(kernels).items():
        if layer not in wanted:
            continue
        parts = re.sub(r"^blocks\.\d+\.", "", module).split(".")
        endings = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        endings.append(layer.replace("/", "."))
        candidates = [ending for ending in endings if ending in ENDINGS]
        candidates += [ending for ending in endings if not ending[0].isdigit()]
        targets.add(next(c for c in candidates if adapted_layers(kernels, (c,)) <= wanted))
    known = [ending for ending in ENDINGS if ending in targets]
    return (*known, *sorted(targets.difference(known)))
