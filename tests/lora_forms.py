"""LoRA files of random numbers in each form that programs write."""

import json

import numpy as np
from safetensors.numpy import save_file

from wan_jax.storage import lora_names

FFN = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
ALPHA = 6.0


def factors(kernels, keep=lambda module: True, rank=lambda module: 4, seed=0):
    """{module of a block: (A [in, r], B [r, out])}."""
    rng = np.random.default_rng(seed)
    return {
        module: tuple(
            0.3 * rng.standard_normal(shape).astype(np.float32)
            for shape in ((kernels[layer][-2], rank(module)), (rank(module), kernels[layer][-1]))
        )
        for module, (layer, _) in lora_names.modules(kernels).items()
        if module.startswith("blocks.") and keep(module)
    }


def tensors_of(pairs, prefix="transformer.", name=str, kinds=("lora_A", "lora_B"), alpha=None):
    out = {}
    for module, pair in pairs.items():
        for kind, value in zip(kinds, pair):
            out[f"{prefix}{name(module)}.{kind}.weight"] = np.ascontiguousarray(value.T)
        if alpha is not None:
            out[f"{prefix}{name(module)}.alpha"] = np.asarray(alpha(module))
    return out


def underscored(module):
    return lora_names.original_name(module).replace(".", "_")


DOWN_UP = ("lora_down", "lora_up")
COMFY = {"prefix": "diffusion_model.", "name": lora_names.original_name}
SETTINGS = {"r": 4, "lora_alpha": ALPHA, "target_modules": list(FFN)}
PATTERNS = {
    "r": 4,
    "lora_alpha": ALPHA,
    "target_modules": list(FFN),
    "peft_type": "LORA",
    "bias": "none",
    "rank_pattern": {"attn1.to_q": 2, "blocks.1.ffn.net.2": 8},
    "alpha_pattern": {"to_v": 3.0},
}


def pattern_rank(module):
    return 2 if module.endswith("attn1.to_q") else 8 if module == "blocks.1.ffn.net.2" else 4


def mixed_rank(module):
    return 2 if "attn2" in module else 4


def first_block(module):
    return module.startswith("blocks.0.")


def zero_differences(kernels):
    tables = {
        "norm3.diff": 48,
        "norm3.diff_b": 48,
        "self_attn.q.diff_b": 48,
        "self_attn.norm_q.diff": 48,
    }
    return {
        f"diffusion_model.blocks.0.{name}": np.zeros(n, np.float32) for name, n in tables.items()
    }


# name: (factors' arguments, tensors' arguments, metadata or PEFT settings, scale of a module, what
# reads it besides us)
FORMS = {
    "Diffusers": ({}, {}, None, lambda m: 1.0, "pipeline"),
    "Diffusers with alpha": (
        {},
        {},
        {f"transformer.{k}": v for k, v in SETTINGS.items()},
        lambda m: ALPHA / 4,
        "pipeline",
    ),
    "Diffusers with rslora": (
        {},
        {},
        {f"transformer.{k}": v for k, v in (SETTINGS | {"use_rslora": True}).items()},
        lambda m: ALPHA / 2,
        "pipeline",
    ),
    "bare": ({}, {"prefix": ""}, SETTINGS, lambda m: ALPHA / 4, "transformer"),
    "ComfyUI": (
        {},
        COMFY | {"kinds": DOWN_UP, "alpha": lambda m: np.float32(ALPHA)},
        None,
        lambda m: ALPHA / 4,
        "pipeline",
    ),
    "ComfyUI, A and B": ({}, COMFY, None, lambda m: 1.0, "pipeline"),
    "integer alpha": (
        {},
        COMFY | {"kinds": DOWN_UP, "alpha": lambda m: np.int64(6)},
        None,
        lambda m: 1.5,
        "pipeline",
    ),
    "kohya": (
        {},
        {
            "prefix": "lora_unet_",
            "name": underscored,
            "kinds": DOWN_UP,
            "alpha": lambda m: np.float32(ALPHA),
        },
        None,
        lambda m: ALPHA / 4,
        "pipeline",
    ),
    "half of the blocks": ({"keep": first_block}, COMFY, None, lambda m: 1.0, "pipeline"),
    "zero differences": ({}, COMFY, None, lambda m: 1.0, "pipeline"),
    "ranks and alphas": (
        {"rank": mixed_rank},
        COMFY | {"alpha": lambda m: np.float32(3 if "ffn" in m else 6)},
        None,
        lambda m: (3 if "ffn" in m else 6) / mixed_rank(m),
        "pipeline",
    ),
    "DiffSynth": (
        {},
        {"prefix": "", "kinds": ("lora_A.default", "lora_B.default")},
        None,
        lambda m: 1.0,
        None,
    ),
    "alpha beside Diffusers' names": (
        {},
        {"alpha": lambda m: np.float32(ALPHA)},
        None,
        lambda m: ALPHA / 4,
        None,
    ),
    "PEFT": (
        {"rank": pattern_rank},
        {"prefix": "base_model.model."},
        PATTERNS,
        lambda m: (3.0 if m.endswith("to_v") else ALPHA) / pattern_rank(m),
        "peft",
    ),
    "PEFT with rslora": (
        {},
        {"prefix": "base_model.model."},
        SETTINGS | {"peft_type": "LORA", "use_rslora": True},
        lambda m: ALPHA / 2,
        "peft",
    ),
}


