"""Shared by all tests: eight simulated CPU devices, exact float32 products, and the `parity` marker."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.util

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items):
    missing = [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        skip = pytest.mark.skip(reason=f"live parity needs {', '.join(missing)}: pip install -e '.[parity]'")
        for item in items:
            if "parity" in item.keywords:
                item.add_marker(skip)
