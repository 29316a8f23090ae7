"""Reads LoRA files of any program that uses Wan's original layer names or those of Diffusers.

A key consists of a prefix, a layer and a factor. Prefixes: none, `transformer.` and
`transformer_2.` (Diffusers), `diffusion_model.` (ComfyUI), `lora_unet_` (kohya, musubi-tuner: dots
become underscores), and `base_model.model.` before any of them (PEFT). Factors: lora_A and lora_B,
or lora_down and lora_up, optionally followed by an adapter's name. The scale of a layer is
alpha / rank (with use_rslora alpha / sqrt(rank)). Alpha comes from `.alpha` tensors, the
safetensors metadata of Diffusers or PEFT's adapter_config.json; without any of them the scale is 1.

Files of distilled models also have differences, which are added to weights (`.diff`: layers, norms,
modulation; `.diff_m`: the modulation of a block) and to biases (`.diff_b`, or PEFT's `lora_B.bias`,
which the layer's scale multiplies). They can be merged into a model, but are no adapters that a run
could train.

A file with a key that is not understood is refused.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import ml_dtypes
import numpy as np
from safetensors import safe_open

from wan_jax.errors import UserError
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage import lora_scales
from wan_jax.storage.lora_names import (
    PATCH,
    Kernels,
    Parameters,
    layer_targets,
    modules,
    original_name,
)
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
BIAS = re.compile(r"(?P<module>.+?)\.(?:lora_B|lora_up)(?:\.[\w-]+)?\.bias")
DIFFERENCES = (".diff", ".diff_b", ".diff_m")  # of a weight, a bias, a modulation
NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # preferred in a folder


@dataclasses.dataclass(frozen=True)
class LoRAFile:
    """The adapters of one transformer in one file: a layer's effect is scale * A B."""

    where: str  # the file's name, for messages
    # {Diffusers' module: (A [in, r], B [r, out])}, fp32, as stored
    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    scales: dict[str, float]
    targets: tuple[str, ...]
    # {(our path, layer or None): what is added to the parameter}, fp32, in our layout
    differences: dict[tuple[str, int | None], np.ndarray] = dataclasses.field(default_factory=dict)

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
        hub = "" if path.exists() else "; of the hub: hf download OWNER/NAME FILE, then its path"
        raise UserError(
            f"LoRA file {path} {problem}: give a .safetensors file, or a folder that holds one{hub}"
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


def read_experts(
    path, kernels: Kernels, parameters: Parameters | None = None
) -> dict[str, LoRAFile]:
    """Return a file's adapters by transformer, 'transformer' or 'transformer_2' or both.

    parameters: of the transformer, for a file that is merged into it; None refuses differences.
    Raises `UserError` when the file is missing, damaged or empty, belongs to another model, or
    holds anything but factors of dense layers, their alphas and differences.
    """
    path = find(path)
    shards = Shards(path.parent, path.stem, TYPES)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
    tensors = {key: shards.read(key) for key in shards.shapes}
    settings = {}
    if any(key.startswith(PEFT_PREFIX) for key in tensors):
        settings = {"": lora_scales.read_peft_config(path)}
    elif "lora_adapter_metadata" in metadata:
        settings = lora_scales.split_metadata(metadata["lora_adapter_metadata"], path)
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        expert = _split_key(key)[0]
        grouped.setdefault(expert, {})[key] = value
    if not grouped:
        raise UserError(f"{path} is empty: it holds no tensor")
    return {
        expert: from_tensors(
            grouped[expert],
            settings.get(expert, settings.get("")),
            kernels if parameters is None else parameters,
            str(path),
        )
        for expert in sorted(grouped)
    }


def read_for(
    files: Sequence[str], experts: Sequence[str], what: str, read_one: Callable
) -> dict[str, LoRAFile]:
    """Return the adapters of a model's experts from one file for all of them or a file for each.

    files: paths, the one for high noise first; of several an empty one leaves its expert out.
    experts: names. what: the setting with its value, for messages. read_one: path -> `read_experts`
    of it. Raises `UserError` as `read_experts` does, and when files and experts do not agree.
    """
    if len(files) == 1:
        found = read_one(files[0])
        problem = f"is for {' and '.join(found)}"
    else:
        found, problem = {}, f"names {len(files)} files"
    if len(files) == len(experts) > 1:
        for expert, path in zip(experts, files):
            if path:
                of_file = read_one(path)
                if list(of_file) != ["transformer"]:
                    raise UserError(
                        f"{path} holds adapters for {' and '.join(of_file)}; expected a file for a "
                        "single transformer"
                    )
                found[expert] = of_file["transformer"]
    elif set(found) != set(experts):
        raise UserError(
            f"{what} {problem}, the model has {' and '.join(experts)}: give one file with adapters "
            "for all, or one for each, joined by a comma, the one for high noise first"
            + (", on the command line in quotes, '\"HIGH,LOW\"'" if "loras=" in what else "")
        )
    return found


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    settings: Mapping | None,
    layers: Kernels | Parameters,
    where: str,
) -> LoRAFile:
    """Return the adapters of one transformer from the tensors of its file.

    settings: PEFT's, or None if the file has none. layers: of the transformer; `Parameters` for a
    file that is merged into it. where: the file's name, for messages. Raises `UserError` as
    `read_experts` does.
    """
    # Sort the tensors into alphas, factors and differences
    merging = isinstance(layers, Parameters)
    kernels = layers.kernels if isinstance(layers, Parameters) else layers
    table = modules(kernels)
    names = _all_names(table)
    alphas: dict[str, float] = {}  # by module
    factors: dict[str, dict[str, np.ndarray]] = {}  # by module, then 'A' or 'B' as in `LoRAFile`
    differences: dict[str, np.ndarray] = {}  # by key
    biases: dict[str, np.ndarray] = {}  # of lora_B, by key
    unknown: list[str] = []
    for key, value in tensors.items():
        name = _split_key(key)[1]
        if name.endswith(DIFFERENCES):
            if np.any(value):
                differences[key] = value
            continue
        if merging and BIAS.fullmatch(name):
            biases[key] = value
            continue
        match = FACTOR.fullmatch(name)
        if not match and not (name.endswith(".alpha") and value.size == 1):
            raise UserError(
                f"{where}: {key!r} is not a LoRA factor of a dense layer (lora_A, lora_B, "
                "lora_down, lora_up) or its alpha; such files are not supported"
            )
        module = names.get(match["module"] if match else name.removesuffix(".alpha"))
        if module is None:
            unknown.append(key)
            continue
        if not match:
            alphas[module] = float(value.reshape(()))
            continue
        factor = "A" if match["a"] else "B"
        pair = factors.setdefault(module, {})
        if factor in pair:
            raise UserError(f"{where} has {key!r} twice, under two names")
        if module == PATCH and value.ndim == 5:
            # a convolution's [r, C, p_t, p_h, p_w] or [D, r, 1, 1, 1], ours [(p_t p_h p_w C), r]
            value = value.transpose(0, 2, 3, 4, 1).reshape(len(value), -1)
        if value.ndim != 2:
            raise UserError(
                f"{where}: {key!r} is not a LoRA factor of a dense layer: its shape is "
                f"{list(value.shape)}"
            )
        pair[factor] = np.ascontiguousarray(np.asarray(value, np.float32).T)
    # Check that every adapter is complete and fits the model
    if differences and not merging:
        raise UserError(
            f"{where}: {len(differences)} tensors change whole weights and biases, the first "
            f"{min(differences)!r}: they are not adapters, and a run cannot start from them; "
            "config.model.loras merges such a file into the model that is trained"
        )
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(
            f"{where} does not fit this model, which has no layer for "
            f"{', '.join(map(repr, unknown[:5]))}{more}"
        )
    if not factors and not differences:
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
    scales = lora_scales.scales(
        {module: a.shape[1] for module, (a, _) in pairs.items()}, alphas, settings, where
    )
    found: dict[tuple[str, int | None], np.ndarray] = {}
    if isinstance(layers, Parameters):
        found = _differences(differences, layers, where)
        for key, value in biases.items():
            match = BIAS.fullmatch(_split_key(key)[1])
            module = names.get(match["module"]) if match else None
            entry = layers.differences.get((module or "", "diff_b"))
            if entry is None or module not in scales or value.shape != entry.shape:
                raise UserError(f"{where} does not fit this model, which has no layer for {key!r}")
            at = entry.path, entry.layer
            found[at] = found.get(at, 0) + np.float32(scales[module]) * value.astype(np.float32)
    return LoRAFile(
        where, pairs, scales, layer_targets({table[module][0] for module in pairs}, kernels), found
    )


