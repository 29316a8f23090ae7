"""Fixtures of the conversion's tests: a random small pipeline, and what it converts to."""

import shutil

import pytest

from convert.from_diffusers import convert
from tests import tiny
from wan_jax.storage import lora_names, model_dir


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("source") / "wan", seed=3)


@pytest.fixture
def own(source, tmp_path):
    """A copy to change."""
    return shutil.copytree(source, tmp_path / "own")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The source in bfloat16; only read."""
    dst = tmp_path_factory.mktemp("converted") / "model"
    convert(str(source), dst, "bfloat16")
    return dst


@pytest.fixture
def own_model(converted, tmp_path):
    """A copy of the converted source to change."""
    return shutil.copytree(converted, tmp_path / "model")


@pytest.fixture(scope="module")
def single(converted):
    """The converted source: a model with one transformer."""
    return model_dir.open_model(converted)


@pytest.fixture(scope="module")
def kernels(single):
    """The shapes of the transformer's layers to which adapters are added."""
    return lora_names.dense_layers(single.config("transformer"))
