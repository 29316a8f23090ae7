"""Tests of written LoRA files: their effect in Diffusers, the way back, and what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert import lora as files
from convert.export_lora import export
from convert.from_diffusers import convert
from grpo.learning.policy import make_structure
from tests import tiny
from tests.convert.lora_runs import ATTENTION, FFN, random_adapters, write_run
from wan_jax.command_line.cli import UserError
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage import lora_files, lora_names, model_dir

EVERYTHING = (*FFN, "proj_out", "time_proj", "linear_1", "linear_2")
MODULES = {ATTENTION: 8 * 2, (*FFN, "proj_out"): 10 * 2 + 1, EVERYTHING: 10 * 2 + 6}
LAYOUTS = ("diffusers", "comfyui")


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    """A random model with two experts in Diffusers layout, and converted."""
    root = tmp_path_factory.mktemp("models")
    convert(
        str(tiny.write_pipeline(root / "source", seed=5, boundary=0.875)), root / "model", "float32"
    )
    return root / "source", model_dir.open_model(root / "model")


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    text = rng.standard_normal((2, 7, tiny.SETTINGS["transformer"]["text_dim"])).astype(np.float32)
    return (
        rng.standard_normal((2, 2, 4, 6, 16)).astype(np.float32),
        np.array([930.0, 250.0], np.float32),
        text,
    )


@functools.cache
def weights_of(folder, expert):
    return model_dir.build(expert, model_dir.open_model(folder), attention="xla")[1]


@functools.cache
def structure_of(config, adapters: LoRAConfig):
    return make_structure(
        config,
        lora=adapters,
        dtype=jnp.float32,
        attention="xla",
        remat="none",
        mesh=mesh_lib.make_mesh(devices=jax.devices()[:1]),
    )


compiled = nnx.jit(lambda module, *x: module(*x))


def our_velocities(model, expert, config: LoRAConfig, adapters):
    """(with the adapters, without them): the expert's output as training computes it."""
    frozen, policy = weights_of(model.path, expert), structure_of(model.config(expert), config)
    assert {k: v.shape for k, v in policy.trainable.items()} == {
        k: v.shape for k, v in adapters.items()
    }
    # B = 0 is the model without adapters
    return (
        np.asarray(compiled(policy.module(flat, frozen), *inputs()))
        for flat in (adapters, {k: v * k.endswith("lora_a") for k, v in adapters.items()})
    )


def their_velocity(transformer):
    import torch

    latents, timesteps, text = inputs()
    with torch.no_grad():
        out = transformer(
            torch.from_numpy(latents.transpose(0, 4, 1, 2, 3).copy()),
            torch.from_numpy(timesteps),
            torch.from_numpy(text),
        ).sample
    return out.numpy().transpose(0, 2, 3, 4, 1)


def relative_error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def peer(folder):
    import diffusers

    return diffusers.WanPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def pipe_of_source(two_experts):
    return peer(two_experts[0])


@pytest.fixture
def pipe(pipe_of_source):
    """The source in Diffusers; it has no adapters after the test."""
    yield pipe_of_source
    pipe_of_source.unload_lora_weights()


# ---- the effect ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", MODULES, ids=["attention", "ffn", "everything"])
def test_diffusers_computes_the_same(two_experts, pipe, tmp_path, layout, targets):
    """Each expert's file in its own transformer: fp32, 1e-5 relative, alpha unlike the rank."""
    _, model = two_experts
    config = LoRAConfig(rank=3, alpha=5.0, targets=targets)
    adapters = {
        expert: random_adapters(lora_names.dense_layers(model.config(expert)), config, seed)
        for seed, expert in enumerate(model.experts)
    }
    run = write_run(tmp_path / "run", adapters, config)
    written = export(run, model.path, tmp_path / "lora", layout)
    assert [p.name for p in written.values()] == [
        p.name for p in sorted((tmp_path / "lora").glob("*.safetensors"))
    ]
    for expert, path in written.items():
        pipe.load_lora_weights(
            str(path), adapter_name=expert, load_into_transformer_2=expert == "transformer_2"
        )
        assert len(load_file(path)) == 2 * MODULES[targets]
    for expert in model.experts:
        ours, base = our_velocities(model, expert, config, adapters[expert])
        assert relative_error(their_velocity(getattr(pipe, expert)), ours) < 1e-5
        assert relative_error(base, ours) > 0.05


