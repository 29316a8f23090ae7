"""Scales of the layers of a LoRA file, and the settings of PEFT that state them."""

import json
import math
import pathlib
import re
from collections.abc import Mapping

from wan_jax.errors import UserError
from wan_jax.models import config as config_lib

# PEFT initialisations that change the base weights too
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")


def scales(
    ranks: Mapping[str, int], alphas: Mapping[str, float], settings: Mapping | None, where: str
) -> dict[str, float]:
    """Return each layer's scale, from its alpha tensor or PEFT's settings, or 1 without them. Raises
    `UserError` where they are not supported, a scale is not finite, or all are 0.
    """
    found = _stated_scales(ranks, alphas, settings, where)
    if odd := [module for module, scale in found.items() if not math.isfinite(scale)]:
        raise UserError(
            f"{where}: the scale of {odd[0]} is {found[odd[0]]:g}, by its alpha tensor or PEFT's "
            "lora_alpha: the file is damaged"
        )
    if found and not any(found.values()):
        raise UserError(
            f"{where}: the scale of all layers is 0, by their alpha tensors or PEFT's lora_alpha, so "
            "the file has no effect: correct it, or leave the file out"
        )
    return found


def _stated_scales(
    ranks: Mapping[str, int], alphas: Mapping[str, float], settings: Mapping | None, where: str
) -> dict[str, float]:
    own = {module: alphas.get(module, rank) / rank for module, rank in ranks.items()}
    if settings is None:
        return own
    stated = {module: _peft_scale(settings, module, rank, where) for module, rank in ranks.items()}
    for module in alphas:
        if not math.isclose(own[module], stated[module], rel_tol=1e-6):
            raise UserError(
                f"{where} states two scales of {module}: {own[module]:g} by its alpha tensor "
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
        for name in ("use_dora", "modules_to_save", "layer_replication")
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


def read_peft_config(path: pathlib.Path) -> dict:
    file = path.with_name("adapter_config.json")
    if not file.is_file():
        raise UserError(
            f"{path} was written by PEFT, and {file.name}, which states its scale, is missing: put "
            "it into the same folder"
        )
    return config_lib.read_json(file)


def split_metadata(text: str, path: pathlib.Path) -> dict[str, dict]:
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
