"""Reading LoRA files of any program whose layer names are Wan's original ones or Diffusers'.

A key is a prefix, a layer and what the tensor is. Prefixes: none, `transformer.` and
`transformer_2.` (Diffusers), `diffusion_model.` (ComfyUI), `lora_unet_` (kohya, musubi-tuner: dots
are underscores), and `base_model.model.` before any of them (PEFT). Factors: lora_A and lora_B or
lora_down and lora_up, with an adapter's name between or without. The scale of a layer is alpha /
rank (with use_rslora alpha / sqrt(rank)), alpha from `.alpha` tensors, the safetensors metadata of
Diffusers or PEFT's adapter_config.json; a file that states none has scale 1.

Every key is accounted for: a file is read whole, or refused.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from safetensors import safe_open

from convert.folders import DTYPES, Shards
from convert.lora_names import Kernels, layer_targets, modules, original_name
from wan_jax.errors import UserError
from wan_jax.models import config as config_lib
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage.paths import expand

TYPES = DTYPES | {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    # integers: alphas
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
}
PEFT_PREFIX, KOHYA_PREFIX = "base_model.model.", "lora_unet_"
PREFIX = re.compile(
    r"(?:base_model\.model\.)?(?:(?:model\.)?diffusion_model\.|(?P<expert>transformer(?:_2)?)\.)?"
)
FACTOR = re.compile(
    r"(?P<module>.+?)\.(?:(?P<a>lora_A|lora_down)|lora_B|lora_up)(?:\.(?!weight$)[\w-]+)?\.weight"
)
DIFFERENCES = (".diff", ".diff_b")  # of a weight and of a bias
NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # in a folder
# PEFT initialisations that change the base weights too
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")


@dataclasses.dataclass(frozen=True)
class LoRAFile:
    """What one file says about one transformer: a layer's effect is scale * A B."""

    where: str
    # {Diffusers' module: (A [in, r], B [r, out])}, fp32, as stored
    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    scales: dict[str, float]
    targets: tuple[str, ...]

    @property
    def ranks(self) -> list[int]:
        return sorted({a.shape[1] for a, _ in self.factors.values()})

    @property
    def config(self) -> LoRAConfig:
        """Settings of a run that can hold the file's adapters: those of the file, where all layers
        have the same.
        """
        rank = self.ranks[-1]
        return LoRAConfig(rank, rank * max(self.scales.values()), self.targets)


def find(path) -> pathlib.Path:
    """Return the LoRA file at `path`: the file itself, or that of a folder. Raise `UserError` when
    there is none.
    """
    path = expand(path)
    if path.is_dir():
        there = sorted(
            p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt")
        )
        tensors = [name for name in there if name.endswith(".safetensors")]
        named = [name for name in NAMES if name in tensors] or tensors
        if len(named) == 1:
            return path / named[0]
        raise UserError(
            f"LoRA folder {path} holds {', '.join(there) or 'no file of weights'}: give one "
            ".safetensors file" + (", PyTorch files are not read" if there and not tensors else "")
        )
    if path.suffix != ".safetensors" or not path.is_file():
        problem = "is no .safetensors file" if path.exists() else "does not exist"
        raise UserError(
            f"LoRA file {path} {problem}: give a .safetensors file, or a folder that holds one"
        )
    return path


def read(path, kernels: Kernels) -> LoRAFile:
    """Return the adapters of a file for one transformer. Raise `UserError` as `read_experts` does,
    and when the file is for another number of transformers.
    """
    experts = read_experts(path, kernels)
    if len(experts) > 1 or "transformer" not in experts:
        raise UserError(
            f"{path} holds adapters for {' and '.join(experts)}; one for a single transformer is "
            "needed"
        )
    return experts["transformer"]


def read_experts(path, kernels: Kernels) -> dict[str, LoRAFile]:
    """Return a file's adapters by transformer: {'transformer': ..., 'transformer_2': ...} or one of
    them.

    Raises `UserError` on a file that is missing, damaged or empty, belongs to another model, or
    holds anything that is no factor of a dense layer or its alpha.
    """
    path = find(path)
    shards = Shards(path.parent, path.stem, TYPES)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
    tensors = {key: shards.read(key) for key in shards.shapes}
    settings = {}
    if any(key.startswith(PEFT_PREFIX) for key in tensors):
        settings = {"": _read_peft_config(path)}
    elif "lora_adapter_metadata" in metadata:
        settings = _split_metadata(metadata["lora_adapter_metadata"], path)
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        expert = PREFIX.match(key)["expert"] or "transformer"
        grouped.setdefault(expert, {})[key] = value
    if not grouped:
        raise UserError(f"{path} is empty: it holds no tensor")
    return {
        expert: from_tensors(
            grouped[expert], settings.get(expert, settings.get("")), kernels, str(path)
        )
        for expert in sorted(grouped)
    }