def _all_names(names: Iterable[str]) -> dict[str, str]:
    """Return Diffusers' name of a layer by each of its names: Diffusers', the original, kohya's."""
    known = {name: module for module in names for name in (module, original_name(module))}
    return known | {KOHYA_PREFIX + name.replace(".", "_"): module for name, module in known.items()}


def _differences(
    tensors: Mapping[str, np.ndarray], layers: Parameters, where: str
) -> dict[tuple[str, int | None], np.ndarray]:
    """Return `LoRAFile.differences` of the tensors whose keys end in `DIFFERENCES`.

    Raises `UserError` when a tensor has no parameter, or another shape.
    """
    known = dict(layers.differences)
    known |= {
        (KOHYA_PREFIX + name.replace(".", "_"), kind): entry
        for (name, kind), entry in known.items()
    }
    found = {}
    for key, value in tensors.items():
        name, _, kind = _split_key(key)[1].rpartition(".")
        entry = known.get((name, kind))
        if entry is None or value.shape != entry.shape:
            expected = "which has no such parameter" if entry is None else f"expected {entry.shape}"
            raise UserError(f"{where} does not fit this model: {key!r} {value.shape}, {expected}")
        if (entry.path, entry.layer) in found:
            raise UserError(f"{where} has {key!r} twice, under two names")
        found[entry.path, entry.layer] = entry.to_ours(value.astype(np.float32))
    return found


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


def digest(path) -> str:
    """Return the SHA-256 of a LoRA file, with PEFT's settings beside it. Raises `UserError`."""
    path = find(path)
    with open(path, "rb") as file:
        sha = hashlib.file_digest(file, "sha256")
    settings = path.with_name("adapter_config.json")
    if path.name == NAMES[0] and settings.is_file():
        sha.update(settings.read_bytes())
    return sha.hexdigest()


def _split_key(key: str) -> tuple[str, str]:
    """Return (transformer, rest of the key without its prefix)."""
    match = PREFIX.match(key)
    assert match is not None, "the pattern matches the empty string"
    return match["expert"] or "transformer", key[match.end() :]
