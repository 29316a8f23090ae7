"""Tests of the plan of a conversion: data types, rounding and copies in C order."""

import ml_dtypes
import numpy as np
import pytest

from convert.plan import STEMS, contiguous, parse_dtypes, rounded
from wan_jax.errors import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)


def test_data_types_of_components():
    assert parse_dtypes("source") == dict.fromkeys(STEMS, "source")
    bfloat16 = dict.fromkeys(STEMS, "bfloat16")
    assert parse_dtypes("bfloat16") == bfloat16 | {"vae": "float32"}
    assert parse_dtypes("bfloat16,vae=bfloat16") == bfloat16
    assert parse_dtypes("text_encoder=float32") == dict.fromkeys(STEMS, "source") | {
        "text_encoder": "float32"
    }


@pytest.mark.parametrize("text", ["int8", "vae=int8", "unet=float32", "float32,bfloat16", ""])
def test_invalid_data_types(text):
    with pytest.raises(UserError, match=f"--dtype={text}:"):
        parse_dtypes(text)


@pytest.mark.parametrize("shape", [(3, 5), (64, 32), (70, 97), (1, 40), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_contiguous_transpose(shape, dtype):
    value = np.arange(np.prod(shape)).reshape(shape).astype(dtype).T
    copy = contiguous(value)
    assert copy.flags.c_contiguous and copy.dtype == dtype and np.array_equal(copy, value)


@pytest.mark.parametrize(
    "dtype, value, wanted",
    [
        ("float32", 3.4e38, BF16),
        ("float64", 1e300, np.dtype(np.float32)),
        ("float64", 1e39, BF16),
        ("float32", -3.4e38, BF16),
    ],
)
def test_overflow_by_the_cast(dtype, value, wanted):
    with pytest.raises(
        UserError,
        match=rf"tensor x is {dtype} and has values up to .*beyond the largest of {wanted}",
    ):
        rounded(np.array([1, value], dtype), wanted, "tensor x")
    assert rounded(np.array([1, 3e38], dtype), wanted, "x")[1] == np.array(3e38).astype(wanted)
