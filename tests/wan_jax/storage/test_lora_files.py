"""LoRA files as other programs write them: their effect is the one in Diffusers and PEFT, or they
are refused.
"""

import copy
import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import lora
from tests import tiny
from tests.lora_forms import ALPHA, FFN, FORMS, SETTINGS, factors, tensors_of, write_form
from wan_jax.command_line.cli import UserError
from wan_jax.models import config as config_lib
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage import lora_files, lora_names


@pytest.fixture(scope="module")
def kernels():
    return lora_names.dense_layers(
        config_lib.from_dict(config_lib.TransformerConfig, tiny.SETTINGS["transformer"])
    )


def deltas(flat, config, kernels):
    """{module: its change of the kernel} of our adapters."""
    out = {}
    for module, (layer, index) in lora_names.modules(kernels).items():
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
        lora_files.read(path, kernels),
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
    file = lora_files.read(path, kernels)
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
        lora_files.read(path, kernels)


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
        lora_files.read(tmp_path / "x.safetensors", kernels)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ("{", "is damaged"),
        ("[1]", "is damaged"),
        ({"lora_alpha": 8}, "are damaged: r=None"),
        ({"r": "a", "lora_alpha": 8}, "are damaged: r='a'"),
        ({"r": 4, "lora_alpha": math.nan}, r"scale of blocks\.0\..* is nan"),
        ({"r": 4, "lora_alpha": "inf"}, r"scale of blocks\.0\..* is inf"),
        ({"r": 4, "lora_alpha": 0}, "scale of all layers is 0"),
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
        lora_files.read(tmp_path / "x.safetensors", kernels)


def test_two_scales_are_refused(kernels, tmp_path):
    settings = json.dumps({f"transformer.{k}": v for k, v in SETTINGS.items()})
    for name, alpha in (("same", np.float32(ALPHA)), ("other", np.float32(4))):
        tensors = tensors_of(factors(kernels), alpha={}.fromkeys(factors(kernels), alpha).get)
        save_file(
            tensors, tmp_path / f"{name}.safetensors", metadata={"lora_adapter_metadata": settings}
        )
    assert set(lora_files.read(tmp_path / "same.safetensors", kernels).scales.values()) == {1.5}
    with pytest.raises(
        UserError, match=r"two scales of blocks.*: 1 by its alpha tensor and 1\.5 by PEFT"
    ):
        lora_files.read(tmp_path / "other.safetensors", kernels)


def test_damaged_and_missing_files(kernels, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors_of(factors(kernels)), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        lora_files.read(path, kernels)
    path.rename(tmp_path / "x.bin")
    for name, message in (
        ("x.safetensors", "does not exist"),
        ("x.bin", "not a .safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            lora_files.read(tmp_path / name, kernels)


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
        lora.fit(lora_files.read(path, kernels), recipe, kernels)
