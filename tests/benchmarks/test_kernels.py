"""Tests of `benchmarks.kernels` on a trace without a GPU."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernels


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="needs a machine without a GPU")
def test_a_trace_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="no GPU"):
        kernels.kernel_times(lambda: jnp.ones(2) + 1)
