"""LoRA files of other programs: our adapters to and from the layouts that Diffusers and ComfyUI read.

diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight (r, in) and .lora_B.weight (out, r), as PEFT names them
comfyui    diffusion_model.blocks.0.self_attn.q.lora_down.weight and .lora_up.weight, Wan's original names

A file written here states no alpha: both programs then take the scale as 1, so alpha / r is multiplied into B. A file
read may state one, in PEFT's metadata or in `.alpha` tensors. Each expert of a model with two has a file of its own,
with the same prefix in both. Both programs load a file whose prefix they do not know without a word and without an
effect, so every key is accounted for here, in reading and in writing.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from convert import key_table
from convert.folders import Shards
from wan_jax import model_dir
from wan_jax import params as P
from wan_jax.cli import UserError
from wan_jax.lora import LoRAConfig, adapted_layers

Flat = dict[str, np.ndarray]  # our adapters: {'blocks/attn1/to_q/lora_a': [L, in, r], '.../lora_b': [L, r, out]}, fp32
Kernels = Mapping[str, tuple[int, ...]]  # a transformer's dense layers: {'blocks/attn1/to_q': (L, in, out)}

EXPERTS = {"transformer": "high_noise", "transformer_2": "low_noise"}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
PREFIXES = {"diffusers": "transformer.", "comfyui": "diffusion_model."}
SUFFIXES = {"diffusers": {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"},
            "comfyui": {"lora_a": "lora_down.weight", "lora_b": "lora_up.weight"}}
FACTOR = re.compile(r"(?P<module>.+)\.(?:(?P<a>lora_A|lora_down)|lora_B|lora_up)\.weight")
ENDINGS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out")  # usual targets
ORIGINAL = {  # Diffusers' names, without `blocks.{i}.`, to Wan's original ones
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
    "proj_out": "head.head", "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2"}


@dataclasses.dataclass(frozen=True)
class LoRAFile:
    """What one file says about one transformer."""

    adapters: Flat  # as stored, in fp32: no scale applied
    rank: int
    alpha: float | None  # None: not stated, which means the rank, that is scale 1
    targets: tuple[str, ...]

    @property
    def config(self) -> LoRAConfig:
        """The settings under which `adapters` have the effect that the file has in Diffusers and ComfyUI."""
        return LoRAConfig(self.rank, float(self.rank) if self.alpha is None else self.alpha, self.targets)


# ---- names ----------------------------------------------------------------------------------------------------------

def dense_layers(config) -> dict[str, tuple[int, ...]]:
    """The layers of a `TransformerConfig` that a file can adapt, {'blocks/attn1/to_q': (L, in, out)}.

    Without the patch embedding, which is a convolution in Diffusers.
    """
    flat = P.flatten(model_dir.abstract("transformer", config)[1])
    return {path.removesuffix("/kernel"): tuple(leaf.shape) for path, leaf in flat.items()
            if path.endswith("/kernel") and path != "patch_embedding/kernel"}


def modules(kernels: Kernels) -> dict[str, tuple[str, int | None]]:
    """Diffusers' module names: {'blocks.0.attn1.to_q': ('blocks/attn1/to_q', 0)}; the number is None outside blocks."""
    table = key_table.entries("transformer", {f"{layer}/kernel": shape for layer, shape in kernels.items()})
    return {e.key.removesuffix(".weight"): (e.path.removesuffix("/kernel"), e.layer) for e in table}


def original_name(module: str) -> str:
    """'blocks.0.attn1.to_q' to 'blocks.0.self_attn.q'."""
    block, name = re.fullmatch(r"(blocks\.\d+\.)?(.+)", module).groups(default="")
    return block + ORIGINAL[name]


