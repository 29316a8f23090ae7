"""LoRA files merged into a model while it is loaded, and those that a checkpoint's base had."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from convert.from_diffusers import convert
from tests import lora_forms, tiny
from wan_jax.distributed.mesh import make_mesh
from wan_jax.errors import UserError
from wan_jax.models import flat_params
from wan_jax.storage import lora_files, lora_names, merged_loras, model_dir
from wan_jax.storage.checkpoint import Checkpoints
from wan_jax.storage.trained_weights import load_transformers

BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def model(folders):
    return model_dir.open_model(folders[1])


@pytest.fixture(scope="module")
def kernels(model):
    return lora_names.dense_layers(model.config("transformer"))


@pytest.fixture(scope="module")
def base(model):
    return weights_of(model)


@pytest.fixture
def file(kernels, tmp_path):
    """(path, what it adds) of a file of a distilled model."""
    return write(tmp_path / "distilled.safetensors", kernels)


def write(path, kernels, **how):
    tensors, added = lora_forms.distilled(kernels, **how)
    save_file(tensors, path)
    return path, added


def write_biases(folder, kernels):
    """Write PEFT's folder of an adapter with `lora_bias`, whose bias the scale multiplies."""
    pairs = lora_forms.factors(kernels)
    tensors = lora_forms.tensors_of(pairs, prefix="base_model.model.")
    rng = np.random.default_rng(3)
    for key in [key for key in tensors if "lora_B" in key]:
        bias = rng.standard_normal(len(tensors[key])).astype(np.float32)
        tensors[key.replace("weight", "bias")] = bias
    settings = lora_forms.SETTINGS | {"peft_type": "LORA", "lora_bias": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def weights_of(model, expert="transformer", **how):
    return arrays(model_dir.build(expert, model, **how)[1])


def arrays(state):
    return {path: np.asarray(x) for path, x in flat_params.flatten(state).items()}


def loaded(model, checkpoint=None, expert=0):
    mesh = make_mesh(devices=jax.devices()[:1])
    _, weights = load_transformers(model, checkpoint, jnp.float32, "xla", mesh, "never")
    return arrays(weights(expert))


def sum_of(base, *scaled):
    """Return the base with changes, (what a file adds, scale) each, in float64."""
    result = {path: value.astype(np.float64) for path, value in base.items()}
    for added, scale in scaled:
        for path, layers in added.items():
            for layer, value in layers.items():
                result[path][... if layer is None else layer] += scale * value
    return result


def assert_close(found, wanted, tolerance=1e-6):
    """All parameters, relative to the norm of each: rounding of one float32 sum."""
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        error = np.linalg.norm(found[path].astype(np.float64) - value)
        assert error <= tolerance * np.linalg.norm(value), path


def save_run(folder, model, trained, experts=("transformer",), **meta):
    values = {
        "config": {"model": {"dtype": "float32"}},
        "model": str(model.path),
        "model_digest": model.fingerprint,
        "experts": list(experts),
        "lora": None,
        "loras": [lora.record for lora in model.loras],
    }
    Checkpoints(folder).save(1, {"trainable": trained}, trained, values | meta)
    return folder


# ---- what is merged ------------------------------------------------------------------------------


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("form", lora_forms.FORMS)
def test_every_form_changes_the_kernels_that_it_names(model, base, kernels, tmp_path, form):
    path, wanted = lora_forms.write_form(tmp_path, kernels, form)
    added: dict = {}
    for module, delta in wanted.items():
        layer, index = lora_names.modules(kernels)[module]
        added.setdefault(f"{layer}/kernel", {})[index] = delta
    merged = merged_loras.merge(model, [f"{path}:0.5"])
    assert_close(weights_of(merged), sum_of(base, (added, 0.5)))


def test_weights_biases_norms_and_modulation_are_changed(model, base, file):
    path, added = file
    merged = merged_loras.merge(model, [str(path)])
    wanted = sum_of(base, (added, 1))
    assert_close(weights_of(merged), wanted)
    assert len([p for p in base if np.any(base[p] != wanted[p])]) == len(added)


def test_files_add_up_with_their_scales(model, base, kernels, file, tmp_path):
    path, added = file
    other, added_too = write(tmp_path / "a:b.safetensors", kernels, rank=2, seed=5)
    merged = merged_loras.merge(model, [f"{path}:-0.25", str(other)])
    assert [lora.scale for lora in merged.loras] == [-0.25, 1.0]
    assert_close(weights_of(merged), sum_of(base, (added, -0.25), (added_too, 1)))


@pytest.mark.parametrize("axes", [{"fsdp": 2}, {"fsdp": 4}])
def test_shards_of_a_merged_model_are_those_of_the_whole(model, file, axes):
    merged = merged_loras.merge(model, [str(file[0])])
    sharded = weights_of(merged, mesh=make_mesh(**axes, devices=jax.devices()[: axes["fsdp"]]))
    assert_close(sharded, weights_of(merged))


def test_the_sum_is_rounded_once_and_the_loss_is_printed(model, base, file, capsys):
    """A small change is lost in bfloat16 for a large part; of one array the exact bits."""
    path, added = file
    for scale, low, high in ((1e-4, 50, 100), (1.0, 0.01, 2)):
        state = weights_of(merged_loras.merge(model, [f"{path}:{scale}"]), dtype=jnp.bfloat16)
        out = capsys.readouterr().out
        share = float(out.split("rounding lost ")[1].split(" %")[0])
        assert f"distilled.safetensors:{scale:g}" in out and low < share <= high, out
        kernel, change = "blocks/ffn/net_2/kernel", added["blocks/ffn/net_2/kernel"]
        exact = base[kernel][1] + np.float32(scale) * change[1]
        assert state[kernel].dtype == BF16
        assert np.mean(state[kernel][1] != exact.astype(BF16)) < 0.01  # the product's last bit
    weights_of(merged_loras.merge(model, [str(path)]))
    assert "rounding lost 0 %" in capsys.readouterr().out


@pytest.mark.quick_cases(1)
@pytest.mark.parity
@pytest.mark.parametrize("form", ["PEFT", "PEFT with biases", "kohya", "distilled"])
def test_the_model_is_that_of_diffusers_and_peft(folders, model, kernels, tmp_path, form):
    """The output of the transformer, to 1e-5; all other forms have equal kernels."""
    import diffusers
    import peft
    import torch

    if form == "distilled":
        path, _ = write(tmp_path / "x.safetensors", kernels, norms=False)
    elif form == "PEFT with biases":
        path = write_biases(tmp_path, kernels)
    else:
        path, _ = lora_forms.write_form(tmp_path, kernels, form)
    pipe = diffusers.WanPipeline.from_pretrained(folders[0])
    theirs = pipe.transformer
    if form.startswith("PEFT"):
        theirs = peft.PeftModel.from_pretrained(theirs, str(path))
    else:
        pipe.load_lora_weights(str(path))
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((2, 2, 4, 6, 16)).astype(np.float32)
    text = rng.standard_normal((2, 7, 24)).astype(np.float32)
    times = np.array([930.0, 250.0], np.float32)
    with torch.no_grad():
        given = latents.transpose(0, 4, 1, 2, 3).copy(), times, text
        out = theirs(*map(torch.from_numpy, given)).sample.numpy().transpose(0, 2, 3, 4, 1)
    compute = nnx.jit(lambda module: module(latents, times, text))
    ours, before = (
        np.asarray(compute(nnx.merge(*model_dir.build("transformer", m, attention="xla"))))
        for m in (merged_loras.merge(model, [str(path)]), model)
    )
    assert np.linalg.norm(out - ours) < 1e-5 * np.linalg.norm(out)
    assert np.linalg.norm(before - ours) > 0.05 * np.linalg.norm(out)


# ---- two experts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    source = tiny.write_pipeline(root / "source", seed=5, boundary=0.875)
    convert(str(source), root / "model", "float32")
    return model_dir.open_model(root / "model")


@pytest.mark.slow
def test_each_expert_has_its_file(pair, kernels, tmp_path):
    (high, added_high), (low, added_low) = (
        write(tmp_path / f"{seed}.safetensors", kernels, seed=seed) for seed in (0, 1)
    )
    for text, scales in (
        (f"{high},{low}:2", (2, 2)),
        (f"{high},", (1, 0)),
        (f" ,{low}:0.5", (0, 0.5)),
    ):
        merged = merged_loras.merge(pair, [text])
        for expert, added, scale in zip(pair.experts, (added_high, added_low), scales):
            wanted = sum_of(weights_of(pair, expert), (added, scale))
            assert_close(weights_of(merged, expert), wanted)
    with pytest.raises(UserError, match=r"is for transformer, the model has transformer and"):
        merged_loras.merge(pair, [str(high)])
    with pytest.raises(UserError, match="names 3 files"):
        merged_loras.merge(pair, [f"{high},{low},{low}"])


def test_one_file_for_both_experts(pair, kernels, tmp_path):
    high, low = (lora_forms.factors(kernels, seed=seed) for seed in (0, 1))
    tensors = lora_forms.tensors_of(high) | lora_forms.tensors_of(low, "transformer_2.")
    save_file(tensors, tmp_path / "both.safetensors")
    merged = merged_loras.merge(pair, [str(tmp_path / "both.safetensors")])
    for expert, (a, b) in zip(pair.experts, (x["blocks.1.attn2.to_v"] for x in (high, low))):
        kernel, old = (weights_of(m, expert)["blocks/attn2/to_v/kernel"][1] for m in (merged, pair))
        np.testing.assert_allclose(kernel, old + a @ b, atol=1e-6)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("{file}:0", "scale 0 must be a finite number other than 0"),
        ("{file}:nan", "scale nan"),
        (":1", "names no file"),
        ("/nowhere.safetensors:2", "/nowhere.safetensors does not exist"),
        ("{file},{file}", "names 2 files"),
    ],
)
def test_what_names_no_file_or_scale_is_refused(model, file, text, message):
    with pytest.raises(UserError, match=message):
        merged_loras.merge(model, [text.format(file=file[0])])


