"""Tests of model cards beside exported LoRAs, and of their upload to a hub of this machine."""

import json
import os
import pathlib
import shlex
import subprocess

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from safetensors import safe_open

from convert.export_lora import export
from convert.hub import Publishing
from grpo.records.run_log import RunLog
from tests import commands
from tests.convert.fake_hub import FakeHub
from wan_jax.errors import UserError
from wan_jax.models.lora import LoRAConfig, adapted_layers
from wan_jax.storage import lora_names, model_dir
from wan_jax.storage.checkpoint import Checkpoints, join_experts

EVIL = 'A sign "OPEN" | <b>x</b> [y](z)'
NAMES = {
    "diffusers": ["pytorch_lora_weights.safetensors"],
    "comfyui": ["comfyui_lora.safetensors"],
    "peft": ["adapter_config.json", "adapter_model.safetensors"],
}
PICTURES = ["images/after_0.png", "images/before_0.png", "images/reward.png"]
SETTINGS = {
    "epochs": 9,
    "model": {"weights": "fp8"},
    "prompts": {"train": "/secret/folder/train.txt", "heldout": "/secret/folder/heldout.txt"},
    "reward": {"weights": {"ocr": 1.0, "clip": None}, "rule": "spelling", "engine": "rapidocr"},
    "train": {"method": "nft", "learning_rate": 3e-5},
    "sample": {"height": 16, "width": 32, "frames": 1, "shift": 3.0},
    "eval": {"steps": 7, "guidance": 2.5, "solver": "unipc", "num_prompts": 2},
}


def evaluation(epoch, reward):
    return {
        "epoch": epoch,
        "reward": reward,
        "low": reward - 0.1,
        "high": reward + 0.1,
        "num": 2,
        "rewards": [reward, reward],
        "prompts": [EVIL, "b"],
        "texts": ["OPEN", ""],
    }


@pytest.fixture(scope="module")
def run(converted, tmp_path_factory):
    """A run of 4 epochs of which the checkpoint of epoch 2 is exported."""
    folder = tmp_path_factory.mktemp("runs") / "signs"
    model = model_dir.open_model(converted)
    config = LoRAConfig(rank=2, alpha=4.0, targets=("to_q",))
    kernels, rng = lora_names.dense_layers(model.config("transformer")), np.random.default_rng(0)
    flat = {}
    for layer in adapted_layers(kernels, config.targets):
        *stack, n_in, n_out = kernels[layer]
        for name, shape in (("lora_a", (n_in, 2)), ("lora_b", (2, n_out))):
            flat[f"{layer}/{name}"] = rng.standard_normal((*stack, *shape)).astype(np.float32)
    log = RunLog(folder)
    log.config(SETTINGS)
    log.provenance(
        {"epoch": 0, "time": "2026-01-01", "hardware": {"devices": "1 x CPU"}, "python": "3.13.0"}
    )
    for epoch in range(5):
        if epoch:
            log.epoch({"epoch": epoch, "reward_mean": epoch / 10, "updates": 3, "videos": 16})
        if epoch % 2 == 0:
            video = np.full((1, 1, 16, 32, 3), 40 * epoch, np.uint8)
            log.evaluation(evaluation(epoch, 0.4 + epoch / 10), video)
    log.close()
    lora = {"rank": 2, "alpha": 4.0, "targets": ["to_q"]}
    flat = join_experts({"transformer": flat})
    meta = {"config": SETTINGS, "lora": lora, "model": "", "experts": ["transformer"]}
    Checkpoints(folder).save(2, {"trainable": flat}, flat, meta)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A hub, with the environment of a process that uploads to it."""
    with FakeHub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def names_in(folder: pathlib.Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("layout", NAMES)
def test_a_card_beside_every_format(run, converted, tmp_path, layout):
    dst = tmp_path / "out"
    (path,) = export(run, converted, dst, layout).values()
    assert names_in(dst) == sorted([*NAMES[layout], *PICTURES, "README.md"])
    card = huggingface_hub.ModelCard.load(dst / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == ("peft" if layout == "peft" else "diffusers")
    assert (data["license"], data["pipeline_tag"]) == ("apache-2.0", "text-to-video")
    assert {"lora", "text-to-video", "nft"} <= set(data["tags"]) and "base_model" not in data
    assert data["widget"] == [{"text": EVIL, "output": {"url": "images/after_0.png"}}]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("ocr_reward", 0.6), "of epoch 2, not 4"
    for wanted in ("0.40 → 0.60", "3e-05", "1 x CPU", "2 of 9", "| 32 |", "--lora", "to fp8"):
        assert wanted in card.text, wanted
    assert "\\| \\<b\\>x\\</b\\> \\[y\\](z)" in card.text, "escaped in the table"
    assert "/secret" not in card.content and str(run) not in card.content
    with safe_open(path, "numpy") as file:
        said = file.metadata()
    assert said["epoch"] == "2" and said["step"] == "6" and said["reward"].startswith("ocr")
    assert said["reward_heldout"].startswith("0.6000") and said["base_model"]
    assert said["base_weights"].startswith("quantised to fp8")


def test_python_of_the_card_is_python(run, converted, tmp_path):
    for layout in NAMES:
        export(run, converted, tmp_path / layout, layout)
        text = (tmp_path / layout / "README.md").read_text()
        compile(text.split("```python\n")[1].split("```")[0], layout, "exec")


def test_a_base_model_of_the_hub(run, converted, tmp_path):
    base = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    publishing = Publishing(base_model=base, license="mit")
    export(run, converted, tmp_path / "out", publishing=publishing)
    text = (tmp_path / "out/README.md").read_text()
    data = yaml.safe_load(text.split("---\n")[1])
    assert (data["base_model"], data["base_model_relation"]) == (base, "adapter")
    assert data["license"] == "mit" and f'from_pretrained("{base}"' in text


def test_readmes_of_others_stay(run, converted, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    export(run, converted, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and not (tmp_path / "images").exists()
    assert f"{tmp_path / 'README.md'}" in capsys.readouterr().out
    (tmp_path / "README.md").unlink()
    export(run, converted, tmp_path, "comfyui")
    export(
        run, converted, tmp_path, "diffusers", overwrite=True
    )  # the card of an export is replaced
    assert "pytorch_lora_weights" in (tmp_path / "README.md").read_text()


def test_no_card(run, converted, tmp_path):
    """With --nocard, and beside a file, whose folder is the user's."""
    export(run, converted, tmp_path / "a", publishing=Publishing(card=False))
    export(run, converted, tmp_path / "b/x.safetensors")
    assert names_in(tmp_path) == ["a/pytorch_lora_weights.safetensors", "b/x.safetensors"]


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_upload(run, converted, tmp_path, hub, capsys, layout):
    (tmp_path / "notes.txt").write_text("not part of the export")
    export(run, converted, tmp_path, layout, publishing=Publishing(repository="me/signs"))
    assert hub.repository == "me/signs" and not hub.private and hub.commits == 1
    assert sorted(hub.files) == sorted([*NAMES[layout], *PICTURES, "README.md"])
    for name, content in hub.files.items():
        assert content == (tmp_path / name).read_bytes(), name
    assert '"me/signs"' in hub.files["README.md"].decode()
    assert f"{hub.url}/me/signs" in capsys.readouterr().out


