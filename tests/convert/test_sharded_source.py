"""Sources whose tensors are in several files, and the index that names these."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from convert.from_diffusers import check, convert
from convert.plan import STEMS
from wan_jax.command_line.cli import UserError


def shard(folder, component="transformer", parts=3):
    """Splits a component's file as Diffusers does; returns the index's path."""
    whole = folder / component / f"{STEMS[component]}.safetensors"
    weights, weight_map = load_file(whole), {}
    for i in range(parts):
        name = f"{STEMS[component]}-{i + 1:05d}-of-{parts:05d}.safetensors"
        part = {k: weights[k] for k in sorted(weights)[i::parts]}
        save_file(part, folder / component / name)
        weight_map |= dict.fromkeys(part, name)
    whole.unlink()
    index = {
        "metadata": {"total_size": sum(v.nbytes for v in weights.values())},
        "weight_map": weight_map,
    }
    path = folder / component / f"{STEMS[component]}.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def test_sharded_source(own, source, tmp_path):
    shard(own)
    convert(str(own), tmp_path / "sharded")
    check(str(source / "."), tmp_path / "sharded")


def change_index(path, what):
    index = json.loads(path.read_text())
    names = sorted(set(index["weight_map"].values()))
    if what == "other file":
        index["weight_map"]["proj_out.bias"] = next(
            n for n in names if n != index["weight_map"]["proj_out.bias"]
        )
    elif what == "not in the files":
        index["weight_map"]["blocks.9.norm2.bias"] = names[0]
    elif what == "not in the index":
        del index["weight_map"]["proj_out.bias"]
    elif what == "no file":
        index["weight_map"]["proj_out.bias"] = "other.safetensors"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "what, message",
    [
        ("other file", r"proj_out.bias is in .*safetensors, but it is in .*safetensors"),
        (
            "not in the files",
            r"blocks.9.norm2.bias is in .*00001-of-00003.safetensors, but it is in no file",
        ),
        ("not in the index", "proj_out.bias is in no file, but"),
        ("no file", "other.safetensors is missing"),
    ],
)
def test_an_index_that_does_not_agree(own, tmp_path, what, message):
    change_index(shard(own), what)
    with pytest.raises(UserError, match=message):
        convert(str(own), tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]
