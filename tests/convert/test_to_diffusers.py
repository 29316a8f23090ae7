"""Tests of the export: adapters merged into the base weights, and rounding."""

import ml_dtypes
import numpy as np
import pytest

from convert.to_diffusers import Merged, merge_lora
from wan_jax.errors import UserError


def test_merged_adapters():
    rng = np.random.default_rng(0)
    flat = {
        "blocks/attn1/to_q/kernel": rng.standard_normal((2, 6, 5)).astype(np.float32),
        "blocks/attn1/to_q/bias": np.ones((2, 5), np.float32),
    }
    a, b = rng.standard_normal((2, 6, 3)), rng.standard_normal((2, 3, 5))
    adapters = {
        "blocks/attn1/to_q/lora_a": a.astype(np.float32),
        "blocks/attn1/to_q/lora_b": b.astype(np.float32),
    }
    shapes = {k: v.shape for k, v in flat.items()}

    def stored(path, layer):
        return flat[path][layer]

    single = Merged(
        stored, merge_lora(shapes, adapters, 0.5), dict.fromkeys(flat, np.dtype(np.float32))
    )
    for layer in range(2):
        np.testing.assert_allclose(
            single.read("blocks/attn1/to_q/kernel", layer),
            flat["blocks/attn1/to_q/kernel"][layer] + 0.5 * a[layer] @ b[layer],
            rtol=1e-5,
        )
    assert np.array_equal(
        single.read("blocks/attn1/to_q/bias", 1), flat["blocks/attn1/to_q/bias"][1]
    )
    assert not single.rounds
    with pytest.raises(UserError, match="blocks/attn2/to_q"):
        merge_lora(shapes, {"blocks/attn2/to_q/lora_a": a, "blocks/attn2/to_q/lora_b": b}, 1.0)


@pytest.mark.parametrize(
    "size, low, high", [(1.0, 0.0, 0.01), (1e-3, 0.3, 1.5), (1e-6, 0.99, 1.01)]
)
def test_trained_weights_are_rounded_once(size, low, high):
    """A change below bfloat16's steps is kept in float32, and reported as lost in bfloat16."""
    rng, bf16, f32 = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    base = {"x/kernel": rng.standard_normal((64, 64)).astype(bf16)}
    a, b = (rng.standard_normal(shape).astype(f32) for shape in ((64, 2), (2, 64)))
    changes = merge_lora({"x/kernel": (64, 64)}, {"x/lora_a": a, "x/lora_b": size * b}, 1.0)
    wide, narrow = (
        Merged(lambda path, layer: base[path], changes, {"x/kernel": dtype})
        for dtype in (f32, bf16)
    )
    value = base["x/kernel"].astype(f32) + a @ (size * b)
    assert np.array_equal(wide.read("x/kernel", None), value)
    assert np.array_equal(narrow.read("x/kernel", None), value.astype(bf16))
    assert narrow.rounds and low < narrow.lost < high
