"""A converted model: its properties, and the errors for folders that are none."""

import dataclasses
import json
import shutil

import jax
import pytest

from wan_jax.errors import UserError
from wan_jax.models import flat_params
from wan_jax.storage import model_dir


@pytest.fixture
def model(folders):
    return model_dir.open_model(folders[1])


def test_properties(model):
    assert model.components == ("transformer", "vae", "text_encoder")
    assert model.experts == ("transformer",) and model.boundary is None
    assert model.metadata == {"wan_jax_model": model.fingerprint}
    assert model.config("transformer").num_layers == 2


@pytest.mark.slow
def test_weights_have_the_structure_and_dtypes_of_the_module(model):
    _, like = model_dir.abstract("vae", model.config("vae"))
    _, state = model_dir.build("vae", model)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    stored = model.arrays("vae")
    for path, x in flat_params.flatten(state).items():
        assert (x == stored.read(path)).all(), path


def test_a_copy_has_the_same_fingerprint(model, tmp_path):
    copy = model_dir.open_model(shutil.copytree(model.path, tmp_path / "copy"))
    assert copy.fingerprint == model.fingerprint


def test_what_belongs_to_another_model_is_refused(model, capsys):
    model.check_same(model.fingerprint, "models/a", "checkpoint x")
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match=f"checkpoint x .*models/a .*{model.path}"):
        model.check_same("0" * 64, "models/a", "checkpoint x")
    model.check_same(None, "models/a", "checkpoint x")
    dataclasses.replace(model, manifest={}).check_same("0" * 64, "models/a", "checkpoint x")
    assert capsys.readouterr().out.count("checkpoint x") == 2


def test_folders_that_are_no_model_are_named(folders, tmp_path):
    def refused(path):
        with pytest.raises(UserError) as caught:
            model_dir.open_model(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    refused(tmp_path / "nowhere")
    assert "convert.from_diffusers" in refused(folders[0])
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty")
    (tmp_path / ".moved.previous").mkdir()
    assert ".moved.previous" in refused(tmp_path / "moved")


@pytest.mark.parametrize(
    "name", ["vae/config.json", "model_index.json", "scheduler/scheduler_config.json"]
)
def test_a_changed_file_is_named(model, tmp_path, name):
    copy = shutil.copytree(model.path, tmp_path / "copy")
    content = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(content | {"_changed": 1}))
    with pytest.raises(UserError, match=name):
        model_dir.open_model(copy)
