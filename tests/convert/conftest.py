"""Fixtures of the conversion's tests: a random small pipeline, and what it converts to."""

import shutil

import pytest

from convert.from_diffusers import convert
from tests import tiny


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
