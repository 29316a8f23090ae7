"""Runs whose base has a LoRA merged (`model.loras`): training, going on, export, evaluation, plan."""

import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import export_lora, to_diffusers
from grpo import plan
from grpo.settings import parse
from tests import commands, lora_forms
from tests.grpo import tiny_run
from tests.grpo.here import train_here
from wan_jax.distributed.mesh import make_mesh
from wan_jax.errors import UserError
from wan_jax.models import flat_params
from wan_jax.storage import key_table, lora_names, merged_loras, model_dir
from wan_jax.storage.trained_weights import load_trained, load_transformers


def here(config, *overrides):
    return train_here(config, *tiny_run.MEASURES, *tiny_run.PICTURE, *overrides)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """(config, run folder, LoRA file, what it adds) of an epoch on a base with half of the LoRA."""
    root = tmp_path_factory.mktemp("merged")
    config, run = tiny_run.write_recipe(model, root)
    opened = model_dir.open_model(model)
    tensors, added = lora_forms.distilled(lora_names.dense_layers(opened.config("transformer")))
    path = root / "distilled.safetensors"
    save_file(tensors, path)
    here(config, "epochs=1", f"model.loras={path}:0.5")
    return config, run, path, added


def effective(model, run, loras):
    """The weights that a checkpoint is sampled with, its adapters multiplied out."""
    mesh = make_mesh(devices=jax.devices()[:1])
    merged = merged_loras.merge_with_checkpoint(model_dir.open_model(model), run, loras)
    _, weights = load_transformers(merged, str(run), jnp.float32, "xla", mesh, "never")
    flat = {k: np.asarray(v) for k, v in flat_params.flatten(weights(0)).items()}
    settings, _, _ = load_trained(run)
    for path in [k for k in flat if k.endswith("lora_a")]:
        layer = path.removesuffix("/lora_a")
        a, b = flat.pop(path), flat.pop(f"{layer}/lora_b")
        flat[f"{layer}/kernel"] = flat[f"{layer}/kernel"] + settings.scale * (a @ b)
    return flat


@pytest.mark.slow
def test_the_policy_of_epoch_0_is_the_merged_model(trained, model):
    """And not the model in the folder; adapters start without effect."""
    _, run, _, added = trained
    flat = effective(model, run / "checkpoints" / "0", ())
    base = flat_params.flatten(model_dir.build("transformer", model_dir.open_model(model))[1])
    for name, layers in added.items():
        for layer, value in layers.items():
            at = ... if layer is None else layer
            np.testing.assert_allclose(
                flat[name][at], base[name][at] + 0.5 * value, atol=1e-5, err_msg=name
            )


@pytest.mark.slow
def test_a_run_on_a_merged_base_goes_on_and_is_exported(trained, model, tmp_path, capsys):
    config, run, path, added = trained
    (record,) = load_trained(run)[2]["loras"]
    assert record["scale"] == 0.5 and record["files"] == [str(path)] and len(record["digest"]) == 64
    # the same content continues wherever it is; another scale, or none, does not
    moved = path.rename(tmp_path / "moved.safetensors")
    for override in (f"model.loras={moved}", "epochs=2"):
        with pytest.raises(UserError, match=rf"model\.loras: \['{record['digest'][:12]}:0\.5'\]"):
            here(config, "epochs=2", override)
    here(config, "epochs=2", f"model.loras={moved}:0.5")
    out = capsys.readouterr().out
    assert "continuing" in out and f"merged {moved}:0.5" in out and tiny_run.newest(run) == 2
    # what is exported is what is sampled: base + LoRA + adapters
    wanted = effective(model, run, ())
    to_diffusers.export(model, tmp_path / "out", str(run))
    exported = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    ours = key_table.to_ours("transformer", exported, {k: v.shape for k, v in wanted.items()})
    base = flat_params.flatten(model_dir.build("transformer", model_dir.open_model(model))[1])
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-6, err_msg=name)
        assert name not in added or np.abs(value - base[name]).max() > 1e-3, name
    # the LoRA file has the trained part only, and says so
    capsys.readouterr()
    (file,) = export_lora.export(run, model, tmp_path / "lora").values()
    assert f"{moved}:0.5" in capsys.readouterr().out and len(load_file(file)) == 2 * 8 * 2


@pytest.mark.slow
def test_evaluation_asks_for_what_the_checkpoints_base_had(trained):
    config, run, _, _ = trained
    command = commands.command(
        "grpo.evaluate", f"--config={config}", f"--checkpoint={run}", f"--out={run}-eval"
    )
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=commands.environment()
    )
    assert done.returncode == 1 and "config.model.loras" in done.stderr, done.stderr
    assert ":0.5 merged" in done.stderr and "Traceback" not in done.stderr


def test_the_plan_checks_the_files(recipe):
    """Where the model's folder is on this machine."""
    text = recipe[0].read_text()
    config = tiny_run.config_of(text, **{"model.loras": ("/nowhere.safetensors",)})
    with pytest.raises(UserError, match=r"/nowhere\.safetensors does not exist"):
        plan.choose_model(parse.recipe_from_config(config), None)


def test_training_refuses_a_missing_file_before_it_compiles(recipe):
    with pytest.raises(UserError, match=r"/nowhere\.safetensors does not exist"):
        here(recipe[0], "model.loras=/nowhere.safetensors:2")
    assert not (recipe[1] / "checkpoints").exists()