def layer_targets(layers: Iterable[str], kernels: Kernels) -> tuple[str, ...]:
    """The shortest target names, as PEFT's `target_modules`, that adapt exactly these layers of the model."""
    layers, targets = set(layers), {}
    for module, (layer, _) in modules(kernels).items():
        if layer not in layers:
            continue
        parts = re.sub(r"^blocks\.\d+\.", "", module).split(".")
        endings = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)] + [layer.replace("/", ".")]
        usual = [e for e in endings if e in ENDINGS] + [e for e in endings if not e[0].isdigit()]
        targets[next(e for e in usual if adapted_layers(kernels, (e,)) <= layers)] = None
    return tuple(sorted(targets, key=lambda t: (ENDINGS.index(t) if t in ENDINGS else len(ENDINGS), t)))


# ---- ours to theirs -------------------------------------------------------------------------------------------------

def to_tensors(adapters: Flat, config: LoRAConfig, kernels: Kernels, layout: str = "diffusers",
               dtype: str = "float32") -> Flat:
    """One transformer's adapters as the tensors of a file: {key: A^T (r, in) or (alpha / r) B^T (out, r)}.

    layout: 'diffusers' or 'comfyui'. Raises `UserError` when the adapters are not those of `config` on this model, and
    when a value is NaN or too large for `dtype`.
    """
    layers = sorted({path.rsplit("/", 1)[0] for path in adapters})
    if "patch_embedding" in layers:
        raise UserError("the adapter of patch_embedding cannot be written to a LoRA file, it is a convolution in other "
                        "programs: write the whole model with python -m convert.to_diffusers")
    wanted = adapted_layers(kernels, config.targets)
    if not layers or set(layers) != wanted or len(adapters) != 2 * len(layers):
        odd = sorted(set(layers) ^ wanted) or layers or ["no adapter at all"]
        raise UserError(f"the checkpoint's adapters are not those of {describe(config)} on this model ({odd[0]}): it "
                        "was trained from another one")
    tensors = {}
    for module, (layer, index) in modules({layer: kernels[layer] for layer in layers}).items():
        for factor in ("lora_a", "lora_b"):
            value = adapters.get(f"{layer}/{factor}")
            *stack, n_in, n_out = kernels[layer]
            shape = (*stack, n_in, config.rank) if factor == "lora_a" else (*stack, config.rank, n_out)
            if value is None or value.shape != shape:
                found = "missing" if value is None else f"of shape {value.shape}"
                raise UserError(f"the checkpoint's {layer}/{factor} is {found}, this model and rank {config.rank} ask "
                                f"for {shape}: it was trained from another model")
            value = np.asarray(value if index is None else value[index], np.float64).T
            with np.errstate(over="ignore"):
                value = (value if factor == "lora_a" else config.scale * value).astype(np.float32).astype(DTYPES[dtype])
            if not np.isfinite(value.astype(np.float32)).all():
                raise UserError(f"{module}.{factor} holds NaN, infinity or values beyond {dtype}: nothing was written")
            name = module if layout == "diffusers" else original_name(module)
            tensors[f"{PREFIXES[layout]}{name}.{SUFFIXES[layout][factor]}"] = np.ascontiguousarray(value)
    return tensors


