"""Tests of what a conversion accepts as a source and refuses as a destination.

Both are checked before anything is written or downloaded.
"""

import json
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import hub, to_diffusers
from convert import source as sources
from convert.from_diffusers import check, convert
from convert.plan import STEMS
from tests import tiny
from wan_jax.command_line.cli import UserError
from wan_jax.models.config import (
    ConfigError,
    Scheduler,
    TransformerConfig,
    from_dict,
    load_scheduler,
)
from wan_jax.storage import model_dir
from wan_jax.storage.tensor_files import Shards

BF16 = np.dtype(model_dir.jnp.bfloat16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("source") / "wan", seed=8)


@pytest.fixture
def own(source, tmp_path):
    """A copy to change."""
    return shutil.copytree(source, tmp_path / "own")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(own, tmp_path, message, **kwargs):
    """The conversion is refused, and nothing is left beside the source."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        convert(str(own), tmp_path / "model", **kwargs)
    assert sorted(tmp_path.iterdir()) == before


# ---- the destination -----------------------------------------------------------------------------


@pytest.mark.parametrize("dst", ["own", "own/", "link", "own/model", "link/vae", "x/..", "weights"])
def test_a_destination_that_would_destroy_the_source(own, tmp_path, dst):
    (tmp_path / "link").symlink_to(own)
    (own / "vae").rename(tmp_path / "weights")
    (own / "vae").symlink_to(tmp_path / "weights")
    (tmp_path / "x").mkdir()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"destination {tmp_path}.* source.*another --dst"):
        convert(str(own), f"{tmp_path}/{dst}", overwrite=True)
    assert contents(tmp_path) == before


def test_the_way_back_does_not_destroy_its_source(tmp_path, monkeypatch):
    model = model_dir.ModelDir(tmp_path / "model", {"components": {}}, {})
    monkeypatch.setattr(model_dir, "open_model", lambda path: model)
    for dst in (tmp_path / "model", tmp_path / "model" / "x", tmp_path):
        with pytest.raises(UserError, match="another --dst"):
            to_diffusers.export(model.path, dst, overwrite=True)
    with pytest.raises(UserError, match=r"run/checkpoints.*another --dst"):
        to_diffusers.export(
            model.path, tmp_path / "run/checkpoints/4/x", checkpoint=str(tmp_path / "run")
        )


def test_dots_a_tilde_and_spaces(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "a b").symlink_to(source.parent)
    convert("x/../a b/wan", "~/x/../model")
    check("~/a b/wan", "x/../model")
    to_diffusers.export("~/model", "x/../a c/back")
    assert contents(tmp_path / "a c/back").keys() == contents(source).keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b", "a c", "model", "x"]


# ---- what is no folder ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind",
    [
        ("wan2.1_fp16.safetensors", "single-file"),
        ("Wan2.1_VAE.pth", "PyTorch"),
        ("wan-Q4.gguf", "GGUF"),
        ("readme", "a file"),
    ],
)
def test_files_are_no_hub_ids(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / name).write_text("")
    for src in (f"models/{name}", str(tmp_path / "models" / name)):
        with pytest.raises(UserError, match=rf"{kind}.*-Diffusers"):
            sources.source_folder(src)


@pytest.mark.parametrize(
    "src", ["a/b c", "a/b?x", "ä/ö:ü", "a//b", "-/..", "a/b--c", "a/b..c", "a/" + "b" * 120, ""]
)
def test_odd_hub_ids(src):
    with pytest.raises(UserError, match=r"hub id|'' cannot"):
        sources._download(src, None) if "--" in src or ".." in src or len(src) > 99 else convert(
            src, "x"
        )


def test_another_layout_is_refused_before_its_weights_are_downloaded(source, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repository, name, revision=None, local_files_only=False):
        assert not local_files_only
        asked.append((repository, name, revision))
        if "Diffusers" not in repository:
            raise EntryNotFoundError("404")
        return str(source / name)

    monkeypatch.setattr(hub, "unreachable", lambda: "")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, **kwargs: asked.append(kwargs) or str(source),
    )
    with pytest.raises(UserError, match=r"no model_index\.json.*Wan2\.1-T2V-14B-Diffusers"):
        sources.source_folder("Wan-AI/Wan2.1-T2V-14B")
    assert len(asked) == 1
    assert sources.source_folder("me/Wan-Diffusers", "abc") == source
    assert (
        asked[1] == ("me/Wan-Diffusers", "model_index.json", "abc")
        and asked[2]["revision"] == "abc"
    )
    assert "transformer/*.safetensors" in asked[2]["allow_patterns"]
    assert not any(p.startswith(("*", "transformer_2")) for p in asked[2]["allow_patterns"])
    with pytest.raises(UserError, match="--revision=abc is for hub ids"):
        sources.source_folder(str(source), "abc")


def test_without_a_network_the_cache_is_read_at_once(source, monkeypatch, tmp_path):
    """The hub is asked once, where nothing listens; the model is then found in the cache, or not."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    begun = time.monotonic()
    with pytest.raises(UserError) as refused:
        sources.source_folder("me/Wan-Diffusers")
    cached = tmp_path / "models--me--Wan-Diffusers"
    shutil.copytree(source, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert sources.source_folder("me/Wan-Diffusers") == cached / "snapshots" / "abc"
    assert time.monotonic() - begun < 5
    for words in ("me/Wan-Diffusers", "127.0.0.1:9", str(tmp_path), "--src", "HF_HUB_OFFLINE"):
        assert words in str(refused.value)


# ---- configurations, tokenizer and scheduler -----------------------------------------------------


@pytest.mark.parametrize(
    "component, field, value, message",
    [
        ("transformer", "num_layers", -1, "num_layers=-1: must be a whole number from 1"),
        ("transformer", "num_layers", "2", "num_layers='2': must be a whole number"),
        ("transformer", "num_layers", 10**9, "num_layers=1000000000: .* to 1024"),
        ("transformer", "num_layers", True, "num_layers=True"),
        ("transformer", "num_layers", None, "num_layers=None"),
        ("transformer", "patch_size", 0, "patch_size=0: must be a list of 3"),
        ("transformer", "patch_size", [1, 2, 0], r"patch_size=\[1, 2, 0\]: must be a whole number"),
        ("transformer", "eps", float("nan"), "eps=nan"),
        ("transformer", "eps", 0, "eps=0"),
        ("transformer", "freq_dim", 33, "freq_dim=33 must be even"),
        ("vae", "latents_std", [-1.0] * 16, "latents_std has -1.0"),
        ("vae", "latents_mean", [[1]] * 16, "latents_mean="),
        ("vae", "dim_mult", 4, "dim_mult=4: must be a list"),
        ("vae", "is_residual", "no", "is_residual='no': must be"),
        ("text_encoder", "layer_norm_epsilon", -1e-6, "layer_norm_epsilon=-1e-06"),
        ("text_encoder", "d_kv", 1.5, "d_kv=1.5: must be a whole number"),
    ],
)
def test_bad_fields(own, tmp_path, component, field, value, message):
    path = own / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    refused(own, tmp_path, rf"{component}/config\.json: .*{message}")


@pytest.mark.parametrize("content", [b"[1]", b"\xff\xfe", b"{", b"[" * 100000, b"null"])
@pytest.mark.parametrize(
    "name", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"]
)
def test_bad_json(own, tmp_path, name, content):
    (own / name).write_bytes(content)
    refused(own, tmp_path, rf"{name} is not valid")


@pytest.mark.parametrize(
    "changes",
    [
        {"boundary_ratio": "a"},
        {"boundary_ratio": True},
        {"boundary_ratio": 0.5},
        {"transformer_2": 1},
        {"expand_timesteps": "yes"},
    ],
)
def test_bad_index(own, tmp_path, changes):
    path = own / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(own, tmp_path, next(iter(changes)))


@pytest.mark.parametrize(
    "what, message",
    [
        ("loop", r"tokenizer/again is a link to .*folder"),
        ("link out", r"tokenizer/x is a link to /etc/hostname"),
        ("no tokenizer.json", "has no tokenizer.json"),
        ("garbage", "cannot be read as a T5 tokenizer"),
        ("no scheduler", r"scheduler_config.json does not exist"),
    ],
)
def test_bad_tokenizer_and_scheduler(own, tmp_path, what, message):
    folder = own / "tokenizer"
    if what == "loop":
        (folder / "again").symlink_to(folder)
    elif what == "link out":
        (folder / "x").symlink_to("/etc/hostname")
    elif what == "no tokenizer.json":
        (folder / "tokenizer.json").unlink()
    elif what == "garbage":
        (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    else:
        (own / "scheduler/scheduler_config.json").unlink()
    refused(own, tmp_path, message)


def test_links_inside_the_source_and_of_a_hub_cache_are_followed(own, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    shutil.copytree(own, snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    file = snapshot / "tokenizer" / "tokenizer.json"
    file.rename(tmp_path / "models--a--b" / "blobs" / "123")
    file.symlink_to("../../../blobs/123")
    assert file in sources.copied_files(snapshot)
    (own / "tokenizer" / "inner").symlink_to("tokenizer.json")
    assert own / "tokenizer" / "inner" in sources.copied_files(own)


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, dtype", [(np.float32, "bfloat16"), (np.float64, "source"), (np.float64, "float32")]
)
def test_a_model_with_overflow_is_not_converted(own, tmp_path, kind, dtype):
    path = own / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["proj_out.bias"] = weights["proj_out.bias"].astype(kind)
    weights["proj_out.bias"][1] = 3.4e38 if kind == np.float32 else 1e300
    save_file(weights, path)
    refused(own, tmp_path, r"tensor proj_out\.bias is float.*beyond the largest", dtype=dtype)


def rename_weights(folder, old, new, component="transformer"):
    (folder / component / old).rename(folder / component / new)


def test_a_variant_is_read_where_it_is_alone(own, tmp_path):
    stem = STEMS["transformer"]
    whole = Shards(own / "transformer", stem)
    rename_weights(own, f"{stem}.safetensors", f"{stem}.fp16.safetensors")
    assert Shards(own / "transformer", stem).shapes == whole.shapes
    shutil.copy(
        own / "transformer" / f"{stem}.fp16.safetensors",
        own / "transformer" / f"{stem}.bf16.safetensors",
    )
    refused(own, tmp_path, r"has the variants bf16, fp16 and no")
    shutil.copy(
        own / "transformer" / f"{stem}.fp16.safetensors",
        own / "transformer" / f"{stem}.safetensors",
    )
    assert Shards(own / "transformer", stem).files == whole.files


def test_a_variant_in_shards_with_a_wrong_total_size(own, capsys):
    folder, stem = own / "text_encoder", STEMS["text_encoder"]
    weights, weight_map = load_file(folder / f"{stem}.safetensors"), {}
    (folder / f"{stem}.safetensors").unlink()
    for i in (1, 2):
        name = f"{stem}.bf16-0000{i}-of-00002.safetensors"
        part = {k: weights[k] for k in sorted(weights)[i - 1 :: 2]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.bf16.json").write_text(json.dumps(index))
    shards = Shards(folder, stem)
    assert shards.shapes.keys() == weights.keys() and len(shards.files) == 3
    assert "warning: " in (err := capsys.readouterr().err) and "total_size is 1," in err


def test_pickled_weights_are_named(own, tmp_path):
    rename_weights(own, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    refused(own, tmp_path, r"holds only diffusion_pytorch_model\.bin.*save it as safetensors")


# ---- schedulers ----------------------------------------------------------------------------------

UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def scheduler(folder, values):
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(values))
    return load_scheduler(path)


def test_schedulers_are_read_by_class(tmp_path):
    for values, wanted in (
        (UNIPC, Scheduler("unipc", 1.0)),
        (EULER, Scheduler("flow_match_euler", 1.0)),
        (UNIPC | {"flow_shift": 5, "solver_order": 1}, Scheduler("unipc", 5.0, 1)),
        (EULER | {"shift": 8.0}, Scheduler("flow_match_euler", 8.0)),
    ):
        assert scheduler(tmp_path, values) == wanted


@pytest.mark.parametrize(
    "values, named",
    [
        (UNIPC | {"solver_order": 3}, "solver_order=3"),
        (UNIPC | {"solver_type": "bh1"}, "solver_type='bh1': only 'bh2'"),
        (UNIPC | {"final_sigmas_type": "sigma_min"}, "final_sigmas_type="),
        (UNIPC | {"flow_shift": 0}, "flow_shift=0"),
        (UNIPC | {"lower_order_final": False}, "lower_order_final="),
        (UNIPC | {"flow_shift": "3"}, "flow_shift='3'"),
        (UNIPC | {"disable_corrector": [0]}, r"disable_corrector=\[0\]"),
        (UNIPC | {"use_dynamic_shifting": True}, "use_dynamic_shifting="),
        (UNIPC | {"prediction_type": "epsilon"}, "prediction_type="),
        (EULER | {"use_dynamic_shifting": True}, "dynamic"),
        ({"_class_name": "UniPCMultistepScheduler"}, "prediction_type='epsilon'"),
        (EULER | {"shift_terminal": 0.1}, "shift_terminal="),
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({}, "_class_name=None"),
    ],
)
def test_other_schedulers_are_refused(tmp_path, values, named):
    with pytest.raises(ConfigError, match=rf"scheduler_config\.json.*{named}"):
        scheduler(tmp_path, values)


def test_every_field_is_checked():
    """A field's value of any other type is refused, whichever field."""
    for cls, *_ in model_dir.COMPONENTS.values():
        for field in cls.__dataclass_fields__:
            for odd in ({}, float("inf"), -5, "text of no meaning"):
                with pytest.raises(ConfigError):
                    from_dict(cls, {field: odd})
    assert from_dict(TransformerConfig, {}).num_layers == 40