@pytest.mark.slow
def test_command(run, converted, tmp_path, hub):
    """By HF_ENDPOINT and HF_TOKEN, into a private repository, with the card of a file."""
    call = commands.command(
        "convert.export_lora",
        *("--src", converted, "--checkpoint", run, "--dst", tmp_path / "x.safetensors"),
        *("--push_to_hub", "me/secret", "--private"),
    )
    env = commands.environment(
        HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1"
    )
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (hub.repository, hub.private) == ("me/secret", True)
    assert sorted(hub.files) == sorted(["README.md", "x.safetensors", *PICTURES])
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"repository": "signs"}, ["--push_to_hub=signs", "OWNER/NAME"]),
        ({"repository": "me/a b"}, ["--push_to_hub=me/a b"]),
        ({"base_model": "wan"}, ["--base_model=wan", "OWNER/NAME"]),
        ({"private": True}, ["--private", "--push_to_hub"]),
        ({"token": ""}, ["--push_to_hub=me/signs", "HF_TOKEN"]),
        ({"token": "hf_wrong"}, ["--push_to_hub=me/signs", "token"]),
        ({"offline": True}, ["--push_to_hub=me/signs", "HF_HUB_OFFLINE"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_before_anything_is_written(
    run, converted, tmp_path, hub, monkeypatch, change, words
):
    monkeypatch.setenv("HF_TOKEN", change.get("token", hub.token))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", change.get("offline", False))
    given = {k: change[k] for k in ("repository", "base_model", "private") if k in change}
    publishing = Publishing(**(given or {"repository": "me/signs"}))
    with pytest.raises(UserError) as caught:
        export(run, converted, tmp_path / "out", publishing=publishing)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "out").exists() and hub.repository is None


@pytest.mark.parametrize("name", ["out", "out/x.safetensors"])
def test_without_a_network_the_files_are_written(run, converted, tmp_path, hub, monkeypatch, name):
    """The message says where they are, and its command uploads them."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        publishing = Publishing(repository="me/signs", private=True)
        export(run, converted, tmp_path / name, publishing=publishing)
    written = tmp_path / "out" / (NAMES["diffusers"][0] if name == "out" else "x.safetensors")
    text = str(caught.value)
    assert written.is_file() and f"{written} is written" in text and "127.0.0.1:9" in text
    assert "--overwrite" not in text
    words = shlex.split(text.split("`")[1])
    assert words[:5] == ["hf", "upload", "me/signs", str(tmp_path / "out"), "."]
    assert words[-1] == "--private" and set(words[6:-1:2]) == set(names_in(tmp_path / "out"))


def test_refused_by_the_hub(run, converted, tmp_path, hub):
    """An owner that the token may not write to, and a public repository with --private; the export
    itself is whole.
    """
    with pytest.raises(UserError, match=r"--push_to_hub=other/signs.*write access.*`hf upload"):
        export(run, converted, tmp_path / "a", publishing=Publishing(repository="other/signs"))
    hub.repository, hub.private = "me/signs", False
    with pytest.raises(UserError, match=r"--push_to_hub=me/signs.*public"):
        publishing = Publishing(repository="me/signs", private=True)
        export(run, converted, tmp_path / "b", publishing=publishing)
    assert hub.commits == 0
    assert all((tmp_path / name / NAMES["diffusers"][0]).is_file() for name in "ab")
    assert json.dumps(hub.files) == "{}"