def write(path: pathlib.Path, tensors: Flat, config: LoRAConfig, kernels: Kernels,
          metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file and reads it again. Raises `UserError` unless it says what it should, to the last tensor."""
    save_file(tensors, path, metadata={"format": "pt"} | dict(metadata or {}))
    found = read(path, kernels)
    layers = adapted_layers(kernels, config.targets)
    count = 2 * sum(layer in layers for layer, _ in modules(kernels).values())
    again = {k: np.float32(v) for k, v in tensors.items()}
    values = to_tensors(found.adapters, found.config, kernels, layout_of(tensors, str(path)))
    if (found.rank, adapted_layers(kernels, found.targets)) != (config.rank, layers) or len(tensors) != count \
            or values.keys() != again.keys() or any(not np.array_equal(values[k], again[k]) for k in again):
        raise UserError(f"{path} does not hold what was written: the disk is at fault; write it again elsewhere")


# ---- theirs to ours -------------------------------------------------------------------------------------------------

def read(path, kernels: Kernels) -> LoRAFile:
    """One transformer's adapters from a file in either layout, any float type, with or without alpha.

    Raises `UserError` on a file that is missing or damaged, would load nothing, belongs to another model, holds
    anything beside the factors of dense layers, or has several ranks or scales.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        problem = "is no .safetensors file" if path.exists() else "does not exist"
        raise UserError(f"LoRA file {path} {problem}: give a .safetensors file as Diffusers or ComfyUI read it")
    shards = Shards(path.parent, path.stem)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
    return from_tensors({key: shards.read(key) for key in shards.shapes}, metadata, kernels, str(path))


def layout_of(keys: Iterable[str], where: str) -> str:
    """'diffusers' or 'comfyui'. Raises `UserError` unless every key has that layout's prefix."""
    keys = list(keys)
    found = [layout for layout, prefix in PREFIXES.items() if any(k.startswith(prefix) for k in keys)]
    odd = [k for k in keys if not k.startswith(tuple(PREFIXES.values()))]
    if not found:
        reason = f"its keys begin like {odd[0]!r}" if odd else "it is empty"
        raise UserError(f"{where} would load nothing: {reason}, and not with 'transformer.' (Diffusers; for either "
                        "expert) or 'diffusion_model.' (ComfyUI)")
    if odd or len(found) > 1:
        raise UserError(f"{where} mixes layouts: beside {PREFIXES[found[0]]!r} it has "
                        f"{(odd or [k for k in keys if k.startswith(PREFIXES[found[1]])])[0]!r}")
    return found[0]


def from_tensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], kernels: Kernels,
                 where: str) -> LoRAFile:
    """The pure part of `read`. tensors: {key: array}; metadata: the safetensors header's; where: for messages."""
    layout, table = layout_of(tensors, where), modules(kernels)
    names = {module if layout == "diffusers" else original_name(module): module for module in table}
    alphas, factors = {}, {}  # module: number; (module, factor): [in, r] or [r, out]
    for key, value in tensors.items():
        name = key.removeprefix(PREFIXES[layout])
        match = FACTOR.fullmatch(name)
        module = names.get(match["module"] if match else name.removesuffix(".alpha"))
        if module is None and (match or name.endswith(".alpha")):
            raise UserError(f"{where} does not fit this model, which has no layer for {key!r}")
        if name.endswith(".alpha") and layout == "comfyui" and value.size == 1:
            alphas[module] = float(value.reshape(()))
        elif not match or value.ndim != 2:
            raise UserError(f"{where}: {key!r} is no LoRA factor of a dense layer (lora_A, lora_B, lora_down, lora_up)"
                            + (" or its alpha" if layout == "comfyui" else "") + "; such files are not read")
        else:
            factor = (module, "lora_a" if match["a"] else "lora_b")
            if factor in factors:
                raise UserError(f"{where} has {key!r} twice, under two names")
            factors[factor] = np.asarray(value, np.float32).T
    adapted = {module for module, _ in factors} | alphas.keys()
    layers = {table[module][0] for module in adapted}
    if missing := [m for m, (layer, _) in table.items() if layer in layers
                   and not {(m, "lora_a"), (m, "lora_b")} <= factors.keys()]:
        raise UserError(f"{where} is not whole: {missing[0]} lacks a factor" + (
            f", as do {len(missing) - 1} other layers" if len(missing) > 1 else "")
            + "; a layer has both, in every block of the model")
    ranks = {value.shape[-1 if factor == "lora_a" else 0] for (_, factor), value in factors.items()}
    if len(ranks) > 1:
        raise UserError(f"{where} has layers of ranks {', '.join(map(str, sorted(ranks)))}: only one rank is supported")
    (rank,) = ranks
    adapters: Flat = {}
    for (module, factor), value in sorted(factors.items()):
        layer, index = table[module]
        *stack, n_in, n_out = kernels[layer]
        shape = (n_in, rank) if factor == "lora_a" else (rank, n_out)
        if value.shape != shape:
            raise UserError(f"{where} does not fit this model: {factor} of {module} is {value.shape[::-1]}, and should "
                            f"be {shape[::-1]}: it was trained for another one")
        if index is None:
            adapters[f"{layer}/{factor}"] = np.ascontiguousarray(value)
        else:
            adapters.setdefault(f"{layer}/{factor}", np.empty((*stack, *shape), np.float32))[index] = value
    alpha = file_alpha(alphas, adapted, metadata, layout, rank, where)
    return LoRAFile(adapters, rank, alpha, layer_targets(layers, kernels))