def from_tensors(
    tensors: Mapping[str, np.ndarray], settings: Mapping | None, kernels: Kernels, where: str
) -> LoRAFile:
    """The pure part of `read_experts`, for one transformer. settings: PEFT's, if the file has them;
    where: its name.
    """
    table = modules(kernels)
    names = {name: module for module in table for name in (module, original_name(module))}
    names |= {KOHYA_PREFIX + name.replace(".", "_"): module for name, module in names.items()}
    # {module: number}, {module: {'A' | 'B': as in `LoRAFile`}}, keys
    alphas, factors, differences = {}, {}, []
    for key, value in tensors.items():
        name = key[PREFIX.match(key).end() :]
        if name.endswith(DIFFERENCES):
            if np.any(value):
                differences.append(key)
            continue
        match = FACTOR.fullmatch(name)
        if not match and not (name.endswith(".alpha") and value.size == 1):
            raise UserError(
                f"{where}: {key!r} is no LoRA factor of a dense layer (lora_A, lora_B, lora_down, "
                "lora_up) or its alpha; such files are not read"
            )
        module = names.get(match["module"] if match else name.removesuffix(".alpha"))
        if module is None:
            raise UserError(f"{where} does not fit this model, which has no layer for {key!r}")
        if not match:
            alphas[module] = float(value.reshape(()))
            continue
        factor, pair = "A" if match["a"] else "B", factors.setdefault(module, {})
        if factor in pair:
            raise UserError(f"{where} has {key!r} twice, under two names")
        if value.ndim != 2:
            raise UserError(
                f"{where}: {key!r} is no LoRA factor of a dense layer: its shape is "
                f"{list(value.shape)}"
            )
        pair[factor] = np.ascontiguousarray(np.asarray(value, np.float32).T)
    if differences:
        raise UserError(
            f"{where}: {len(differences)} tensors change whole weights and biases, the first "
            f"{differences[0]!r}: they are no adapters, and a run cannot start from them"
        )
    if not factors:
        raise UserError(f"{where} holds no LoRA factor, only {next(iter(tensors))!r} and the like")
    for module in factors.keys() | alphas.keys():
        _check_pair(factors.get(module, {}), module, kernels[table[module][0]], where)
    pairs = {
        module: (factors[module]["A"], factors[module]["B"])
        for module in table
        if module in factors
    }
    scales = _scales(
        {module: a.shape[1] for module, (a, _) in pairs.items()}, alphas, settings, where
    )
    return LoRAFile(
        where, pairs, scales, layer_targets({table[module][0] for module in pairs}, kernels)
    )


def _check_pair(
    pair: Mapping[str, np.ndarray], module: str, shape: tuple[int, ...], where: str
) -> None:
    """Raise `UserError` unless a layer of the kernel's shape has both factors, of one rank and of
    its width.
    """
    if missing := [name for name in ("A", "B") if name not in pair]:
        raise UserError(f"{where} is not whole: {module} lacks its factor {' and '.join(missing)}")
    n_in, n_out = shape[-2:]
    a, b = pair["A"], pair["B"]
    if (a.shape[0], b.shape[1]) != (n_in, n_out) or a.shape[1] != b.shape[0] or not a.shape[1]:
        raise UserError(
            f"{where} does not fit this model: the factors of {module} are {list(a.T.shape)} and "
            f"{list(b.T.shape)}, and should be [r, {n_in}] and [{n_out}, r]: it was trained for "
            "another one"
        )


# ---- scales --------------------------------------------------------------------------------------


def _scales(
    ranks: Mapping[str, int], alphas: Mapping[str, float], settings: Mapping | None, where: str
) -> dict[str, float]:
    """Each layer's scale, from its alpha tensor or PEFT's settings; 1 where neither states one."""
    scales = {module: alphas.get(module, rank) / rank for module, rank in ranks.items()}
    if settings is None:
        return scales
    stated = {module: _peft_scale(settings, module, rank, where) for module, rank in ranks.items()}
    for module in alphas:
        if not math.isclose(scales[module], stated[module], rel_tol=1e-6):
            raise UserError(
                f"{where} states two scales of {module}: {scales[module]:g} by its alpha tensor "
                f"and {stated[module]:g} by PEFT's settings"
            )
    return stated


def _peft_scale(settings: Mapping, module: str, rank: int, where: str) -> float:
    """alpha / r of one layer as PEFT computes it."""

    # PEFT's own rule: the first pattern that ends the module's name
    def of_module(patterns, default):
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    try:
        stated = int(of_module(settings.get("rank_pattern"), settings["r"]))
        alpha = float(of_module(settings.get("alpha_pattern"), settings["lora_alpha"]))
        method, start = (
            str(settings.get("peft_type") or "LORA"),
            str(settings.get("init_lora_weights")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, re.error):
        raise UserError(
            f"{where}: PEFT's settings are damaged: r={settings.get('r')!r}, "
            f"lora_alpha={settings.get('lora_alpha')!r}"
        ) from None
    odd = [
        f"{k}={settings[k]!r}"
        for k in ("use_dora", "lora_bias", "modules_to_save", "layer_replication")
        if settings.get(k)
    ]
    odd += [f"peft_type={method}"] * (method != "LORA")
    odd += [f"init_lora_weights={start}"] * start.lower().startswith(CHANGED_BASE)
    if odd:
        raise UserError(f"{where}: PEFT's {odd[0]} is not supported")
    if stated != rank:
        raise UserError(
            f"{where}: PEFT's settings state rank {stated} of {module}, its tensors have {rank}: "
            "the file is damaged, or the settings are of another one"
        )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _read_peft_config(path: pathlib.Path) -> dict:
    file = path.with_name("adapter_config.json")
    if not file.is_file():
        raise UserError(
            f"{path} was written by PEFT, and its scale stands in {file.name}, which is missing: "
            "put it beside the file"
        )
    return config_lib.read_json(file)


def _split_metadata(text: str, path: pathlib.Path) -> dict[str, dict]:
    """Diffusers' metadata by transformer; under '' where its keys have no prefix."""
    try:
        values = dict(json.loads(text).items())
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: its metadata 'lora_adapter_metadata' is damaged") from None
    found: dict[str, dict] = {}
    for key, value in values.items():
        expert, dot, name = key.partition(".")
        known = dot and expert in ("transformer", "transformer_2")
        found.setdefault(expert if known else "", {})[name if known else key] = value
    return found
