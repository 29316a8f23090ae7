"""Pallas-Triton kernels for what stands between the products of a transformer block.

Each reads a dense layer's product once from memory and writes its result once. XLA computes the
same in several passes, because it cannot fuse a reduction over a row with the adapters' product
before it and the rotation after it. Rows are computed in two passes over chunks of columns, of which
the second reads from the cache; the kernels of `gelu_kernels.py` hold whole rows in registers.

Shapes: B videos, S tokens, D columns of a result, p columns of a product (one or several results
side by side), n columns of the adapters' first product, r of those of one result.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from wan_jax.models.fused.calls import Kernel

UNROLL = 4  # chunks of columns that are computed side by side


# ---- parts of kernels ----------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Operands:
    """Which arrays a dense layer's result consists of: (product * (rows * scale) + bias + narrow
    factor), rounded. product and bias are always there.

    Attributes:
        scaled: whether rows [B,S] and scale [P] are there.
        adapted: whether narrow [B,S,n] and factor [r,P] are there.
        part: number of the result among those of the product.
        width: D.
    """

    scaled: bool
    adapted: bool
    part: int
    width: int

    @property
    def axes(self) -> list[str]:
        """Letters of the arrays' axes."""
        return [
            "bsp",
            "p",
            *(["bs", "p"] if self.scaled else []),
            *(["bsn", "rp"] if self.adapted else []),
        ]

    def reader(self, refs, rows) -> Callable[[jax.Array | int, int], jax.Array]:
        """Return read(first column, columns), which computes the result there, fp32 [rows, columns]
        with values of the product's type.
        """
        refs = iter(refs)
        product, bias = next(refs), next(refs)
        row_scale, scale, narrow, factor = None, None, None, None
        if self.scaled:
            row_scale, scale = next(refs)[rows][:, None], next(refs)
        if self.adapted:
            narrow_ref, factor = next(refs), next(refs)
            rank = factor.shape[0]
            narrow = narrow_ref[rows, pl.ds(self.part * rank, rank)]

        def read(start, columns: int):
            at = pl.ds(self.part * self.width + start, columns)
            y = product[rows, at].astype(jnp.float32)
            if row_scale is not None and scale is not None:
                y = y * (row_scale * scale[at][None, :])
            y = y + bias[at].astype(jnp.float32)[None, :]
            if narrow is not None and factor is not None:
                share = jnp.dot(narrow, factor[:, at], preferred_element_type=jnp.float32)
                y = y + share.astype(product.dtype).astype(jnp.float32)
            return y.astype(product.dtype).astype(jnp.float32)

        return read


def each_chunk(width: int, columns: int, body: Callable, carry):
    """Return the last carry of carry = body(first column, carry) over all chunks of columns."""
    count = width // columns
    group = max(n for n in range(1, UNROLL + 1) if count % n == 0)

    def several(i, carry):
        for j in range(group):
            carry = body((i * group + j) * columns, carry)
        return carry

    return (
        several(0, carry)
        if group == count
        else jax.lax.fori_loop(0, count // group, several, carry)
    )


def powers_of_two(width: int) -> list[tuple[int, int]]:
    """Return (first column, columns) of pieces of a row whose lengths are powers of two."""
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
    sum_ = jax.lax.bitcast_convert_type(jnp.abs(x) + 2.0**13, jnp.int32)
    small = sum_ - ((127 + 13) << 23)
    code = jnp.where(jnp.abs(x) < 2.0**-7, small, normal)
    # Its code of -0 is NaN.
    code = code | jnp.where((x < 0) & (code > 0), 0x80, 0)
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), dtype)


