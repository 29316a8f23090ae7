"""Safetensors files that this project writes."""

import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from wan_jax.storage.tensor_files import save_tensors


@pytest.fixture
def umask():
    """Sets the process's umask, until the test ends."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_file_has_the_permissions_of_new_files(tmp_path, umask, mask, mode):
    umask(mask)
    path = tmp_path / "a.safetensors"
    save_tensors({"a": np.arange(3)}, path, {"format": "pt"})
    assert path.stat().st_mode & 0o777 == mode
    np.testing.assert_array_equal(load_file(path)["a"], np.arange(3))


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, umask):
    path = tmp_path / "a.safetensors"
    path.touch(0o660)
    path.chmod(0o660)
    save_tensors({"a": np.zeros(1)}, path, {})
    assert path.stat().st_mode & 0o777 == 0o660
