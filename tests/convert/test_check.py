"""Tests of `--check`: every difference of a model folder from its source is found and named."""

import shutil
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.from_diffusers import check, convert
from tests import commands
from wan_jax.errors import UserError
from wan_jax.storage import array_store, model_dir


def rewrite(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def change_store(path, fault):
    """Changes a component's stored arrays."""
    store = array_store.ArrayStore(path)
    if fault == "flipped bit":
        (file,) = store.chunk_files("blocks/ffn/net_2/kernel", 1)
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    elif fault == "truncated":
        (file,) = store.chunk_files("proj_out/kernel")
        file.write_bytes(file.read_bytes()[:-2])
    else:
        arrays = {
            k: (shape, store.dtypes[k], k.startswith("blocks/"))
            for k, shape in store.shapes.items()
        }
        values = {k: store.read(k) for k in arrays}
        if fault == "missing tensor":
            del arrays["blocks/ffn/net_2/kernel"]
        elif fault == "unknown tensor":
            arrays["extra"], values["extra"] = ((3,), np.float32, False), np.zeros(3, np.float32)
        elif fault == "other dtype":
            arrays["proj_out/kernel"] = (store.shapes["proj_out/kernel"], np.float32, False)
        shutil.rmtree(path)
        changed = array_store.create(path, arrays)
        for name, (shape, dtype, stacked) in arrays.items():
            for layer in range(shape[0]) if stacked else [None]:
                changed.write(
                    name, values[name][... if layer is None else layer].astype(dtype), layer
                )


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "fault, message",
    [
        (
            "flipped bit",
            r"blocks/ffn/net_2/kernel\[1\] \(blocks.1.ffn.net.2.weight\): 1 values differ, the first is",
        ),
        ("missing tensor", "blocks/ffn/net_2/kernel is missing, expected bfloat16"),
        ("unknown tensor", r"extra is float32 \[3\], expected nothing"),
        ("other dtype", r"proj_out/kernel is float32 .*, expected bfloat16"),
        ("truncated", r"missing or truncated \(proj_out/kernel\)"),
        ("config", "vae/config.json is missing or differs"),
        ("tokenizer", "tokenizer/.* is missing or differs"),
    ],
)
def test_check_finds(source, own_model, fault, message):
    dst = own_model
    if fault == "config":
        (dst / "vae/config.json").write_text("{}")
    elif fault == "tokenizer":
        next(p for p in (dst / "tokenizer").iterdir()).unlink()
    else:
        change_store(model_dir.params_path(dst, "transformer"), fault)
    with pytest.raises(UserError, match=message) as caught:
        check(str(source), dst)
    assert "in 1 places" in str(caught.value)


def test_check_finds_what_changed_in_the_source(own, tmp_path):
    convert(str(own), tmp_path / "model")
    check(str(own), tmp_path / "model")
    path = own / "vae" / "diffusion_pytorch_model.safetensors"
    rewrite(path, lambda w: w["quant_conv.bias"].__setitem__(3, 7.0))
    command = commands.command(
        "convert.from_diffusers", f"--src={own}", f"--dst={tmp_path / 'model'}", "--check"
    )
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=commands.environment()
    )
    assert (
        done.returncode == 1 and "quant_conv/bias (quant_conv.bias): 1 values differ" in done.stderr
    )
    assert "should be 7.0" in done.stderr and "Traceback" not in done.stderr
    rewrite(path, lambda w: w.pop("quant_conv.bias"))
    with pytest.raises(UserError, match=r"1 missing \(quant_conv.bias\)"):
        check(str(own), tmp_path / "model")


def test_a_check_reads_no_settings_of_a_conversion(own, tmp_path):
    """The type that is compared is that of the folder, whatever --dtype says."""
    command = commands.command(
        "convert.from_diffusers", f"--src={own}", f"--dst={tmp_path}", "--check", "--dtype=float32"
    )
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=commands.environment()
    )
    assert done.returncode == 1 and "--dtype has no effect" in done.stderr
