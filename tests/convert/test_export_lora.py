"""Tests of the names of exported LoRA files; `test_lora` has the export itself."""

import pathlib

import pytest

from convert.export_lora import lora_file


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
