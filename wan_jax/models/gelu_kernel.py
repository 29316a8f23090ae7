"""GELU between two products in 8 bits, as one Pallas-Triton kernel.

What follows the first product of a feed-forward network (its scales, bias, GELU, rounding to fp8) reads
each row twice, because fp8 is scaled by the row's largest value. XLA makes two passes over memory
of it; here a program holds its row in registers. The gradient is that of the plain code.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32

from wan_jax.models.layers import Rounded, gelu, gelu_bound
from wan_jax.models.quantised import row_scales

WARPS = 8  # of a program, which computes a row


def gelu_rows(
    product: Float[Array, "B S F"],
    rows: Float32[Array, "B S 1"],
    scale: Float32[Array, " F"],
    bias: Float[Array, " F"],
    fp8: jnp.dtype,
) -> Rounded:
    """Return GELU of product * rows * scale + bias in `fp8`, scaled by rows. Equal to
    `quantise_rows` of the plain code's GELU, which is rounded to the product's type before and after.

    Has no derivative. Each device computes its own videos. For GPUs of NVIDIA, and of AMD, where
    it has not run yet.
    """

    def run(*arrays):
        videos, tokens, width = arrays[0].shape

        def row(columns):
            return pl.BlockSpec((None, None, columns), lambda b, s: (b, s, 0))

        whole = pl.BlockSpec((width,), lambda b, s: (0,))
        # imported here, so that Triton's part of Pallas is loaded only where it is used
        from jax.experimental.pallas import triton

        return pl.pallas_call(
            functools.partial(_kernel, pieces=powers_of_two(width)),
            grid=(videos, tokens),
            in_specs=[row(width), row(1), whole, whole],
            out_specs=(row(width), row(1)),
            out_shape=(
                jax.ShapeDtypeStruct((videos, tokens, width), fp8),
                jax.ShapeDtypeStruct((videos, tokens, 1), jnp.float32),
            ),
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
            name="gelu_rows",
        )(*arrays)

    def partition(mesh, arguments, results):
        videos = NamedSharding(mesh, P((*arguments[0].sharding.spec, None)[0]))
        everywhere = NamedSharding(mesh, P())
        return mesh, run, (videos, videos), (videos, videos, everywhere, everywhere)

    partitioned = custom_partitioning(run)
    partitioned.def_partition(partition, sharding_rule="b s f, b s r, f, f -> b s f, b s r")
    return Rounded(*partitioned(product, rows, scale, bias))


def _kernel(product_ref, rows_ref, scale_ref, bias_ref, values_ref, scales_ref, *, pieces):
    """Compute a row. pieces: of `powers_of_two`."""
    dtype, fp8, row = product_ref.dtype, values_ref.dtype, rows_ref[...]

    def rounded(x):
        return x.astype(dtype).astype(jnp.float32)

    def result(start, columns):
        at = pl.ds(start, columns)
        y = product_ref[at].astype(jnp.float32) * (row * scale_ref[at])
        return rounded(y + bias_ref[at].astype(jnp.float32))

    results = [result(*piece) for piece in pieces]
    largest = functools.reduce(jnp.maximum, (y.max(keepdims=True) for y in results))
    scales_ref[...], inverse = row_scales(gelu_bound(largest), fp8)
    for (start, columns), y in zip(pieces, results):
        values_ref[pl.ds(start, columns)] = to_fp8(rounded(gelu(y)) * inverse, fp8)


def powers_of_two(width: int) -> list[tuple[int, int]]:
    """Return (first column, columns) of pieces of a row whose lengths are powers of two, as Triton's
    arrays are.
    """
    lengths = [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return list(zip(starts, lengths))


def to_fp8(x: jax.Array, dtype) -> jax.Array:
    """Round fp32 values, which must be in the type's range, to e4m3.

    Pallas does not convert to AMD's `float8_e4m3fnuz`; its bits are computed here.
    """
    if dtype != jnp.float8_e4m3fnuz:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    # Normal values: the exponent's bias is 8 instead of 127, and 20 of the 23 bits are rounded off.
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1) - ((127 - 8) << 23)) >> 20
    # Others are multiples of 2^-10, which are the last bits of the sum with 2^13.
    total = jax.lax.bitcast_convert_type(jnp.abs(x) + 2.0**13, jnp.int32)
    small = total - ((127 + 13) << 23)
    code = jnp.where(jnp.abs(x) < 2.0**-7, small, normal)
    # Its code of -0 is NaN.
    code = code | jnp.where((x < 0) & (code > 0), 0x80, 0)
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), dtype)
