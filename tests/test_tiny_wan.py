"""The model that ships in assets/tiny-wan, through the commands of the README: converted, trained,
sampled, exported, and sampled again by Diffusers.
"""

import json
import pathlib
import subprocess

import numpy as np
import pytest
from PIL import Image

from examples.tiny_wan import tokenizer as char_tokenizer
from grpo.data.prompts import load_prompts
from rewards.ocr.targets import parse_targets
from tests import commands

ROOT = pathlib.Path(__file__).parent.parent
ASSET = ROOT / "assets/tiny-wan"
PROMPT = 'A green sign with the word "lemon" in white letters.'
SIZE = ["--height=64", "--width=128", "--steps=5", "--guidance=2", "--solver=unipc"]
SHORT = [
    "epochs=2",
    "sample.groups=2",
    "sample.group_size=4",
    "sample.batch_size=8",
    "sample.steps=4",
    "sample.sde_range=(0,3)",
    "train.learning_rate=2e-2",
    "eval.num_prompts=2",
    "eval.steps=2",
    "reward.workers=0",
]


def command(module, *arguments):
    done = subprocess.run(
        commands.command(module, *arguments),
        capture_output=True,
        text=True,
        env=commands.environment(),
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(converted model, run folder, Diffusers folder of the run's model): a run long enough to
    change the pictures.
    """
    root = tmp_path_factory.mktemp("tiny_wan")
    model, run = root / "model", root / "run"
    command("convert.from_diffusers", "--src", ASSET, "--dst", model, "--dtype=float32")
    few = root / "train.txt"
    few.write_text(
        "".join((ROOT / "assets/prompts/tiny_train.txt").read_text().splitlines(keepends=True)[:16])
    )
    command(
        "grpo.train",
        "--config=configs/tiny_ocr.py",
        f"--config.model.path={model}",
        f"--config.run_dir={run}",
        f"--config.prompts.train={few}",
        *(f"--config.{s}" for s in SHORT),
    )
    command("convert.to_diffusers", "--src", model, "--checkpoint", run, "--dst", root / "exported")
    return model, run, root / "exported"


def test_the_folder_is_small_and_complete():
    files = [p for p in ASSET.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 48 * 2**20
    index = json.loads((ASSET / "model_index.json").read_text())
    assert {k for k, v in index.items() if isinstance(v, list)} == {
        p.name for p in ASSET.iterdir() if p.is_dir()
    }
    assert "license: apache-2.0" in (ASSET / "README.md").read_text()


def test_the_tokenizer_is_the_one_its_code_writes(tmp_path):
    char_tokenizer.write(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (ASSET / "tokenizer" / path.name).read_bytes()


def test_held_out_words_are_not_trained_on():
    train, heldout = (
        load_prompts(ROOT / f"assets/prompts/tiny_{name}.txt", parse_targets)
        for name in ("train", "heldout")
    )
    words = {w for targets in train.targets for t in targets for w in t.lower().split()}
    assert (
        not {w for targets in heldout.targets for t in targets for w in t.lower().split()} & words
    )
    assert len(train) == 2048 and len(heldout) == 256


@pytest.fixture(scope="module")
def pictures(trained):
    """{"base" | "run": our picture [64, 128, 3] in 0..1, "noise": what they begin with}: without
    and with training.
    """
    model, run, exported = trained
    noise = np.random.default_rng(3).standard_normal((1, 1, 8, 16, 16)).astype(np.float32)
    np.save(exported.parent / "noise.npy", noise)
    made = {"noise": noise}
    for name, checkpoint in (("base", []), ("run", ["--checkpoint", run])):
        path = exported.parent / f"{name}.png"
        command(
            "wan_jax.sample",
            "--model",
            model,
            *checkpoint,
            "--prompt",
            PROMPT,
            "--out",
            path,
            "--noise",
            exported.parent / "noise.npy",
            *SIZE,
        )
        made[name] = np.asarray(Image.open(path).convert("RGB")) / 255.0
    return made


@pytest.mark.slow
def test_training_shows(pictures):
    assert np.abs(pictures["base"] - pictures["run"]).mean() > 4 / 255


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["base", "run"])
def test_diffusers_samples_the_same_picture(trained, pictures, name):
    """The trained checkpoint merged and exported, sampled by WanPipeline: at most 1/255 from our
    own sampling.
    """
    import diffusers
    import torch

    pipe = diffusers.WanPipeline.from_pretrained(
        trained[2] if name == "run" else ASSET, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=PROMPT,
        height=64,
        width=128,
        num_frames=1,
        num_inference_steps=5,
        guidance_scale=2.0,
        latents=torch.from_numpy(pictures["noise"].transpose(0, 4, 1, 2, 3).copy()),
        output_type="np",
    ).frames[0, 0]
    assert np.abs(theirs - pictures[name]).mean() <= 1 / 255