@pytest.mark.parity
@pytest.mark.parametrize("stated", ["metadata", "alpha tensors"])
def test_files_that_state_alpha_have_the_effect_they_have_in_diffusers(
    two_experts, pipe, tmp_path, stated
):
    """A file of another program: unscaled factors and an alpha, read by Diffusers and by us."""
    _, model = two_experts
    kernels = lora_names.dense_layers(model.config("transformer"))
    config = LoRAConfig(rank=4, alpha=6.0, targets=FFN)
    plain = LoRAConfig(rank=4, alpha=4.0, targets=FFN)  # scale 1: the factors as they are
    flat, path, metadata = (
        random_adapters(kernels, config),
        tmp_path / "lora.safetensors",
        {"format": "pt"},
    )
    if stated == "metadata":
        tensors = files.to_tensors(flat, plain, kernels)
        metadata["lora_adapter_metadata"] = json.dumps(
            {
                "transformer.r": 4,
                "transformer.lora_alpha": 6,
                "transformer.target_modules": list(FFN),
            }
        )
    else:
        tensors = files.to_tensors(flat, plain, kernels, "comfyui")
        tensors |= {
            k.replace("lora_up.weight", "alpha"): np.float32(6.0) for k in tensors if "lora_up" in k
        }
    save_file({k: np.asarray(v) for k, v in tensors.items()}, path, metadata=metadata)
    pipe.load_lora_weights(str(path))
    found = lora_files.read(path, kernels)
    assert found.config == config
    adapters = files.fit(found, config, kernels)
    ours, _ = our_velocities(model, "transformer", config, adapters)
    assert relative_error(their_velocity(pipe.transformer), ours) < 1e-5
    np.testing.assert_array_equal(
        adapters["blocks/ffn/net_2/lora_b"], flat["blocks/ffn/net_2/lora_b"]
    )


@pytest.mark.parity
def test_a_file_that_peft_wrote(two_experts, tmp_path):
    """Diffusers' own way: an adapter on its transformer, saved with `save_lora_weights`, alpha in
    the metadata.
    """
    import torch
    from diffusers import WanPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    folder, model = two_experts
    transformer = peer(folder).transformer
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["to_q", "to_v"], init_lora_weights=False
    )
    transformer.add_adapter(config)
    WanPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata={
            "r": 4,
            "lora_alpha": 10,
            "target_modules": ["to_q", "to_v"],
        },
    )
    kernels = lora_names.dense_layers(model.config("transformer"))
    found = lora_files.read(tmp_path, kernels)
    assert found.config == LoRAConfig(4, 10.0, ("to_q", "to_v"))
    ours, base = our_velocities(
        model, "transformer", found.config, files.fit(found, found.config, kernels)
    )
    assert relative_error(their_velocity(transformer), ours) < 1e-5
    assert relative_error(base, ours) > 0.01


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("targets", [ATTENTION, (*ATTENTION, "proj", "proj_out")])
def test_peft_reads_its_folder(two_experts, tmp_path, targets):
    """`PeftModel.from_pretrained` of each expert's folder: fp32, 1e-5 relative, alpha as it is."""
    import peft

    folder, model = two_experts
    config = LoRAConfig(rank=3, alpha=5.0, targets=targets)
    kernels = lora_names.dense_layers(model.config("transformer"))
    trained = {e: random_adapters(kernels, config, i) for i, e in enumerate(model.experts)}
    written = export(
        write_run(tmp_path / "run", trained, config), model.path, tmp_path / "x", "peft"
    )
    assert sorted(
        str(p.relative_to(tmp_path / "x")) for p in (tmp_path / "x").rglob("adapter_*")
    ) == [
        f"{name}/adapter_{file}"
        for name in ("high_noise", "low_noise")
        for file in ("config.json", "model.safetensors")
    ]
    pipe = peer(folder)
    for expert, path in written.items():
        theirs = peft.PeftModel.from_pretrained(getattr(pipe, expert), str(path.parent))
        ours, base = our_velocities(model, expert, config, trained[expert])
        assert relative_error(their_velocity(theirs), ours) < 1e-5
        assert relative_error(base, ours) > 0.05


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha, exact", [(4.0, True), (8.0, True), (5.0, False)])
def test_round_trip(single, kernels, tmp_path, layout, alpha, exact):
    """Bit for bit where alpha / r is a power of two; else B may differ in its last bit, for it was
    scaled.
    """
    config = LoRAConfig(rank=4, alpha=alpha, targets=FFN)
    flat = random_adapters(kernels, config)
    run = write_run(tmp_path / "run", flat, config)
    (path,) = export(run, single.path, tmp_path / "a" / "lora.safetensors", layout).values()
    assert path == tmp_path / "a" / "lora.safetensors" and [
        p.name for p in path.parent.iterdir()
    ] == [path.name]
    found = lora_files.read(path, kernels)
    assert found.config == LoRAConfig(4, 4.0, FFN)
    back = files.initial_adapters(str(path), single, config)["transformer"]
    assert back.keys() == flat.keys() and all(v.dtype == np.float32 for v in back.values())
    for name, value in flat.items():
        np.testing.assert_array_max_ulp(
            back[name], value, 0 if exact or name.endswith("lora_a") else 1
        )
    again = files.to_tensors(files.fit(found, found.config, kernels), found.config, kernels, layout)
    stored = load_file(path)
    assert again.keys() == stored.keys() and all(
        np.array_equal(again[k], stored[k]) for k in stored
    )
    scaled = (alpha / 4 * flat["blocks/ffn/net_2/lora_b"][1].T.astype(np.float64)).astype(
        np.float32
    )
    assert any(np.array_equal(value, scaled) for value in stored.values())


