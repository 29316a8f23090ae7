"""Tests of `benchmarks.attention` on the CPU, at a small shape."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import attention


def test_error_is_relative():
    assert attention.error([3.0, 4.4], [3.0, 4.0]) == pytest.approx(0.08)


def test_a_backend_agrees_with_dense_attention():
    lengths = (16, 16, 16, 16)
    arrays = [
        jax.random.normal(jax.random.key(i), (2, length, 1, attention.HEAD_DIM), jnp.float32)
        for i, length in enumerate(lengths)
    ]
    dense = functools.partial(attention.both, backend="xla", key_counts=None)
    expected = [array[:1] for array in jax.jit(dense)(*arrays)]
    line = attention.measure("chunked", arrays, None, expected, repeats=1)
    assert all(line[f"error_{name}"] < 1e-5 for name in ("out", "dq", "dk", "dv"))
    assert line["forward_ms"] > 0 and line["both_gib"] >= line["forward_gib"]
