"""Tests of the conversion: bit-exact round trips, and broken sources and destinations."""

import json
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.from_diffusers import convert
from convert.plan import STEMS
from convert.to_diffusers import export
from tests import commands, tiny
from wan_jax.command_line.cli import UserError
from wan_jax.storage import model_dir

COMPONENTS = tuple(STEMS)


def tensors(folder, component):
    return load_file(folder / component / f"{STEMS[component]}.safetensors")


def identical(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_pipeline(
        tmp_path_factory.mktemp("source") / "wan", bf16=("text_encoder",), boundary=0.875
    )


@pytest.fixture
def broken(source, tmp_path):
    """A copy to break."""
    return shutil.copytree(source, tmp_path / "broken")


def test_round_trip_is_bit_exact(source, tmp_path):
    convert(str(source), tmp_path / "model")
    export(tmp_path / "model", tmp_path / "back")
    for component in COMPONENTS:
        assert identical(tensors(tmp_path / "back", component), tensors(source, component))
        back, wanted = (
            folder / component / "config.json" for folder in (tmp_path / "back", source)
        )
        assert back.read_text() == wanted.read_text()
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_names_the_folder_as_it_was_given(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    convert(str(source), "models/wan")
    assert capsys.readouterr().out.splitlines()[-1].startswith("models/wan: ")


def test_float32_and_bfloat16(source, tmp_path):
    convert(str(source), tmp_path / "single", "float32")
    export(tmp_path / "single", tmp_path / "back")
    for component in COMPONENTS:
        wanted = {k: v.astype(np.float32) for k, v in tensors(source, component).items()}
        assert identical(tensors(tmp_path / "back", component), wanted)
    convert(str(source), tmp_path / "half", "bfloat16")
    model = model_dir.open_model(tmp_path / "half")
    stored = {c: {k: v.dtype for k, v in tiny.stored_arrays(model, c).items()} for c in COMPONENTS}
    assert set(stored["vae"].values()) == {np.dtype(np.float32)}
    assert stored["transformer"]["blocks/attn1/to_q/kernel"] == ml_dtypes.bfloat16
    assert {k for k, d in stored["transformer"].items() if d == np.float32} == {
        "scale_shift_table",
        "blocks/scale_shift_table",
        "blocks/norm2/scale",
        "blocks/norm2/bias",
    } | {
        f"condition_embedder/time_embedder/linear_{i}/{leaf}"
        for i in (1, 2)
        for leaf in ("kernel", "bias")
    }


@pytest.mark.slow
def test_shards(source, tmp_path):
    convert(str(source), tmp_path / "model")
    export(tmp_path / "model", tmp_path / "back", shard_gb=40e3 / 1e9)
    index = json.loads(
        (tmp_path / "back/transformer/diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all(
        (tmp_path / "back/transformer" / f).stat().st_size < 60e3 for f in files
    )
    convert(str(tmp_path / "back"), tmp_path / "again")
    for component in COMPONENTS:
        a, b = (
            tiny.stored_arrays(model_dir.open_model(tmp_path / name), component)
            for name in ("model", "again")
        )
        assert identical(a, b)
    (tmp_path / "back/transformer" / min(files)).unlink()
    with pytest.raises(UserError, match=r"00001-of-.* is missing"):
        convert(str(tmp_path / "back"), tmp_path / "third")


def edit(folder, component, change):
    path = folder / component / f"{STEMS[component]}.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


FAULTS = {
    "missing tensor": (lambda w: w.pop("proj_out.bias"), "1 missing .*proj_out.bias"),
    "unknown tensor": (
        lambda w: w.update({"blocks.0.attn1.add_k_proj.weight": np.zeros(3, np.float32)}),
        "1 unknown .*add_k_proj",
    ),
    "wrong shape": (
        lambda w: w.update({"proj_out.bias": np.zeros(3, np.float32)}),
        r"proj_out.bias: \(3,\)",
    ),
    "NaN": (lambda w: w["proj_out.bias"].__setitem__(0, np.nan), "proj_out.bias holds NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_tensors_are_named_and_nothing_is_left(broken, tmp_path, fault):
    change, message = FAULTS[fault]
    edit(broken, "transformer", change)
    with pytest.raises(UserError, match=message):
        convert(str(broken), tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def spoil(folder, what):
    weights = folder / "vae" / f"{STEMS['vae']}.safetensors"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "not safetensors":
        weights.write_bytes(b"<html>error</html>")
    elif what == "no weights":
        weights.unlink()
    elif what == "no config":
        (folder / "vae" / "config.json").unlink()
    elif what == "bad json":
        (folder / "model_index.json").write_text("{")
    elif what == "no index":
        (folder / "model_index.json").unlink()
    elif what == "no tokenizer":
        shutil.rmtree(folder / "tokenizer")
    else:
        index = json.loads((folder / "model_index.json").read_text())
        changes = {
            "wrong pipeline": {"_class_name": "WanImageToVideoPipeline"},
            "no second expert": {"transformer_2": [None, None]},
        }
        (folder / "model_index.json").write_text(json.dumps(index | changes[what]))


@pytest.mark.parametrize(
    "what, message",
    [
        ("truncated", "diffusion_pytorch_model.safetensors is truncated or damaged"),
        ("not safetensors", "truncated or damaged"),
        ("no weights", "is missing: the download is not complete"),
        ("no config", "config.json does not exist"),
        ("bad json", "not valid JSON"),
        ("no index", "Diffusers layout"),
        ("no tokenizer", "tokenizer is missing"),
        ("wrong pipeline", "WanImageToVideoPipeline"),
        ("no second expert", "boundary_ratio is 0.875 and transformer_2 is"),
    ],
)
def test_bad_sources(broken, tmp_path, what, message):
    spoil(broken, what)
    with pytest.raises(UserError, match=message):
        convert(str(broken), tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_null_second_expert_counts_as_none(broken, tmp_path):
    index = json.loads((broken / "model_index.json").read_text())
    index |= {"transformer_2": [None, None], "boundary_ratio": None}
    (broken / "model_index.json").write_text(json.dumps(index))
    convert(str(broken), tmp_path / "model")
    model = model_dir.open_model(tmp_path / "model")
    assert model.experts == ("transformer",) and model.boundary is None
    assert not (tmp_path / "model/transformer_2").exists()


def test_two_experts_are_known_by_their_boundary(source, tmp_path):
    convert(str(source), tmp_path / "model")
    model = model_dir.open_model(tmp_path / "model")
    assert model.experts == ("transformer", "transformer_2") and model.boundary == 0.875
    high, low = (
        tiny.stored_arrays(model, name)["patch_embedding/kernel"] for name in model.experts
    )
    assert not np.array_equal(high, low)
    alone = model_dir.open_model(tmp_path / "model", single_expert=True)
    assert alone.experts == ("transformer",) and alone.boundary is None
    assert alone.fingerprint == model.fingerprint and "transformer_2" in alone.components


@pytest.mark.slow
def test_existing_destination_survives(source, broken, tmp_path):
    convert(str(source), tmp_path / "model")
    with pytest.raises(UserError, match="--overwrite"):
        convert(str(source), tmp_path / "model")
    edit(broken, "vae", lambda w: w.pop("quant_conv.bias"))
    with pytest.raises(UserError, match=r"quant_conv\.bias"):
        convert(str(broken), tmp_path / "model", overwrite=True)
    before = tiny.stored_arrays(model_dir.open_model(tmp_path / "model"), "vae")
    convert(str(source), tmp_path / "model", overwrite=True)
    assert identical(before, tiny.stored_arrays(model_dir.open_model(tmp_path / "model"), "vae"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "model"]


def cli(module, *args):
    return commands.command(module, *args)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--src=nowhere", "--dst=x"], "--src nowhere is neither a folder nor a hub id"),
        (["--src=a/b", "--dst=x"], "HF_HUB_OFFLINE is set and the model is not in the cache"),
        (
            ["--src=a/b", "--dst=x", "--dtype=int8"],
            "--dtype=int8: 'int8'; expected one of source, float32, bfloat16",
        ),
    ],
)
def test_command_line_errors_are_one_message(args, message, tmp_path):
    result = subprocess.run(
        cli("convert.from_diffusers", *args),
        capture_output=True,
        text=True,
        check=False,
        env=commands.environment(HF_HUB_OFFLINE="1"),
    )
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


def test_open_model_says_what_a_folder_is(source, tmp_path):
    with pytest.raises(UserError, match=r"Diffusers folder.*convert\.from_diffusers"):
        model_dir.open_model(source)
    convert(str(source), tmp_path / "model")
    manifest = tmp_path / "model" / model_dir.MANIFEST
    manifest.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        model_dir.open_model(tmp_path / "model")
