"""Reads LoRA files of any program that uses Wan's original layer names or those of Diffusers.

A key consists of a prefix, a layer and a factor. Prefixes: none, `transformer.` and
`transformer_2.` (Diffusers), `diffusion_model.` (ComfyUI), `lora_unet_` (kohya, musubi-tuner: dots
become underscores), and `base_model.model.` before any of them (PEFT). Factors: lora_A and lora_B,
or lora_down and lora_up, optionally followed by an adapter's name. The scale of a layer is
alpha / rank (with use_rslora alpha / sqrt(rank)). Alpha comes from `.alpha` tensors, the
safetensors metadata of Diffusers or PEFT's adapter_config.json; without any of them the scale is 1.

A file with a key that is not understood is refused.
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

from wan_jax.errors import UserError
from wan_jax.models import config as config_lib
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage.lora_names import Kernels, layer_targets, modules, original_name
from wan_jax.storage.paths import expand
from wan_jax.storage.tensor_files import DTYPES, Shards

TYPES = DTYPES | {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    # integers occur as alphas
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
NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # preferred in a folder
# PEFT initialisations that change the base weights too
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")


@dataclasses.dataclass(frozen=True)
class LoRAFile:
    """The adapters of one transformer in one file: a layer's effect is scale * A B."""

    where: str  # the file's name, for messages
    # {Diffusers' module: (A [in, r], B [r, out])}, fp32, as stored
    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    scales: dict[str, float]
    targets: tuple[str, ...]

    @property
    def ranks(self) -> list[int]:
        return sorted({a.shape[1] for a, _ in self.factors.values()})

    @property
    def config(self) -> LoRAConfig:
        """Settings of a run that can hold the file's adapters.

        They equal the file's own if all its layers have the same rank and scale.
        """
        rank = self.ranks[-1]
        return LoRAConfig(rank, rank * max(self.scales.values()), self.targets)


def find(path) -> pathlib.Path:
    """Return the LoRA file at `path`, which is the file itself or a folder with one.

    Raises `UserError` when there is none, or several.
    """
    path = expand(path)
    if path.is_dir():
        weights = sorted(
            file.name for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pt")
        )
        readable = [name for name in weights if name.endswith(".safetensors")]
        candidates = [name for name in NAMES if name in readable] or readable
        if len(candidates) == 1:
            return path / candidates[0]
        hint = ", PyTorch files are not supported" if weights and not readable else ""
        raise UserError(
            f"LoRA folder {path} holds {', '.join(weights) or 'no file of weights'}: give one "
            f".safetensors file{hint}"
        )
    if path.suffix != ".safetensors" or not path.is_file():
        problem = "is not a .safetensors file" if path.exists() else "does not exist"
        raise UserError(
            f"LoRA file {path} {problem}: give a .safetensors file, or a folder that holds one"
        )
    return path


def read(path, kernels: Kernels) -> LoRAFile:
    """Return the adapters of a file for one transformer.

    Raises `UserError` as `read_experts` does, and when the file is for two transformers.
    """
    experts = read_experts(path, kernels)
    if len(experts) > 1 or "transformer" not in experts:
        raise UserError(
            f"{path} holds adapters for {' and '.join(experts)}; expected a file for a single "
            "transformer"
        )
    return experts["transformer"]


