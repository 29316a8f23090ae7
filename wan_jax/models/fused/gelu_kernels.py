"""The kernels between both products of the feed-forward network, which hold whole rows in registers.

Shapes: as in `kernels.py`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from wan_jax.models.fused.calls import Kernel
from wan_jax.models.fused.kernels import Operands, powers_of_two, to_fp8


@dataclasses.dataclass(frozen=True)
class Gelu:
    """GELU (tanh) of a dense layer's result, rounded to fp8 by rows, or its gradient.

    Inputs: those of `operands`, without adapters. Outputs: values [B,S,P] in `fp8`, scales [B,S].

    Attributes:
        gelu: in fp32.
        row_scales: as `quantised.row_scales`, of `fp8`.
    """

    operands: Operands
    fp8: jnp.dtype
    gelu: Callable[[jax.Array], jax.Array]
    row_scales: Callable[[jax.Array], tuple[jax.Array, jax.Array]]

    @property
    def kernel(self) -> Kernel:
        """The kernel and its axes."""
        return Kernel(self._run, "gelu", f"{' '.join(self.operands.axes)} -> bsp bs")

    @property
    def gradient(self) -> Kernel:
        """The kernel of the gradient by the product, divided by the scales of its rows, and rounded.

        Two more inputs before those of `operands`: the gradient by GELU [B,S,P] before its scales,
        and these, [B,S].
        """
        axes = f"bsp bs {' '.join(self.operands.axes)} -> bsp bs"
        return Kernel(self._run_gradient, "gelu_gradient", axes)

    def _run(self, *refs, rows):
        *refs, out_ref, scale_ref = refs
        read = self.operands.reader(refs, rows)
        pieces = powers_of_two(self.operands.width)
        values = [read(*piece) for piece in pieces]
        largest = functools.reduce(jnp.maximum, (y.max(1) for y in values))
        scale, inverse = self.row_scales(jnp.maximum(largest, 0.25))
        scale_ref[rows] = scale
        for (start, columns), y in zip(pieces, values):
            z = self.gelu(y).astype(refs[0].dtype).astype(jnp.float32)
            out_ref[rows, pl.ds(start, columns)] = to_fp8(z * inverse[:, None], self.fp8)

    def _run_gradient(self, upstream_ref, upstream_scale_ref, *refs, rows):
        *refs, out_ref, scale_ref = refs
        read, dtype = self.operands.reader(refs, rows), refs[0].dtype
        upstream_scale = upstream_scale_ref[rows][:, None]
        row_scale, column_scale = refs[2][rows][:, None], refs[3]

        def rounded(x):
            return x.astype(dtype).astype(jnp.float32)

        def gradient(start: int, columns: int):
            """As JAX's derivative of the plain code, which rounds after each step."""
            at = pl.ds(start, columns)
            upstream = rounded(upstream_ref[rows, at].astype(jnp.float32) * upstream_scale)
            _, backward = jax.vjp(self.gelu, read(start, columns))
            by_result = rounded(backward(upstream)[0])
            return rounded(by_result * (row_scale * column_scale[at][None, :])) / row_scale

        pieces = powers_of_two(self.operands.width)
        values = [gradient(*piece) for piece in pieces]
        largest = functools.reduce(jnp.maximum, (jnp.abs(y).max(1) for y in values))
        scale, inverse = self.row_scales(jnp.where(largest > 0, largest, 1.0))
        scale_ref[rows] = scale
        for (start, columns), y in zip(pieces, values):
            out_ref[rows, pl.ds(start, columns)] = to_fp8(y * inverse[:, None], self.fp8)
