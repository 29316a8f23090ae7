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


@pytest.fixture
def absent_gpu(monkeypatch):
    """Lets Pallas lower for a GPU where there is none, as JAX before 0.11 does without it."""
    try:
        from jax._src.pallas.triton import gpu_info
    except ImportError:
        return
    h200 = gpu_info.GpuInfo(
        gpu_version=gpu_info.GpuVersion.H200, arch_name="9.0", compute_capability=90
    )
    monkeypatch.setattr(gpu_info, "get_gpu_info", lambda: h200)