def test_a_peft_folder_comes_back(single, kernels, tmp_path):
    """To the bit, with its alpha."""
    config = LoRAConfig(rank=4, alpha=5.0, targets=FFN)
    flat = random_adapters(kernels, config)
    (path,) = export(
        write_run(tmp_path / "run", flat, config), single.path, tmp_path / "lora", "peft"
    ).values()
    settings = json.loads(path.with_name("adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 5.0)
    assert settings["target_modules"] == list(FFN)
    assert lora_files.read(path.parent, kernels).config == config
    back = files.initial_adapters(str(path.parent), single, config)["transformer"]
    assert all(np.array_equal(back[name], value) for name, value in flat.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(single, kernels, tmp_path, dtype):
    config = LoRAConfig(rank=2, alpha=4.0)
    flat = random_adapters(kernels, config)
    (path,) = export(
        write_run(tmp_path / "run", flat, config), single.path, tmp_path / "lora", dtype=dtype
    ).values()
    back = files.initial_adapters(str(path), single, config)["transformer"]
    for name, value in flat.items():
        np.testing.assert_array_equal(
            back[name], value.astype(files.DTYPES[dtype]).astype(np.float32)
        )


def test_two_experts_come_back_under_their_names(two_experts, tmp_path):
    _, model = two_experts
    config = LoRAConfig(rank=2, alpha=4.0)
    kernels = lora_names.dense_layers(model.config("transformer"))
    trained = {e: random_adapters(kernels, config, i) for i, e in enumerate(model.experts)}
    high, low = export(
        write_run(tmp_path / "run", trained, config), model.path, tmp_path / "x.safetensors"
    ).values()
    assert (high.name, low.name) == ("x_high_noise.safetensors", "x_low_noise.safetensors")
    assert all(k.startswith("transformer.blocks.") for path in (high, low) for k in load_file(path))
    back = files.initial_adapters(f"{high},{low}", model, config)
    assert list(back) == ["transformer", "transformer_2"]
    assert all(
        np.array_equal(back[e][k], v) for e, flat in trained.items() for k, v in flat.items()
    )
    with pytest.raises(
        UserError, match=r"is for transformer, the model has transformer and transformer_2"
    ):
        files.initial_adapters(str(high), model, config)
    with pytest.raises(UserError, match=r"names no file for transformer_2"):
        files.initial_adapters(f"{high},", model, config)