@pytest.mark.parametrize(
    "added, message",
    [
        (
            {"img_emb.proj.1.lora_down.weight": (4, 8), "x.lora_up.weight": (8, 4)},
            "img_emb.*x.lora",
        ),
        ({"blocks.7.norm3.diff": (48,)}, r"blocks\.7\.norm3\.diff.*no such parameter"),
        ({"blocks.0.norm3.diff": (47,)}, r"norm3\.diff.*\(47,\).*\(48,\)"),
        ({"blocks.0.self_attn.q.dora_scale": (48,)}, "dora_scale"),
    ],
)
def test_tensors_without_a_place_are_named(model, kernels, tmp_path, added, message):
    tensors, _ = lora_forms.distilled(kernels, norms=False)
    odd = {f"diffusion_model.{k}": np.ones(shape, np.float32) for k, shape in added.items()}
    save_file(tensors | odd, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=message):
        merged_loras.merge(model, [str(tmp_path / "odd.safetensors")])


def test_a_file_that_changes_nothing_is_refused(model, tmp_path):
    zeros = {"diffusion_model.blocks.0.norm3.diff": np.zeros(48, np.float32)}
    save_file(zeros, tmp_path / "zeros.safetensors")
    with pytest.raises(UserError, match=r"zeros\.safetensors holds no LoRA factor"):
        merged_loras.merge(model, [str(tmp_path / "zeros.safetensors")])


