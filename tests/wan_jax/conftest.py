"""Fixtures that several tests of `wan_jax` share."""

import pytest

from convert.from_diffusers import convert
from tests import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(Diffusers folder, converted folder) of a random model."""
    root = tmp_path_factory.mktemp("models")
    convert(str(tiny.write_pipeline(root / "source", seed=3)), root / "model", "float32")
    return root / "source", root / "model"
