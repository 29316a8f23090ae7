"""The command `python -m wan_jax.sample`."""

import json
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests import commands

PROMPTS = ('A red sign with the word "open".', "Someone wrote “it's late” on a  wall.")


def run_sample(*flags):
    return subprocess.run(
        commands.command("wan_jax.sample", *flags),
        capture_output=True,
        text=True,
        check=False,
        env=commands.environment(),
    )


@pytest.mark.slow
def test_samples_that_are_not_finite_are_not_written(folders, tmp_path):
    """Of two samples one: an error that names its prompt, no black picture, and the other one is
    kept.
    """
    noise = np.random.default_rng(0).standard_normal((2, 1, 4, 6, 16)).astype(np.float32)
    noise[1, 0, 2, 3, 4] = np.nan
    np.save(tmp_path / "noise.npy", noise)
    result = run_sample(
        f"--model={folders[1]}",
        "--height=32",
        "--width=48",
        "--steps=1",
        "--prompt=sea",
        "--prompt=sky",
        f"--noise={tmp_path / 'noise.npy'}",
        f"--out={tmp_path / 'a.png'}",
    )
    assert (
        result.returncode == 1 and "1 of 2 samples" in result.stderr and "'sky'" in result.stderr
    ), result.stderr
    assert "sea" not in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.glob("*.png")] == ["a_000.png"]


@pytest.mark.slow
def test_sampling_command(folders, tmp_path):
    _, model = folders
    common = (f"--model={model}", "--height=32", "--width=48", "--steps=2")
    result = run_sample(
        *common, f"--prompt={PROMPTS[0]}", f"--prompt={PROMPTS[1]}", f"--out={tmp_path / 'a.png'}"
    )
    assert result.returncode == 0, result.stderr
    pictures = [np.asarray(Image.open(tmp_path / f"a_00{i}.png")) for i in range(2)]
    assert pictures[0].shape == (32, 48, 3) and (pictures[0] != pictures[1]).any()
    result = run_sample(
        *common, f"--prompt={PROMPTS[0]}", "--frames=5", f"--out={tmp_path / 'b.mp4'}"
    )
    assert result.returncode == 0 and (tmp_path / "b.mp4").stat().st_size > 500, result.stderr


@pytest.mark.slow
def test_prompts_of_a_file_in_batches_and_as_a_grid(folders, tmp_path):
    """Values in force, a line for each batch, a file for each sample, and all in one."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPTS[1], "id": 7}) + "\n")
    result = run_sample(
        f"--model={folders[1]}",
        "--height=32",
        "--width=48",
        "--steps=2",
        f"--prompt={PROMPTS[0]}",
        f"--prompts={tmp_path / 'prompts.jsonl'}",
        "--samples=2",
        "--batch_size=3",
        "--grid",
        "--schedule=legacy",
        "--negative_prompt=wan",
        f"--out={tmp_path / 'a.png'}",
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name, value, source in (
        ("steps", "2", "--steps"),
        ("shift", "3", "the model's scheduler"),
        ("guidance", "5", "general values"),
        ("schedule", "legacy", "--schedule"),
    ):
        assert [name, value, source] in [line.split(maxsplit=2) for line in lines]
    assert [line.split(":")[0] for line in lines if line.startswith("batch ")] == [
        "batch 1 of 2",
        "batch 2 of 2",
    ]
    names = ["a_000.png", "a_001.png", "a_002.png", "a_003.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [*names, "a_grid.png"]
    grid = np.asarray(Image.open(tmp_path / "a_grid.png"))
    for i, name in enumerate(names):
        picture = np.asarray(Image.open(tmp_path / name))
        assert contains(grid, picture) and not contains(grid, 255 - picture), i
    assert (folders[1] / "text_cache").is_dir()


def contains(grid, picture):
    """Whether a picture is somewhere in a larger one."""
    windows = np.lib.stride_tricks.sliding_window_view(grid, picture.shape)[:, :, 0]
    return bool((windows == picture).all(axis=(2, 3, 4)).any())


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize(
    "flags, message",
    [
        (("--model=nowhere", "--out=x.png"), "nowhere does not exist"),
        (("--model={source}", "--out=x.png"), "Diffusers folder"),
        (("--model={model}", "--out=x.png", "--frames=5"), "x.png"),
        (("--model={model}", "--out=x.bmp"), ".bmp"),
        (("--model={model}", "--out=x.png", "--height=30"), "height=30"),
        (("--model={model}", "--out=x.png", "--checkpoint=nowhere"), "nowhere does not exist"),
        (("--model={model}", "--out=x.png", "--steps=0"), "steps=0"),
        (("--model={model}", "--out=x.png", "--fps=8"), "--fps has no effect here"),
        (("--model={model}", "--out=x.png", "--noise=README.md"), "README.md is not a .npy file"),
        (("--model={model}", "--out=/dev/null/x.png"), "/dev/null/x.png cannot be written"),
        (("--model={model}", "--out=x.png", "--solver=ddim"), "solver"),
        (("--model={model}", "--out=x.png", "--colour=red"), "colour"),
        (("--model={model}", "--out=x.png", "--tile=40"), "--tile=40 must be a multiple of 32"),
        (("--model={model}", "--out=x.png", "--tile=-32"), "--tile=-32"),
        (("--model={model}", "--out=x.png", "--prompts=nowhere.txt"), "nowhere.txt does not exist"),
        (("--model={model}", "--out=x.png", "--devices=99"), "devices=99"),
        (
            ("--model={model}", "--out=x.png", "--height=16000000", "--width=16000000"),
            "height=16000000",
        ),
        (("--model={model}", "--out=x.png", "--schedule=old"), "schedule"),
        (
            ("--model={model}", "--out=x.png", "--solver=flow_match_euler", "--schedule=legacy"),
            "--schedule has no effect here",
        ),
        (("--model={model}", "--out=x.png", "--matmul_precision=tf19"), "matmul_precision"),
        (("--model={model}", "--out=x.png", "--noise=n.npy", "--seed=1"), "--seed has no effect"),
        (
            ("--model={model}", "--out=x.png", "--guidance=1", "--negative_prompt=x"),
            "--negative_prompt has no effect here",
        ),
        (("--model={model}", "--out=x.png", "--guidance_2=3"), "--guidance_2 has no effect here"),
        (("--model={model}", "--out=x.png", "--reward_guidance=3"), "--reward_guidance has no"),
    ],
)
def test_sampling_errors_are_one_message(folders, flags, message):
    source, model = folders
    flags = [f.format(source=source, model=model) for f in flags]
    result = run_sample("--prompt=x", "--width=48", "--height=32", *flags)
    assert (
        result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    ), result.stderr


@pytest.mark.slow
def test_decoding_in_tiles(folders, tmp_path):
    """A tile that covers the frame changes nothing; smaller ones change pixels, but not the picture."""
    common = (f"--model={folders[1]}", "--height=64", "--width=96", "--steps=2", "--prompt=sea")
    pictures = {}
    for tile in (0, 32, 96):
        out = tmp_path / f"{tile}.png"
        done = run_sample(*common, f"--tile={tile}", f"--out={out}")
        assert done.returncode == 0, done.stderr
        pictures[tile] = np.asarray(Image.open(out)).astype(int)
    # two functions compiled for one computation, which rounds to another of 256 values at most
    assert np.abs(pictures[96] - pictures[0]).max() <= 1
    difference = np.abs(pictures[32] - pictures[0])
    assert 0 < difference.mean() < pictures[0].std()
