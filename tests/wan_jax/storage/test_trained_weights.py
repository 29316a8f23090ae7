"""The weights of a checkpoint, and the transformers with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.distributed.mesh import make_mesh
from wan_jax.errors import UserError
from wan_jax.models import flat_params
from wan_jax.models.quantised import Quantisation
from wan_jax.storage import model_dir
from wan_jax.storage.checkpoint import Checkpoints
from wan_jax.storage.trained_weights import base_note, load_trained, load_transformers

LORA = {"rank": 4, "alpha": 4.0, "targets": ["attention"]}


def save(run, model, trained, **meta):
    values = {"config": {}, "model": str(model.path), "experts": ["transformer"], "lora": None}
    Checkpoints(run).save(3, {"trainable": trained}, trained, values | meta)
    return str(run)


def load(model, checkpoint):
    mesh = make_mesh(devices=jax.devices()[:1])
    _, weights = load_transformers(model, checkpoint, jnp.float32, "xla", mesh, "never")
    return flat_params.flatten(weights(0))


@pytest.fixture(scope="module")
def model(folders):
    return model_dir.open_model(folders[1])


@pytest.fixture(scope="module")
def base(model):
    return load(model, None)


@pytest.mark.slow
def test_all_weights_of_a_checkpoint_replace_those_of_the_model(model, base, tmp_path):
    trained = {path: x + 1 for path, x in base.items()}
    run = save(tmp_path / "run", model, trained, model_digest=model.fingerprint)
    lora, experts, meta = load_trained(run)
    assert lora is None and list(experts) == ["transformer"] and meta["epoch"] == 3
    for path, x in load(model, run).items():
        np.testing.assert_array_equal(x, trained[path], err_msg=path)


@pytest.mark.parametrize(
    "change, value",
    [
        ({"model_digest": "0" * 64}, "0" * 12),
        ({"experts": ["transformer", "transformer_2"]}, "transformer_2"),
    ],
)
def test_a_checkpoint_of_another_model_is_named(model, base, tmp_path, change, value):
    trained = {f"transformer/{k}": v for k, v in base.items()} if "experts" in change else base
    run = save(tmp_path / "run", model, trained, **change)
    with pytest.raises(UserError, match=value) as caught:
        load(model, run)
    assert run in str(caught.value)


def test_arrays_that_do_not_fit_are_named(model, base, tmp_path):
    path = next(iter(base))
    run = save(tmp_path / "run", model, base | {path: base[path][..., :1]})
    with pytest.raises(UserError, match=path):
        load(model, run)


@pytest.mark.parametrize("stored, asked", [("dtype", None), ("fp8", "fp8"), ("fp8", None)])
def test_a_base_stored_otherwise_than_in_training_is_said(model, tmp_path, stored, asked):
    config = {"config": {"model": {"weights": stored}}, "lora": LORA}
    run = save(tmp_path / "run", model, {"x": np.zeros(1)}, **config)
    quantisation = Quantisation(asked) if asked else None
    note = base_note(run, quantisation)
    assert bool(note) == (stored != (asked or "dtype"))
    if note:
        assert run in note and "weights=fp8" in note and "weights=dtype" in note


def test_all_weights_are_not_quantised(model, tmp_path):
    run = save(tmp_path / "run", model, {"x": np.zeros(1)})
    assert not base_note(run, None)
    with pytest.raises(UserError, match=r"--config\.model\.weights=dtype, in sampling --weights"):
        base_note(run, Quantisation("fp8"))