# ---- kernels -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Heads:
    """Queries, keys or values from a dense layer: optional RMS norm over D, optional rotation.

    Inputs: those of `operands`; weight [D] if `normed`; cosine and signed sine [S, head_dim] if
    `rotated`. Output [B,S,D].
    """

    operands: Operands
    normed: bool
    rotated: bool
    head_dim: int
    eps: float

    @property
    def kernel(self) -> Kernel:
        """The kernel and its axes."""
        inputs = [
            *self.operands.axes,
            *(["d"] if self.normed else []),
            *(["sh", "sh"] if self.rotated else []),
        ]
        return Kernel(self._run, "heads", f"{' '.join(inputs)} -> bsd")

    def _run(self, *refs, rows):
        *refs, out_ref = refs
        width, columns = self.operands.width, self.head_dim
        read = self.operands.reader(refs[: len(self.operands.axes)], rows)
        refs = list(refs[len(self.operands.axes) :])
        weight_ref = refs.pop(0) if self.normed else None
        cosine, sine = (ref[rows, :] for ref in refs) if self.rotated else (None, None)
        inverse = jnp.zeros((rows.size, 1), jnp.float32)
        if self.normed:
            squares = each_chunk(
                width,
                columns,
                lambda start, total: total + jnp.square(read(start, columns)).sum(1, keepdims=True),
                inverse,
            )
            inverse = jax.lax.rsqrt(squares / width + self.eps)

        def write(start, _):
            at = pl.ds(start, columns)
            y = read(start, columns)
            if weight_ref is not None:
                y = y * inverse * weight_ref[at].astype(jnp.float32)[None, :]
                y = y.astype(out_ref.dtype).astype(jnp.float32)
            if cosine is not None and sine is not None:
                y = y * cosine + neighbours(y) * sine
            out_ref[rows, at] = y.astype(out_ref.dtype)
            return 0

        each_chunk(width, columns, write, 0)


@dataclasses.dataclass(frozen=True)
class HeadsGradient:
    """The gradient by a dense layer's results of what `Heads` computes of each of them.

    Inputs: the gradients by these, [B,S,D] each; those of the results' `operands`; weights [D] of those
    that are normed; cosine and signed sine if any is rotated. Output [B,S,P].
    """

    heads: tuple[Heads, ...]

    @property
    def kernel(self) -> Kernel:
        """The kernel and its axes."""
        inputs = [
            *(["bsd"] * len(self.heads)),
            *self.heads[0].operands.axes,
            *(["d"] * sum(head.normed for head in self.heads)),
            *(["sh", "sh"] if any(head.rotated for head in self.heads) else []),
        ]
        return Kernel(self._run, "heads_gradient", f"{' '.join(inputs)} -> bsp")

    def _run(self, *refs, rows):
        *refs, out_ref = refs
        refs = list(refs)
        upstream = [refs.pop(0) for _ in self.heads]
        dense = [refs.pop(0) for _ in self.heads[0].operands.axes]
        weights = [refs.pop(0) if head.normed else None for head in self.heads]
        table = tuple(ref[rows, :] for ref in refs)
        for head, upstream_ref, weight_ref in zip(self.heads, upstream, weights):
            read = head.operands.reader(dense, rows)
            self._one(head, upstream_ref, weight_ref, table, read, out_ref, rows)

    @staticmethod
    def _one(head: Heads, upstream_ref, weight_ref, table, read, out_ref, rows):
        """Write the gradient by one result, rounded where JAX's derivative of the plain code is."""
        width, columns, dtype = head.operands.width, head.head_dim, out_ref.dtype

        def rotated_back(start):
            """The gradient by the normed values."""
            y = upstream_ref[rows, pl.ds(start, columns)].astype(jnp.float32)
            if head.rotated:
                cosine, sine = table
                y = (y * cosine + neighbours(y * sine)).astype(dtype).astype(jnp.float32)
            return y

        zeros = jnp.zeros((rows.size, 1), jnp.float32)
        inverse, shared = zeros, zeros
        if weight_ref is not None:

            def sums(start, carry):
                squares, products = carry
                y = read(start, columns)
                weight = weight_ref[pl.ds(start, columns)].astype(jnp.float32)[None, :]
                products = products + (rotated_back(start) * weight * y).sum(1, keepdims=True)
                return squares + jnp.square(y).sum(1, keepdims=True), products

            squares, products = each_chunk(width, columns, sums, (zeros, zeros))
            inverse = jax.lax.rsqrt(squares / width + head.eps)
            shared = products / width * inverse * inverse * inverse

        def write(start, _):
            y = rotated_back(start)
            if weight_ref is not None:
                weight = weight_ref[pl.ds(start, columns)].astype(jnp.float32)[None, :]
                y = y * weight * inverse - read(start, columns) * shared
            at = pl.ds(head.operands.part * width + start, columns)
            out_ref[rows, at] = y.astype(dtype)
            return 0

        each_chunk(width, columns, write, 0)


