"""Exports of models into which LoRAs are merged, with and without a run."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.to_diffusers import export
from tests import lora_forms
from wan_jax.storage import key_table, lora_names, merged_loras, model_dir
from wan_jax.storage.checkpoint import Checkpoints

BF16 = ml_dtypes.bfloat16
KERNEL, NORM = "blocks/ffn/net_2/kernel", "blocks/norm2/scale"


@pytest.fixture
def model(converted):
    return model_dir.open_model(converted)


@pytest.fixture
def file(model, tmp_path):
    """(path, what it adds)."""
    kernels = lora_names.dense_layers(model.config("transformer"))
    tensors, added = lora_forms.distilled(kernels)
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors", added


def base_of(model):
    store = model.arrays("transformer")
    return {path: store.read(path).astype(np.float32) for path in store.shapes}


def exported(model, folder, *args, **kwargs):
    """The transformer of an export, in our layout."""
    export(model.path, folder, *args, **kwargs)
    tensors = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    return key_table.to_ours("transformer", tensors, model.arrays("transformer").shapes)


def save_run(folder, model, trained, lora):
    meta = {"config": {"model": {"dtype": "bfloat16"}}, "model": str(model.path), "lora": lora}
    meta |= {"experts": ["transformer"], "loras": [x.record for x in model.loras]}
    Checkpoints(folder).save(1, {"trainable": trained}, trained, meta)
    return str(folder)


def test_a_model_with_a_lora_is_rounded_once(model, file, tmp_path, capsys):
    path, added = file
    for dtype, kind in (("float32", np.float32), ("stored", BF16)):
        found = exported(model, tmp_path / dtype, dtype=dtype, loras=[f"{path}:0.5"])
        for name in (KERNEL, NORM):
            layer = max(added[name])
            wanted = base_of(model)[name][layer] + 0.5 * added[name][layer]
            # one unit of the last place, where the product's own rounding decides
            np.testing.assert_allclose(
                found[name][layer].astype(np.float32),
                wanted.astype(kind).astype(np.float32),
                rtol=2.0**-7 if kind == BF16 else 1e-5,
                atol=1e-6,
            )
        assert found[KERNEL].dtype == kind and f"{path}:0.5" in capsys.readouterr().out


def test_adapters_are_added_to_the_base_as_the_run_rounded_it(model, file, tmp_path):
    """The run computed in bfloat16: in float32 the export is its merged base and A B."""
    path, _ = file
    rng = np.random.default_rng(0)
    trained = {
        "blocks/ffn/net_2/lora_a": rng.standard_normal((2, 48, 2)).astype(np.float32),
        "blocks/ffn/net_2/lora_b": rng.standard_normal((2, 2, 48)).astype(np.float32),
    }
    merged = merged_loras.merge(model, [str(path)])
    settings = {"rank": 2, "alpha": 1.0, "targets": ["ffn.net.2"]}
    run = save_run(tmp_path / "run", merged, trained, settings)
    found = exported(model, tmp_path / "out", run, dtype="float32")
    _, state = model_dir.build("transformer", merged, dtype=BF16)
    kernel = np.asarray(state["blocks"]["ffn"]["net_2"]["kernel"][...])
    assert kernel.dtype == BF16
    product = 0.5 * (trained["blocks/ffn/net_2/lora_a"] @ trained["blocks/ffn/net_2/lora_b"])
    np.testing.assert_allclose(found[KERNEL], kernel.astype(np.float32) + product, atol=1e-6)
    norm = np.asarray(state["blocks"]["norm2"]["scale"][...])
    np.testing.assert_allclose(found[NORM], norm, atol=1e-6)


@pytest.mark.slow
def test_trained_weights_are_written_without_what_their_base_had(model, file, tmp_path):
    path, added = file
    trained = {name: value + 1 for name, value in base_of(model).items()}
    run = save_run(tmp_path / "run", merged_loras.merge(model, [str(path)]), trained, None)
    found = exported(model, tmp_path / "out", run, dtype="float32")
    np.testing.assert_array_equal(found[KERNEL], trained[KERNEL])
    # another one is added to them
    other = save_run(tmp_path / "other", model, trained, None)
    more = exported(model, tmp_path / "more", other, dtype="float32", loras=[str(path)])
    np.testing.assert_allclose(more[NORM][0], trained[NORM][0] + added[NORM][0], atol=1e-6)
