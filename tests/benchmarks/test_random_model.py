"""Tests of the random models of the benchmarks: values, and a folder that converts."""

import numpy as np

from benchmarks import random_model
from wan_jax.storage.key_table import Entry


def entry(key: str, shape: tuple[int, ...]) -> Entry:
    return Entry(key, "path", None, shape, lambda value: value, lambda value: value)


def test_values_have_the_deviation_and_repeat_a_block():
    values = random_model.Values(np.dtype(np.float32))
    drawn = values((3, random_model.BLOCK), 0.5)
    assert drawn.dtype == np.float32 and abs(drawn.std() - 0.5) < 1e-2
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_norms_are_one_and_matrices_preserve_the_variance():
    values = random_model.Values(np.dtype(np.float32))
    assert (random_model.tensor(entry("blocks.0.norm2.weight", (8,)), values) == 1).all()
    matrix = random_model.tensor(entry("blocks.0.attn1.to_q.weight", (64, 400)), values)
    assert abs(matrix.std() - 400**-0.5) < 5e-3
    bias = random_model.tensor(entry("blocks.0.attn1.to_q.bias", (1000,)), values)
    assert abs(bias.std() - 0.02) < 5e-3