def read_experts(path, kernels: Kernels) -> dict[str, LoRAFile]:
    """Return a file's adapters by transformer, 'transformer' or 'transformer_2' or both.

    Raises `UserError` when the file is missing, damaged or empty, belongs to another model, or
    holds anything but factors of dense layers and their alphas.
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
        expert = _split_key(key)[0]
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
    """Return the adapters of one transformer from the tensors of its file.

    settings: PEFT's, or None if the file has none. where: the file's name, for messages. Raises
    `UserError` as `read_experts` does.
    """
    # Sort the tensors into alphas, factors and changes of whole weights
    table = modules(kernels)
    names = {name: module for module in table for name in (module, original_name(module))}
    names |= {KOHYA_PREFIX + name.replace(".", "_"): module for name, module in names.items()}
    alphas: dict[str, float] = {}  # by module
    factors: dict[str, dict[str, np.ndarray]] = {}  # by module, then 'A' or 'B' as in `LoRAFile`
    differences: list[str] = []  # keys
    for key, value in tensors.items():
        name = _split_key(key)[1]
        if name.endswith(DIFFERENCES):
            if np.any(value):
                differences.append(key)
            continue
        match = FACTOR.fullmatch(name)
        if not match and not (name.endswith(".alpha") and value.size == 1):
            raise UserError(
                f"{where}: {key!r} is not a LoRA factor of a dense layer (lora_A, lora_B, "
                "lora_down, lora_up) or its alpha; such files are not supported"
            )
        module = names.get(match["module"] if match else name.removesuffix(".alpha"))
        if module is None:
            raise UserError(f"{where} does not fit this model, which has no layer for {key!r}")
        if not match:
            alphas[module] = float(value.reshape(()))
            continue
        factor = "A" if match["a"] else "B"
        pair = factors.setdefault(module, {})
        if factor in pair:
            raise UserError(f"{where} has {key!r} twice, under two names")
        if value.ndim != 2:
            raise UserError(
                f"{where}: {key!r} is not a LoRA factor of a dense layer: its shape is "
                f"{list(value.shape)}"
            )
        pair[factor] = np.ascontiguousarray(np.asarray(value, np.float32).T)
    # Check that every adapter is complete and fits the model
    if differences:
        raise UserError(
            f"{where}: {len(differences)} tensors change whole weights and biases, the first "
            f"{differences[0]!r}: they are not adapters, and a run cannot start from them"
        )
    if not factors:
        raise UserError(
            f"{where} holds no LoRA factor, only tensors such as {next(iter(tensors))!r}"
        )
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
    """Raise `UserError` unless a layer has both factors, of one rank and of the kernel's shape."""
    if missing := [name for name in ("A", "B") if name not in pair]:
        raise UserError(f"{where} is incomplete: {module} lacks its factor {' and '.join(missing)}")
    n_in, n_out = shape[-2:]
    a, b = pair["A"], pair["B"]
    if (a.shape[0], b.shape[1]) != (n_in, n_out) or a.shape[1] != b.shape[0] or not a.shape[1]:
        raise UserError(
            f"{where} does not fit this model: the factors of {module} are {list(a.T.shape)} and "
            f"{list(b.T.shape)}, expected [r, {n_in}] and [{n_out}, r]: it was trained for another "
            "model"
        )


# ---- scales --------------------------------------------------------------------------------------


def _scales(
    ranks: Mapping[str, int], alphas: Mapping[str, float], settings: Mapping | None, where: str
) -> dict[str, float]:
    """Return each layer's scale, from its alpha tensor or PEFT's settings, or 1 without them."""
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
    """Return alpha / r of one layer as PEFT computes it.

    Raises `UserError` when the settings are damaged, not supported, or state another rank.
    """

    def of_module(patterns, default):
        """Return the value of the first pattern that ends the module's name, as PEFT does."""
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    try:
        stated = int(of_module(settings.get("rank_pattern"), settings["r"]))
        alpha = float(of_module(settings.get("alpha_pattern"), settings["lora_alpha"]))
        method = str(settings.get("peft_type") or "LORA")
        initial = str(settings.get("init_lora_weights"))
    except (ValueError, KeyError, TypeError, AttributeError, re.error):
        raise UserError(
            f"{where}: PEFT's settings are damaged: r={settings.get('r')!r}, "
            f"lora_alpha={settings.get('lora_alpha')!r}"
        ) from None
    unsupported = [
        f"{name}={settings[name]!r}"
        for name in ("use_dora", "lora_bias", "modules_to_save", "layer_replication")
        if settings.get(name)
    ]
    if method != "LORA":
        unsupported.append(f"peft_type={method}")
    if initial.lower().startswith(CHANGED_BASE):
        unsupported.append(f"init_lora_weights={initial}")
    if unsupported:
        raise UserError(f"{where}: PEFT's {unsupported[0]} is not supported")
    if stated != rank:
        raise UserError(
            f"{where}: PEFT's settings state rank {stated} of {module}, its tensors have {rank}: "
            "the file is damaged, or the settings belong to another file"
        )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _read_peft_config(path: pathlib.Path) -> dict:
    file = path.with_name("adapter_config.json")
    if not file.is_file():
        raise UserError(
            f"{path} was written by PEFT, and {file.name}, which states its scale, is missing: put "
            "it into the same folder"
        )
    return config_lib.read_json(file)


def _split_metadata(text: str, path: pathlib.Path) -> dict[str, dict]:
    """Return Diffusers' metadata by transformer; keys without a prefix are under ''."""
    try:
        values = dict(json.loads(text).items())
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: its metadata 'lora_adapter_metadata' is damaged") from None
    found: dict[str, dict] = {}
    for key, value in values.items():
        expert, _, name = key.partition(".")
        if name and expert in ("transformer", "transformer_2"):
            found.setdefault(expert, {})[name] = value
        else:
            found.setdefault("", {})[key] = value
    return found


def _split_key(key: str) -> tuple[str, str]:
    """Return (transformer, rest of the key without its prefix)."""
    match = PREFIX.match(key)
    assert match is not None, "the pattern matches the empty string"
    return match["expert"] or "transformer", key[match.end() :]
