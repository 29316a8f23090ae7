"""Writes LoRA files for Diffusers, ComfyUI and PEFT, and makes the adapters that a run starts from.

Names of a layer's two factors, of shapes (r, in) and (out, r), in each format:

    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight
                transformer.blocks.0.attn1.to_q.lora_B.weight
    comfyui     diffusion_model.blocks.0.self_attn.q.lora_down.weight
                diffusion_model.blocks.0.self_attn.q.lora_up.weight
    peft        base_model.model.blocks.0.attn1.to_q.lora_A.weight
                base_model.model.blocks.0.attn1.to_q.lora_B.weight

The first two state no alpha, so programs use the scale 1; alpha / r is multiplied into B. PEFT's
settings (`peft_settings`) state alpha, and the factors are as they were trained. Each expert of a
model with two has a file of its own, with the same prefix. `lora_files` reads these files and those
of other programs.
"""

import pathlib
import zlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from wan_jax.distributed import multihost
from wan_jax.errors import UserError
from wan_jax.models.lora import LoRAConfig, adapted_layers
from wan_jax.storage import lora_files, model_dir
from wan_jax.storage.lora_files import LoRAFile, read, read_experts, read_for
from wan_jax.storage.lora_names import (
    Flat,
    Kernels,
    dense_layers,
    modules,
    original_name,
)
from wan_jax.storage.tensor_files import save_tensors