def neighbours(y: jax.Array) -> jax.Array:
    """Swap the values of the pairs (0, 1), (2, 3), ... of each row, in fp32.

    A value's neighbour is the pair's sum without it: no data leaves a thread. Its error is that of
    the sum, which the rotation of the pair has as well.
    """
    pairs = y.reshape(y.shape[0], -1, 2)
    return (pairs.sum(2, keepdims=True) - pairs).reshape(y.shape)


@dataclasses.dataclass(frozen=True)
class Norm:
    """The residual stream after a dense layer, and its modulated layer norm.

    Inputs: those of `operands` if that is not None, x [B,S,D], gate [B,D] if `gated`; scale, shift
    [B,D]; inverse [B] if `fp8` is not None. Outputs: x + gate * result [B,S,D] if `operands` is not
    None; the norm * scale + shift, [B,S,D], if `kept`; the same times inverse in the type `fp8`.
    """

    operands: Operands | None
    gated: bool
    kept: bool
    fp8: jnp.dtype | None
    eps: float

    @property
    def kernel(self) -> Kernel:
        """The kernel and its axes."""
        inputs = [
            *(self.operands.axes if self.operands else []),
            "bsd",
            *(["bd"] if self.gated else []),
            "bd",
            "bd",
            *([] if self.fp8 is None else ["b"]),
        ]
        outputs = (self.operands is not None) + self.kept + (self.fp8 is not None)
        return Kernel(self._run, "norm", f"{' '.join(inputs)} -> {' '.join(['bsd'] * outputs)}")

    def _run(self, *refs, rows):
        refs = list(refs)
        read_dense = None
        if self.operands is not None:
            count = len(self.operands.axes)
            read_dense = self.operands.reader(refs[:count], rows)
            del refs[:count]
        x_ref = refs.pop(0)
        gate_ref = refs.pop(0) if self.gated else None
        scale_ref, shift_ref = refs.pop(0), refs.pop(0)
        inverse = None if self.fp8 is None else refs.pop(0)[...]
        sum_ref = refs.pop(0) if read_dense is not None else None
        kept_ref = refs.pop(0) if self.kept else None
        width = x_ref.shape[-1]
        columns = math.gcd(width, 512)

        def read(start):
            at = pl.ds(start, columns)
            x = x_ref[rows, at].astype(jnp.float32)
            if read_dense is None:
                return x
            y = read_dense(start, columns)
            if gate_ref is not None:
                y = y * gate_ref[at][None, :]
            return (x + y).astype(x_ref.dtype).astype(jnp.float32)

        def statistics(start, carry):
            """Add a chunk to the mean and the sum of squared deviations (Chan et al. 1979)."""
            count, mean, deviations = carry
            x = read(start)
            if sum_ref is not None:
                sum_ref[rows, pl.ds(start, columns)] = x.astype(sum_ref.dtype)
            own = x.sum(1, keepdims=True) / columns
            own_deviations = jnp.square(x - own).sum(1, keepdims=True)
            total = count + columns
            step = own - mean
            mean = mean + step * (columns / total)
            deviations = deviations + own_deviations + step * step * (count * columns / total)
            return total, mean, deviations

        zeros = jnp.zeros((rows.size, 1), jnp.float32)
        _, mean, deviations = each_chunk(width, columns, statistics, (jnp.float32(0), zeros, zeros))
        factor = jax.lax.rsqrt(deviations / width + self.eps)

        def write(start, _):
            at = pl.ds(start, columns)
            y = (read(start) - mean) * factor
            y = (y * scale_ref[at][None, :] + shift_ref[at][None, :]).astype(x_ref.dtype)
            if kept_ref is not None:
                kept_ref[rows, at] = y
            if inverse is not None:
                refs[-1][rows, at] = to_fp8(y.astype(jnp.float32) * inverse, self.fp8)
            return 0

        each_chunk(width, columns, write, 0)
