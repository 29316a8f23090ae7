"""LoRA files as other programs write them: their effect is the one in Diffusers and PEFT, or they
are refused.
"""

import copy
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import lora
from tests import tiny
from wan_jax.command_line.cli import UserError
from wan_jax.models import config as config_lib
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage import lora_files

FFN = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
ALPHA = 6.0


@pytest.fixture(scope="module")
def kernels():
    return lora.dense_layers(
        config_lib.from_dict(config_lib.TransformerConfig, tiny.SETTINGS["transformer"])
    )


def factors(kernels, keep=lambda module: True, rank=lambda module: 4, seed=0):
    """{module of a block: (A [in, r], B [r, out])}."""
    rng = np.random.default_rng(seed)
    return {
        module: tuple(
            0.3 * rng.standard_normal(shape).astype(np.float32)
            for shape in ((kernels[layer][-2], rank(module)), (rank(module), kernels[layer][-1]))
        )
        for module, (layer, _) in lora.modules(kernels).items()
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
    return lora.original_name(module).replace(".", "_")


DOWN_UP = ("lora_down", "lora_up")
COMFY = {"prefix": "diffusion_model.", "name": lora.original_name}
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


def deltas(flat, config, kernels):
    """{module: its change of the kernel} of our adapters."""
    out = {}
    for module, (layer, index) in lora.modules(kernels).items():
        if f"{layer}/lora_a" in flat:
            at = ... if index is None else index
            out[module] = config.scale * (flat[f"{layer}/lora_a"][at] @ flat[f"{layer}/lora_b"][at])
    return out


def assert_same_effect(found, wanted):
    for module, value in found.items():
        error = np.linalg.norm(value - wanted.get(module, 0))
        assert error <= 1e-5 * np.linalg.norm(wanted.get(module, 0)), module
    assert wanted.keys() <= found.keys()


@pytest.mark.parametrize("form", FORMS)
def test_the_effect_is_kept_under_another_recipe(kernels, tmp_path, form):
    """Rank and alpha of the run are others, and it adapts more layers: the effect is the file's, to
    1e-5.
    """
    path, wanted = write_form(tmp_path, kernels, form)
    file, recipe = (
        lora.read(path, kernels),
        LoRAConfig(rank=9, alpha=12.0, targets=(*FFN, "proj_out")),
    )
    flat = lora.fit(file, recipe, kernels)
    assert_same_effect(deltas(flat, recipe, kernels), wanted)
    # every rank can learn
    assert all(np.any(v, axis=-2).all() for k, v in flat.items() if k.endswith("lora_a"))
    assert file.targets == FFN and set(file.factors) == set(wanted)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    import diffusers

    return diffusers.WanPipeline.from_pretrained(
        tiny.write_pipeline(tmp_path_factory.mktemp("source") / "wan")
    )


@pytest.mark.parity
@pytest.mark.parametrize("form", [form for form, (*_, reader) in FORMS.items() if reader])
def test_the_effect_is_that_of_diffusers_and_peft(pipe, kernels, tmp_path, form):
    import peft

    path, wanted = write_form(tmp_path, kernels, form)
    model, reader = pipe.transformer, FORMS[form][-1]
    if reader == "pipeline":
        pipe.load_lora_weights(str(path), adapter_name="default")
    elif reader == "transformer":
        model.load_lora_adapter(
            str(tmp_path), weight_name=path.name, prefix=None, adapter_name="default"
        )
    else:
        model = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(path)).base_model.model
    theirs = {
        name: module.get_delta_weight("default").detach().numpy().T
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    pipe.unload_lora_weights()
    assert_same_effect(theirs, wanted)


def test_a_run_with_the_files_own_settings_gets_its_numbers(kernels, tmp_path):
    path, _ = write_form(tmp_path, kernels, "Diffusers with rslora")
    file = lora.read(path, kernels)
    assert file.config == LoRAConfig(4, 12.0, FFN)
    flat = lora.fit(file, file.config, kernels)
    a, b = file.factors["blocks.1.attn2.to_out.0"]
    np.testing.assert_array_equal(flat["blocks/attn2/to_out_0/lora_a"][1], a)
    np.testing.assert_array_equal(flat["blocks/attn2/to_out_0/lora_b"][1], b)


def test_both_experts_in_one_file(kernels, tmp_path):
    high, low = factors(kernels), factors(kernels, seed=1)
    path = tmp_path / "x.safetensors"
    save_file(tensors_of(high) | tensors_of(low, "transformer_2."), path)
    found = lora_files.read_experts(path, kernels)
    assert list(found) == ["transformer", "transformer_2"]
    for file, pairs in zip(found.values(), (high, low)):
        np.testing.assert_array_equal(
            file.factors["blocks.0.ffn.net.2"][1], pairs["blocks.0.ffn.net.2"][1]
        )
    with pytest.raises(UserError, match="adapters for transformer and transformer_2"):
        lora.read(path, kernels)


def test_folders(tmp_path):
    for names, message in (
        ((), "holds no file of weights"),
        (("adapter_model.bin",), "adapter_model.bin.*PyTorch"),
        (("a.safetensors", "b.safetensors"), r"holds a\.safetensors, b\.safetensors: give one"),
    ):
        folder = tmp_path / str(len(names) + len(message))
        folder.mkdir()
        for name in names:
            (folder / name).write_text("")
        with pytest.raises(UserError, match=message):
            lora_files.find(folder)
    (folder / "adapter_model.safetensors").write_text("")
    assert lora_files.find(folder).name == "adapter_model.safetensors"


# ---- files that are refused ----------------------------------------------------------------------

FIRST = "transformer.blocks.0.attn1.to_q.lora_A.weight"


def renamed(change):
    return lambda tensors: {change(k): v for k, v in tensors.items()}


FAULTS = {
    "second transformer": (
        renamed(lambda k: k.replace("transformer.", "transformer_2.")),
        "for transformer_2;",
    ),
    "PEFT without its settings": (
        renamed(lambda k: "base_model.model." + k.removeprefix("transformer.")),
        r"adapter_config\.json, .* is missing",
    ),
    "empty": (lambda tensors: {}, "is empty"),
    "unknown prefix": (
        renamed(lambda k: k.replace("transformer.", "unet.")),
        r"no layer for 'unet\.blocks",
    ),
    "text encoder too": (
        lambda t: t | {"text_encoder.layer.lora_A.weight": t[FIRST]},
        "no layer for 'text_encoder",
    ),
    "image to video": (
        lambda t: t | {"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": t[FIRST]},
        "k_img",
    ),
    "both layouts": (
        lambda t: t | {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": t[FIRST]},
        "twice, under",
    ),
    "two names": (
        lambda t: t | {FIRST.replace("lora_A", "lora_down"): t[FIRST]},
        "twice, under two names",
    ),
    "more blocks": (
        lambda t: t | {FIRST.replace(".0.", ".2.", 1): t[FIRST]},
        r"no layer for .*blocks\.2\.",
    ),
    "no partner": (
        lambda t: {k: v for k, v in t.items() if k != FIRST},
        r"blocks\.0\.attn1\.to_q lacks its factor A",
    ),
    "alpha alone": (
        lambda t: {FIRST.replace("lora_A.weight", "alpha"): np.float32([1])},
        "holds no LoRA factor",
    ),
    "other width": (
        lambda t: t | {FIRST: np.zeros((4, 96), np.float32)},
        r"to_q are \[4, 96\] .* \[r, 48\]",
    ),
    "other rank": (
        lambda t: t | {FIRST: np.zeros((3, 48), np.float32)},
        r"to_q are \[3, 48\] and \[48, 4\]",
    ),
    "NaN": (
        lambda t: t | {FIRST: np.full((4, 48), np.nan, np.float32)},
        "to_q.lora_A.weight holds NaN",
    ),
    "bias": (
        lambda t: t | {FIRST.replace("A.weight", "B.bias"): np.zeros(48, np.float32)},
        r"lora_B\.bias",
    ),
    "magnitudes": (
        lambda t: t | {FIRST.replace("lora_A.weight", "dora_scale"): t[FIRST]},
        r"dora_scale",
    ),
    "one dimension": (lambda t: t | {FIRST: np.zeros(4, np.float32)}, r"its shape is \[4\]"),
    "differences": (
        lambda t: t | {"diffusion_model.blocks.0.self_attn.q.diff_b": np.ones(48, np.float32)},
        r"1 tensors change whole weights .*self_attn\.q\.diff_b",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_files_are_refused(kernels, tmp_path, fault):
    change, message = FAULTS[fault]
    save_file(change(tensors_of(factors(kernels))), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        lora.read(tmp_path / "x.safetensors", kernels)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ("{", "is damaged"),
        ("[1]", "is damaged"),
        ({"lora_alpha": 8}, "are damaged: r=None"),
        ({"r": "a", "lora_alpha": 8}, "are damaged: r='a'"),
        ({"r": 8, "lora_alpha": 8}, "state rank 8 of blocks"),
        ({"r": 4, "lora_alpha": 8, "use_dora": True}, "use_dora=True"),
        ({"r": 4, "lora_alpha": 8, "peft_type": "LOHA"}, "peft_type=LOHA"),
        (
            {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa_niter_4"},
            "init_lora_weights=pissa",
        ),
    ],
)
def test_settings_that_are_not_understood_are_refused(kernels, tmp_path, metadata, message):
    text = (
        metadata
        if isinstance(metadata, str)
        else json.dumps({f"transformer.{k}": v for k, v in metadata.items()})
    )
    save_file(
        tensors_of(factors(kernels)),
        tmp_path / "x.safetensors",
        metadata={"lora_adapter_metadata": text},
    )
    with pytest.raises(UserError, match=message):
        lora.read(tmp_path / "x.safetensors", kernels)


def test_two_scales_are_refused(kernels, tmp_path):
    settings = json.dumps({f"transformer.{k}": v for k, v in SETTINGS.items()})
    for name, alpha in (("same", np.float32(ALPHA)), ("other", np.float32(4))):
        tensors = tensors_of(factors(kernels), alpha={}.fromkeys(factors(kernels), alpha).get)
        save_file(
            tensors, tmp_path / f"{name}.safetensors", metadata={"lora_adapter_metadata": settings}
        )
    assert set(lora.read(tmp_path / "same.safetensors", kernels).scales.values()) == {1.5}
    with pytest.raises(
        UserError, match=r"two scales of blocks.*: 1 by its alpha tensor and 1\.5 by PEFT"
    ):
        lora.read(tmp_path / "other.safetensors", kernels)


def test_damaged_and_missing_files(kernels, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors_of(factors(kernels)), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        lora.read(path, kernels)
    path.rename(tmp_path / "x.bin")
    for name, message in (
        ("x.safetensors", "does not exist"),
        ("x.bin", "not a .safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            lora.read(tmp_path / name, kernels)


@pytest.mark.parametrize(
    "recipe, message",
    [
        (
            LoRAConfig(3, 8.0, FFN),
            r"has rank 4, config\.lora\.rank=3 is too low: set config\.lora\.rank=4",
        ),
        (
            LoRAConfig(4, 8.0, ("to_q",)),
            r"adapts 16 layers that config\.lora\.targets=to_q does not name",
        ),
        (LoRAConfig(4, 0.0, FFN), r"config\.lora\.alpha=0"),
    ],
)
def test_recipes_that_cannot_hold_the_file(kernels, tmp_path, recipe, message):
    path, _ = write_form(tmp_path, kernels, "Diffusers")
    with pytest.raises(UserError, match=message):
        lora.fit(lora.read(path, kernels), recipe, kernels)