def test_adapters_with_differences_are_merged_and_not_trained(kernels, file):
    with pytest.raises(UserError, match=r"config\.model\.loras"):
        lora_files.read(file[0], kernels)


# ---- checkpoints ---------------------------------------------------------------------------------


ADAPTERS = {"rank": 2, "alpha": 2.0, "targets": ["to_q"]}


@pytest.fixture
def run(model, file, tmp_path):
    """A run on a merged base, with adapters."""
    merged = merged_loras.merge(model, [f"{file[0]}:0.5"])
    shapes = {"lora_a": (2, 48, 2), "lora_b": (2, 2, 48)}
    trained = {
        f"blocks/{attention}/to_q/{factor}": np.full(shape, 0.1, np.float32)
        for attention in ("attn1", "attn2")
        for factor, shape in shapes.items()
    }
    return save_run(tmp_path / "run", merged, trained, lora=ADAPTERS)


def kernels_of(flat):
    return {path: value for path, value in flat.items() if not path.endswith(("lora_a", "lora_b"))}


def test_sampling_merges_what_the_runs_base_had(model, base, file, run, kernels, tmp_path):
    path, added = file
    with pytest.raises(UserError, match=r"distilled\.safetensors:0\.5 merged"):
        loaded(model, str(run))
    wanted = sum_of(base, (added, 0.5))
    merged = merged_loras.merge_with_checkpoint(model, run, None)
    assert_close(kernels_of(loaded(merged, str(run))), wanted)
    # another one in addition, from the same command
    other, added_too = write(tmp_path / "other.safetensors", kernels, seed=5)
    both = merged_loras.merge_with_checkpoint(model, run, [f"{other}:2"])
    assert_close(kernels_of(loaded(both, str(run))), sum_of(base, (added, 0.5), (added_too, 2)))
    # moved: the flag says where it is, with the scale of the run
    moved = path.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"distilled\.safetensors does not exist.*--lora=FILE"):
        merged_loras.merge_with_checkpoint(model, run, [str(other)])
    found = merged_loras.merge_with_checkpoint(model, run, [str(moved)])
    assert [(lora.files, lora.scale) for lora in found.loras] == [((str(moved),), 0.5)]
    assert_close(kernels_of(loaded(found, str(run))), wanted)
    with pytest.raises(UserError, match=r"moved\.safetensors:1.* scale 0\.5, not 1"):
        merged_loras.merge_with_checkpoint(model, run, [f"{moved}:1"])
    # changed
    write(path, kernels, seed=9)
    with pytest.raises(UserError, match=r"distilled\.safetensors:0\.5 has changed"):
        merged_loras.merge_with_checkpoint(model, run, None)


