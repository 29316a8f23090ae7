"""Exports of LoRA files: their names, what is refused, and the command; `test_lora` has what they hold."""

import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import lora as files
from convert.export_lora import export, lora_file
from tests import commands
from tests.convert.lora_runs import random_adapters, write_run
from wan_jax.command_line.cli import UserError
from wan_jax.models.lora import LoRAConfig

CONFIG = LoRAConfig(rank=4, alpha=8.0)
FIRST = "transformer.blocks.0.attn1.to_q.lora_A.weight"


@pytest.mark.parametrize(
    "dst, layout, expert, two, name",
    [
        ("out", "diffusers", "transformer", False, "out/pytorch_lora_weights.safetensors"),
        ("out", "comfyui", "transformer_2", True, "out/comfyui_lora_low_noise.safetensors"),
        ("out", "peft", "transformer", False, "out/adapter_model.safetensors"),
        ("out", "peft", "transformer_2", True, "out/low_noise/adapter_model.safetensors"),
        ("a/b.safetensors", "diffusers", "transformer", False, "a/b.safetensors"),
        ("a/b.safetensors", "diffusers", "transformer", True, "a/b_high_noise.safetensors"),
    ],
)
def test_file_of_each_expert(dst, layout, expert, two, name):
    assert lora_file(pathlib.Path(dst), layout, expert, two) == pathlib.Path(name)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda flat: {}, r"\(blocks/attn1/to_k\): it was trained from another one"),
        (lambda flat: {f"wrong/{k}": v for k, v in flat.items()}, "trained from another one"),
        (
            lambda flat: {k: v for k, v in flat.items() if "attn2/to_v" not in k},
            r"\(blocks/attn2/to_v\)",
        ),
        (lambda flat: {k: v[:1] for k, v in flat.items()}, "trained from another model"),
        (lambda flat: {k: v * np.nan for k, v in flat.items()}, "NaN"),
        (
            lambda flat: flat | {"patch_embedding/lora_a": np.zeros((64, 4), np.float32)},
            "convolution",
        ),
    ],
)
def test_adapters_of_another_model_are_not_written(kernels, change, message):
    with pytest.raises(UserError, match=message):
        files.to_tensors(change(random_adapters(kernels, CONFIG)), CONFIG, kernels)


def test_float16_overflow_is_not_written(single, kernels, tmp_path):
    flat = {k: v * np.float32(1e6) for k, v in random_adapters(kernels, CONFIG).items()}
    with pytest.raises(UserError, match="beyond float16"):
        export(
            write_run(tmp_path / "run", flat, CONFIG),
            single.path,
            tmp_path / "lora",
            dtype="float16",
        )
    assert not any((tmp_path / "lora").glob("*"))


def test_export_says_what_is_wrong(single, kernels, tmp_path):
    flat = random_adapters(kernels, CONFIG)
    run = write_run(tmp_path / "run", flat, CONFIG)
    with pytest.raises(UserError, match=r"all weights.*convert\.to_diffusers"):
        export(write_run(tmp_path / "full", flat, None), single.path, tmp_path / "lora")
    both = write_run(tmp_path / "both", dict.fromkeys(files.EXPERTS, flat), CONFIG)
    with pytest.raises(UserError, match="trained transformer, transformer_2, the model"):
        export(both, single.path, tmp_path / "lora")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"give a \.safetensors file or a folder"):
        export(run, single.path, tmp_path / "file")
    export(run, single.path, tmp_path / "lora")
    with pytest.raises(UserError, match="--overwrite"):
        export(run, single.path, tmp_path / "lora")
    with pytest.raises(UserError, match=r"x\.safetensors must be a folder for --format=peft"):
        export(run, single.path, tmp_path / "x.safetensors", "peft")
    export(run, single.path, tmp_path / "lora", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
    ]


def test_a_write_that_went_wrong_is_noticed_and_leaves_nothing(
    single, kernels, tmp_path, monkeypatch
):
    def save(tensors, path, metadata):
        save_file(tensors | {FIRST: tensors[FIRST] + 1}, path, metadata)

    run = write_run(tmp_path / "run", random_adapters(kernels, CONFIG), CONFIG)
    monkeypatch.setattr(files, "save_tensors", save)
    with pytest.raises(UserError, match="does not hold what was written"):
        export(run, single.path, tmp_path / "lora")
    assert not any((tmp_path / "lora").iterdir())


def test_command_line(single, kernels, tmp_path):
    run = write_run(tmp_path / "run", random_adapters(kernels, CONFIG), CONFIG)
    command = commands.command(
        "convert.export_lora",
        f"--src={single.path}",
        f"--checkpoint={run}",
        f"--dst={tmp_path / 'lora'}",
        "--format=comfyui",
        "--dtype=bfloat16",
    )
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=commands.environment()
    )
    assert done.returncode == 0 and "comfyui_lora.safetensors" in done.stdout, (
        done.stdout + done.stderr
    )
    assert load_file(tmp_path / "lora/comfyui_lora.safetensors").keys() >= {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
        "diffusion_model.blocks.1.cross_attn.o.lora_up.weight",
    }
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=commands.environment()
    )
    assert (
        done.returncode == 1
        and "no checkpoints folder" in done.stderr
        and "Traceback" not in done.stderr
    )