def write_form(folder, kernels, form):
    """(path to read, {module: scale * A B})."""
    which, how, settings, scale, _ = FORMS[form]
    pairs, metadata, path = (
        factors(kernels, **which),
        {"format": "pt"},
        folder / "pytorch_lora_weights.safetensors",
    )
    tensors = tensors_of(pairs, **how) | (
        zero_differences(kernels) if form == "zero differences" else {}
    )
    if form.startswith("PEFT"):
        path = folder / "adapter_model.safetensors"
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    elif settings is not None:
        metadata["lora_adapter_metadata"] = json.dumps(settings)
    save_file(tensors, path, metadata=metadata)
    return (folder if form.startswith("PEFT") else path), {
        m: scale(m) * (a @ b) for m, (a, b) in pairs.items()
    }


def distilled(kernels, rank=4, seed=0, norms=True):
    """Return (tensors, {our path: {layer: what is added to it}}) of a file like those of distilled
    models: factors without alphas, biases, a whole weight of the head, and optionally what Diffusers
    leaves out, norms, modulation and the patch embedding.
    """
    rng = np.random.default_rng(seed)
    pairs = factors(kernels, rank=lambda module: rank, seed=seed)
    tensors = tensors_of(pairs, **COMFY, kinds=DOWN_UP)
    added: dict = {}
    table = lora_names.modules(kernels)
    for module, (a, b) in pairs.items():
        layer, index = table[module]
        added.setdefault(f"{layer}/kernel", {})[index] = a @ b

    def add(name, path, index, shape, ours=lambda value: value):
        value = 0.3 * rng.standard_normal(shape).astype(np.float32)
        tensors[f"diffusion_model.{name}"] = value
        added.setdefault(path, {})[index] = ours(value)

    d, out = kernels["blocks/attn1/to_q"][-1], kernels["proj_out"][-1]
    for module in pairs:
        layer, index = table[module]
        size = (kernels[layer][-1],)
        add(f"{lora_names.original_name(module)}.diff_b", f"{layer}/bias", index, size)
    add("head.head.diff", "proj_out/kernel", None, (out, d), np.transpose)
    add("head.head.diff_b", "proj_out/bias", None, (out,))
    if norms:
        add("blocks.0.norm3.diff", "blocks/norm2/scale", 0, (d,))
        add("blocks.1.norm3.diff_b", "blocks/norm2/bias", 1, (d,))
        add("blocks.1.self_attn.norm_q.diff", "blocks/attn1/norm_q/scale", 1, (d,))
        add("blocks.0.cross_attn.norm_k.diff", "blocks/attn2/norm_k/scale", 0, (d,))
        add("blocks.1.modulation.diff", "blocks/scale_shift_table", 1, (1, 6, d))
        add("head.modulation.diff", "scale_shift_table", None, (1, 2, d))
        add("patch_embedding.diff_b", "patch_embedding/bias", None, (d,))
        a = 0.3 * rng.standard_normal((rank, 16, 1, 2, 2)).astype(np.float32)
        b = 0.3 * rng.standard_normal((d, rank, 1, 1, 1)).astype(np.float32)
        tensors["diffusion_model.patch_embedding.lora_down.weight"] = a
        tensors["diffusion_model.patch_embedding.lora_up.weight"] = b
        product = np.einsum("drxyz,rcthw->thwcd", b, a)
        added["patch_embedding/kernel"] = {None: product.reshape(-1, d)}
        add("blocks.0.diff_m", "blocks/scale_shift_table", 0, (1, 6, d))
    return tensors, added
