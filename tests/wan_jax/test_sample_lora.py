"""`python -m wan_jax.sample --lora`: the settings of a few-step distilled model."""

import subprocess

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests import commands, lora_forms
from wan_jax.storage import lora_names, model_dir


@pytest.fixture
def file(folders, tmp_path):
    config = model_dir.open_model(folders[1]).config("transformer")
    tensors, _ = lora_forms.distilled(lora_names.dense_layers(config))
    save_file(tensors, tmp_path / "lightx2v.safetensors")
    return tmp_path / "lightx2v.safetensors"


def run_sample(model, out, *flags):
    few_steps = ("--steps=4", "--guidance=1", "--shift=5", "--solver=euler")
    common = (f"--model={model}", "--height=32", "--width=48", "--prompt=sea", f"--out={out}")
    return subprocess.run(
        commands.command("wan_jax.sample", *common, *few_steps, *flags),
        capture_output=True,
        text=True,
        check=False,
        env=commands.environment(),
    )


@pytest.mark.slow
def test_few_steps_with_a_distilled_lora(folders, file, tmp_path):
    pictures = []
    for name, flags in (("base", ()), ("few", (f"--lora={file}:0.5",))):
        done = run_sample(folders[1], tmp_path / f"{name}.png", *flags)
        assert done.returncode == 0, done.stderr
        assert (f"merged {file}:0.5" in done.stdout) == (name == "few")
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert (pictures[0] != pictures[1]).mean() > 0.5


@pytest.mark.parametrize(
    "lora, message",
    [("{file}:0", "--lora={file}:0"), ("/nowhere.safetensors", "/nowhere.safetensors does not")],
)
def test_a_lora_that_cannot_be_merged_is_one_message(folders, file, tmp_path, lora, message):
    done = run_sample(folders[1], tmp_path / "a.png", f"--lora={lora.format(file=file)}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message.format(file=file) in done.stderr, done.stderr