EXPERTS = {"transformer": "high_noise", "transformer_2": "low_noise"}
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
PREFIXES = {
    "diffusers": "transformer.",
    "comfyui": "diffusion_model.",
    "peft": lora_files.PEFT_PREFIX,
}
SUFFIXES = {
    "diffusers": {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"},
    "comfyui": {"lora_a": "lora_down.weight", "lora_b": "lora_up.weight"},
    "peft": {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"},
}


# ---- ours to theirs ------------------------------------------------------------------------------


def to_tensors(
    adapters: Flat,
    config: LoRAConfig,
    kernels: Kernels,
    layout: str = "diffusers",
    dtype: str = "float32",
) -> Flat:
    """Return one transformer's adapters as the tensors of a file.

    Returns {key: A^T (r, in) or (alpha / r) B^T (out, r), for PEFT B^T} in `dtype`. layout:
    'diffusers', 'comfyui' or 'peft'. Raises `UserError` when the adapters are not those of `config` on this model, and
    when a value is NaN or too large for `dtype`.
    """
    layers = sorted({path.rsplit("/", 1)[0] for path in adapters})
    if "patch_embedding" in layers:
        raise UserError(
            "the adapter of patch_embedding cannot be written to a LoRA file, since other programs "
            "use a convolution there: write the whole model with python -m convert.to_diffusers"
        )
    wanted = adapted_layers(kernels, config.targets)
    if not layers or set(layers) != wanted or len(adapters) != 2 * len(layers):
        odd = sorted(set(layers) ^ wanted) or layers or ["no adapter at all"]
        raise UserError(
            f"the checkpoint's adapters are not those of {describe(config)} on this model "
            f"({odd[0]}): it was trained from another one"
        )
    tensors = {}
    for module, (layer, index) in modules({layer: kernels[layer] for layer in layers}).items():
        for factor in ("lora_a", "lora_b"):
            value = adapters.get(f"{layer}/{factor}")
            *stack, n_in, n_out = kernels[layer]
            shape = (
                (*stack, n_in, config.rank) if factor == "lora_a" else (*stack, config.rank, n_out)
            )
            if value is None or value.shape != shape:
                found = "missing" if value is None else f"of shape {value.shape}"
                raise UserError(
                    f"the checkpoint's {layer}/{factor} is {found}, this model and rank "
                    f"{config.rank} ask for {shape}: it was trained from another model"
                )
            value = np.asarray(value if index is None else value[index], np.float64).T
            if factor == "lora_b" and layout != "peft":
                value = config.scale * value
            with np.errstate(over="ignore"):
                value = value.astype(np.float32).astype(DTYPES[dtype])
            if not np.isfinite(value.astype(np.float32)).all():
                raise UserError(
                    f"{module}.{factor} holds NaN, infinity or values beyond {dtype}: nothing was "
                    "written"
                )
            name = original_name(module) if layout == "comfyui" else module
            tensors[f"{PREFIXES[layout]}{name}.{SUFFIXES[layout][factor]}"] = np.ascontiguousarray(
                value
            )
    return tensors


def peft_settings(config: LoRAConfig, kernels: Kernels) -> dict:
    """Return the content of PEFT's adapter_config.json for adapters of `config`.

    target_modules are those of `config` where PEFT's rule (the name is a target, or ends in a dot
    and a target) gives the same layers, else the full names.
    """
    wanted = adapted_layers(kernels, config.targets)
    table = modules(kernels)
    names = {module for module, (layer, _) in table.items() if layer in wanted}
    same = {m for m in table if any(m == t or m.endswith(f".{t}") for t in config.targets)}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.targets) if same == names else sorted(names),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def write(
    path: pathlib.Path,
    tensors: Flat,
    config: LoRAConfig,
    kernels: Kernels,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file and read it back. Raises `UserError` unless every tensor is as it was."""
    save_tensors(tensors, path, metadata={"format": "pt"} | dict(metadata or {}))
    layout = next(
        name for name, prefix in PREFIXES.items() if next(iter(tensors)).startswith(prefix)
    )
    found, values = read(path, kernels), {}
    for module, pair in found.factors.items():
        name = original_name(module) if layout == "comfyui" else module
        for factor, value in zip(("lora_a", "lora_b"), pair):
            values[f"{PREFIXES[layout]}{name}.{SUFFIXES[layout][factor]}"] = value.T
    layers = adapted_layers(kernels, config.targets)
    count = 2 * sum(layer in layers for layer, _ in modules(kernels).values())
    if (
        set(found.scales.values()) != {config.scale if layout == "peft" else 1.0}
        or len(tensors) != count
        or values.keys() != tensors.keys()
        or any(not np.array_equal(values[k], np.float32(v)) for k, v in tensors.items())
    ):
        raise UserError(
            f"{path} does not hold what was written: the disk is at fault; write it again elsewhere"
        )


# ---- theirs to ours ------------------------------------------------------------------------------


def fit(file: LoRAFile, recipe: LoRAConfig, kernels: Kernels) -> Flat:
    """Return the file's adapters under a recipe's settings, with an unchanged effect.

    recipe.scale * A B equals the file's product: the ratio of the scales is multiplied into B.
    Layers that only the recipe adapts, and the ranks beyond the file's, start like new adapters,
    with B = 0. Raises `UserError` when the file adapts layers that the recipe does not, or has a
    higher rank, and when the recipe's scale is 0.
    """
    table, wanted = modules(kernels), adapted_layers(kernels, recipe.targets)
    if other := sorted(module for module in file.factors if table[module][0] not in wanted):
        raise UserError(
            f"{file.where} adapts {len(other)} layers that "
            f"config.lora.targets={','.join(recipe.targets)} does not name, the first {other[0]}: "
            f"set config.lora.targets={','.join(file.targets)}, or more"
        )
    if file.ranks[-1] > recipe.rank:
        raise UserError(
            f"{file.where} has rank {' and '.join(map(str, file.ranks))}, "
            f"config.lora.rank={recipe.rank} is too low: set config.lora.rank={file.ranks[-1]}, "
            f"and config.lora.alpha={file.config.alpha:g} for the file's own scale"
        )
    if not recipe.alpha:
        raise UserError(
            f"config.lora.alpha={recipe.alpha:g} removes the effect of {file.where}: give another "
            "value"
        )
    flat: Flat = {}
    for layer in sorted(wanted):
        *stack, n_in, n_out = kernels[layer]
        rng = np.random.default_rng(zlib.crc32(layer.encode()))
        draw = rng.standard_normal((*stack, n_in, recipe.rank), np.float32)
        flat[f"{layer}/lora_a"] = draw / np.float32(recipe.rank)
        flat[f"{layer}/lora_b"] = np.zeros((*stack, recipe.rank, n_out), np.float32)
    for module, (a, b) in file.factors.items():
        layer, index = table[module]
        at = ... if index is None else index
        rank = a.shape[1]
        flat[f"{layer}/lora_a"][at][:, :rank] = a
        flat[f"{layer}/lora_b"][at][:rank] = b.astype(np.float64) * (
            file.scales[module] / recipe.scale
        )
    return flat


def describe(config: LoRAConfig) -> str:
    """Return the settings of adapters in words, for messages."""
    return f"rank {config.rank}, alpha {config.alpha:g}, targets {', '.join(config.targets)}"


def initial_adapters(paths: str, model: model_dir.ModelDir, recipe: LoRAConfig) -> dict[str, Flat]:
    """Return the adapters that training starts from: {expert: {path: fp32 array}}.

    paths: a file or folder as `lora_files.find` takes it; for a model with two experts one that
    holds both, or two joined by a comma, the one for high noise first. Raises `UserError` as
    `read_experts` and `fit` do.
    """
    kernels = dense_layers(model.config("transformer"))
    found = read_for(
        [path.strip() for path in paths.split(",")],
        model.experts,
        f"config.lora.init={paths}",
        lambda path: read_experts(path, kernels),
    )
    if missing := set(model.experts) - set(found):
        raise UserError(
            f"config.lora.init={paths} names no file for {' and '.join(sorted(missing))}"
        )
    # Check before anything is reported: a file that does not fit starts nothing
    adapters = {expert: fit(found[expert], recipe, kernels) for expert in model.experts}
    for expert, file in found.items():
        wanted = adapted_layers(kernels, recipe.targets)
        layers = sum(layer in wanted for layer, _ in modules(kernels).values())
        stated = sorted(set(file.scales.values()))
        same = (len(file.factors), file.ranks, stated) == (layers, [recipe.rank], [recipe.scale])
        if not same and multihost.first():
            print(
                f"{expert}: {file.where} adapts {len(file.factors)} of the recipe's {layers} "
                f"layers, rank {', '.join(map(str, file.ranks))}, scale "
                f"{', '.join(f'{v:g}' for v in stated)}; the effect is kept, and the rest starts "
                "at B = 0"
            )
    return adapters