def file_alpha(alphas: Mapping[str, float], adapted: Iterable[str], metadata: Mapping[str, str], layout: str,
               rank: int, where: str) -> float | None:
    """The alpha of all layers, from `.alpha` tensors or PEFT's metadata; None: the file states none.

    Raises `UserError` when layers differ in it, and on PEFT settings that change the effect in another way.
    """
    values = {alphas.get(module, float(rank)) for module in adapted} if alphas else set()
    if len(values) > 1:
        raise UserError(f"{where} has layers of alpha {', '.join(f'{v:g}' for v in sorted(values))} (a layer without "
                        f"one has its rank, {rank}): only one alpha is supported")
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return values.pop() if values else None
    if layout != "diffusers":
        raise UserError(f"{where} has ComfyUI's keys and PEFT's metadata, which ComfyUI does not read: its scale is "
                        "not certain")
    try:
        peft = {k.removeprefix("transformer."): v for k, v in json.loads(text).items() if k.startswith("transformer.")}
        stated, alpha = int(peft["r"]), float(peft["lora_alpha"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: its metadata 'lora_adapter_metadata' is damaged: it has no transformer.r and "
                        "transformer.lora_alpha") from None
    if odd := [k for k in ("use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern") if peft.get(k)]:
        raise UserError(f"{where}: PEFT's {odd[0]}={peft[odd[0]]} is not supported")
    if stated != rank:
        raise UserError(f"{where}: the metadata states rank {stated}, the tensors have {rank}: the file is damaged")
    return alpha


def fit(file: LoRAFile, recipe: LoRAConfig, kernels: Kernels, where: str) -> Flat:
    """The file's adapters under a recipe's settings, with the same effect: recipe.scale * A B is what the file means.

    A file that states no alpha has it in B; B is then divided by the recipe's scale. Raises `UserError` when rank,
    stated alpha or layers differ from the recipe's.
    """
    layers = {path.rsplit("/", 1)[0] for path in file.adapters}
    if file.rank != recipe.rank or layers != adapted_layers(kernels, recipe.targets) or not recipe.alpha \
            or not math.isclose(recipe.alpha if file.alpha is None else file.alpha, recipe.alpha, rel_tol=1e-6):
        found = describe(file.config) if file.alpha is not None else describe(file.config, "not stated")
        raise UserError(f"{where} and the recipe do not agree: the file has {found}, the recipe has "
                        f"{describe(recipe)}; set config.lora.rank, config.lora.alpha and config.lora.targets as in "
                        "the file")
    if file.alpha is not None:
        return dict(file.adapters)
    return {path: value / np.float32(recipe.scale) if path.endswith("lora_b") else value
            for path, value in file.adapters.items()}


def describe(config: LoRAConfig, alpha: str | None = None) -> str:
    return f"rank {config.rank}, alpha {alpha or f'{config.alpha:g}'}, targets {', '.join(config.targets)}"


def initial_adapters(paths: str, model: model_dir.ModelDir, recipe: LoRAConfig) -> dict[str, Flat]:
    """What training starts from instead of fresh adapters: {expert: {path: fp32 array}}.

    paths: one file, or for a model with two experts both, joined by a comma, the one for high noise first. Raises
    `UserError` as `read` and `fit` do.
    """
    files = paths.split(",")
    if len(files) != len(model.experts):
        raise UserError(f"config.lora.init={paths} names {len(files)} files, the model has {len(model.experts)} "
                        "transformers: give one file for each, joined by a comma, the one for high noise first")
    experts = {}
    for expert, path in zip(model.experts, files):
        kernels = dense_layers(model.config(expert))
        experts[expert] = fit(read(path, kernels), recipe, kernels, path)
    return experts