@pytest.mark.slow
def test_trained_weights_hold_what_their_base_had(model, base, file, kernels, tmp_path):
    """They are sampled without the run's LoRAs, and others are added to them."""
    path, added = file
    trained = {k: v.astype(np.float32) for k, v in sum_of(base, (added, 1)).items()}
    merged = merged_loras.merge(model, [str(path)])
    run = save_run(tmp_path / "run", merged, trained)
    path.unlink()
    alone = merged_loras.merge_with_checkpoint(model, run, None)
    assert not alone.loras
    assert_close(loaded(alone, str(run)), sum_of(trained))
    other, added_too = write(tmp_path / "other.safetensors", kernels, seed=5)
    more = merged_loras.merge_with_checkpoint(model, run, [f"{other}:0.5"])
    assert_close(loaded(more, str(run)), sum_of(trained, (added_too, 0.5)))


def test_an_expert_that_was_not_trained_needs_its_lora(pair, kernels, tmp_path):
    """All weights of the other one were trained."""
    path, added = write(tmp_path / "low.safetensors", kernels)
    merged = merged_loras.merge(pair, [f",{path}"])
    trained = {k: v + 1 for k, v in weights_of(pair).items()}
    run = save_run(tmp_path / "run", merged, trained)
    again = merged_loras.merge_with_checkpoint(pair, run, None)
    assert_close(
        loaded(again, str(run), expert=1), sum_of(weights_of(pair, "transformer_2"), (added, 1))
    )
    path.unlink()
    with pytest.raises(UserError, match=r"low\.safetensors does not exist"):
        merged_loras.merge_with_checkpoint(pair, run, None)


def test_a_digest_follows_the_content(kernels, tmp_path):
    folder, _ = lora_forms.write_form(tmp_path, kernels, "PEFT")
    settings = folder / "adapter_config.json"
    before = merged_loras.find([str(folder)], "--lora")
    (same,) = merged_loras.find([str(folder / "adapter_model.safetensors:1.0")], "--lora")
    assert same.identity == before[0].identity
    settings.write_text(settings.read_text().replace("6.0", "7.0"))
    assert merged_loras.find([str(folder)], "--lora")[0].digest != same.digest
