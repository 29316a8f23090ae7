"""What stands between the products of a transformer block, in fused kernels.

`choose_fused` checks the setting once; it is a static attribute of the model. `off` is the plain code
of `wan_jax/models/transformer.py`, `pallas` the kernels of `kernels.py`; AMD and NVIDIA GPUs, 16-bit
types; they have never run on AMD. Both compute the same, rounded at the same places, up to the order
of sums over a row.

- `heads`: queries, keys and values from their product: scales, bias, adapters' share, RMS norm, RoPE.
- `norm`: scales, bias and adapters' share of an attention's last layer, gated residual, layer norm,
  modulation, rounding to fp8.
- `gelu_rows`: scales and bias of the feed-forward network's first layer, GELU, rounding to fp8.

- `feed_forward` is this between both products.

The backward pass has kernels for the gradients of `heads` and of GELU with its rounding, whose parts
XLA computes in several passes. That of `norm` is the derivative of `plain_norm`, which XLA computes in
one. All start from the same saved products as without kernels. Values in fp8 have no derivative; the
product that they are for has that of its unrounded input.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from wan_jax.choices import FUSED
from wan_jax.errors import UserError
from wan_jax.models.layers import MATMUL, Dense, gelu, layer_norm, rms_norm
from wan_jax.models.positions import rotate, rotation
from wan_jax.models.quantised import Rounded, multiply_8bit, row_scales, scaled_gradient


def choose_fused(name: str, platform: str, dtype, head_dim: int) -> str:
    """Return the name, one of `FUSED`. platform: of `attention.platform_of`.

    Raises `UserError` where `pallas` cannot run: no GPU, fp32, or head_dim not 16, 32, 64 or 128.
    """
    if name not in FUSED:
        raise UserError(f"fused={name!r} is unknown; choose one of {', '.join(FUSED)}")
    if name == "off":
        return name
    obstacle = None
    if platform not in ("cuda", "rocm"):
        obstacle = f"the device is {platform!r}, not an AMD or NVIDIA GPU"
    elif jnp.dtype(dtype).itemsize != 2:
        obstacle = (
            f"the model computes in {jnp.dtype(dtype).name}, these kernels in bfloat16 or float16"
        )
    elif head_dim not in (16, 32, 64, 128):
        obstacle = f"head_dim {head_dim} is not one of 16, 32, 64, 128"
    if obstacle:
        raise UserError(f"fused={name!r} cannot run here: {obstacle}; use fused='off'")
    return name


# ---- queries, keys, values -----------------------------------------------------------------------
class Head(NamedTuple):
    """How one result of a dense layer becomes queries, keys or values."""

    normed: bool
    rotated: bool


@dataclasses.dataclass(frozen=True)
class HeadsSpec:
    """The static part of `heads`."""

    heads: tuple[Head, ...]
    head_dim: int
    eps: float


def heads(
    spec: HeadsSpec,
    dense: Dense,
    weights: Sequence[Float[Array, " D"]],
    cos: Float32[np.ndarray, "S half_head"] | Float32[Array, "S half_head"] | None = None,
    sin: Float32[np.ndarray, "S half_head"] | Float32[Array, "S half_head"] | None = None,
) -> tuple[Float[Array, "B S D"], ...]:
    """Return a result for each of `spec.heads`, which lie side by side in `dense`: RMS-normed over D
    with the next of `weights`, rotated by cos and sin.
    """
    table = () if cos is None or sin is None else tuple(map(jnp.asarray, rotation(cos, sin)))
    return cast(tuple, _heads(spec, dense, tuple(weights), table))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _heads(spec: HeadsSpec, dense: Dense, weights, table):
    # imported here, so that Triton's part of Pallas is loaded only where it is used
    from wan_jax.models.fused import calls

    weights, results = list(weights), []
    for part, head in enumerate(_head_kernels(spec, dense)):
        inputs = [
            *_operands(dense, part, head.operands.width)[1],
            *([weights.pop(0)] if head.normed else []),
            *(table if head.rotated else ()),
        ]
        sizes, types = {"d": head.operands.width}, (dense.product.dtype,)
        results += calls.call(head.kernel, calls.TILES.heads, inputs, sizes, types)
    return tuple(results)


def _head_kernels(spec: HeadsSpec, dense: Dense):
    """Return the descriptions of the kernel for each head."""
    from wan_jax.models.fused import kernels

    width = dense.product.shape[-1] // len(spec.heads)
    return tuple(
        kernels.Heads(_operands(dense, part, width)[0], *head, spec.head_dim, spec.eps)
        for part, head in enumerate(spec.heads)
    )


def plain_heads(spec: HeadsSpec, dense: Dense, weights, table) -> tuple[jax.Array, ...]:
    """Compute `heads` in plain JAX. table: of `positions.rotation`, or empty."""
    weights, results = list(weights), []
    parts = jnp.split(dense.result(len(spec.heads)), len(spec.heads), axis=-1)
    for y, head in zip(parts, spec.heads):
        if head.normed:
            y = rms_norm(y, weights.pop(0), spec.eps)
        if head.rotated:
            split = y.reshape(*y.shape[:2], -1, spec.head_dim)
            y = rotate(split, *(x[:, None] for x in table)).reshape(y.shape)
        results.append(y)
    return tuple(results)


def _heads_forward(spec, *inputs):
    return _heads(spec, *inputs), inputs


def _heads_backward(spec, inputs, gradients):
    """The gradient by the results is the kernel's; that by weights is computed where it is used."""
    from wan_jax.models.fused import calls, kernels

    dense, weights, table = inputs
    heads = _head_kernels(spec, dense)
    rotated = any(head.rotated for head in heads)
    arrays = [*gradients, *_operands(dense, 0, heads[0].operands.width)[1], *weights]
    (d_result,) = calls.call(
        kernels.HeadsGradient(heads).kernel,
        calls.TILES.heads_gradient,
        [*arrays, *(table if rotated else ())],
        {},
        (dense.product.dtype,),
    )
    (d_dense,) = jax.vjp(lambda dense: dense.result(len(heads)), dense)[1](d_result)
    _, by_weights = jax.vjp(lambda weights: plain_heads(spec, dense, weights, table), weights)
    return d_dense, *by_weights(gradients), jax.tree.map(jnp.zeros_like, table)


_heads.defvjp(_heads_forward, _heads_backward)


# ---- residual and norm ---------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class NormSpec:
    """The static part of `norm`.

    Attributes:
        eps: of the layer norm.
        kept: whether the norm is returned in the type of x.
        fp8: type of the rounded norm; None: not returned.
    """

    eps: float
    kept: bool
    fp8: jnp.dtype | None = None


class Normed(NamedTuple):
    """Results of `norm`: the residual stream, its modulated norm, and that in fp8."""

    x: jax.Array
    norm: jax.Array
    rounded: Rounded | None


def norm(
    spec: NormSpec,
    x: Float[Array, "B S D"],
    dense: Dense | None,
    gate: Float32[Array, "B 1 D"] | None,
    scale: Float32[Array, "#B 1 D"],
    shift: Float32[Array, "#B 1 D"],
    bound: Float32[Array, "*#B"],
) -> Normed:
    """Return x + gate * dense (x if dense is None), and layer_norm(that) * scale + shift.

    gate: None for 1. bound: of the norm's absolute values, one for each video or for all; fp8 values
    are scaled by it.
    """
    videos, tokens, width = x.shape
    per_video = [
        None if y is None else jnp.broadcast_to(y, (videos, 1, width))[:, 0]
        for y in (gate, scale, shift)
    ]
    row_scale, inverse = None, None
    if spec.fp8 is not None:
        bound = jnp.broadcast_to(jax.lax.stop_gradient(bound).reshape(-1), (videos,))
        row_scale, inverse = row_scales(bound, spec.fp8)
    found, kept, values = cast(tuple, _norm(spec, dense, x, *per_video, inverse))
    x = x if found is None else found
    if kept is None:  # for the gradient; its value is not used
        kept = plain_norm(spec, None, x, *per_video)[1]
    rounded = None
    if row_scale is not None:
        scales = jnp.broadcast_to(row_scale[:, None, None], (videos, tokens, 1))
        rounded = Rounded(jax.lax.stop_gradient(values), scales)
    return Normed(x, kept, rounded)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(spec: NormSpec, dense, x, gate, scale, shift, inverse):
    from wan_jax.models.fused import calls, kernels

    operands, arrays = None, []
    if dense is not None:
        operands, arrays = _operands(dense, 0, x.shape[-1])
    kernel = kernels.Norm(operands, gate is not None, spec.kept, spec.fp8, spec.eps).kernel
    inputs = [*arrays, x, *(y for y in (gate, scale, shift, inverse) if y is not None)]
    types = [x.dtype] * ((dense is not None) + spec.kept)
    types += [] if spec.fp8 is None else [spec.fp8]
    results = list(calls.call(kernel, calls.TILES.norm, inputs, {}, types))
    return (
        None if dense is None else results.pop(0),
        results.pop(0) if spec.kept else None,
        None if spec.fp8 is None else results.pop(0),
    )


def plain_norm(spec: NormSpec, dense: Dense | None, x, gate, scale, shift) -> tuple:
    """Return x + gate * dense (None if dense is None) and its modulated norm, in plain JAX. gate,
    scale, shift: [B,D].
    """
    total = x if dense is None else _add(dense, x, gate)
    return None if dense is None else total, _modulate(spec, total, scale, shift)


def _add(dense: Dense, x, gate):
    y = dense.result().astype(jnp.float32)
    y = y if gate is None else y * gate[:, None]
    return (x.astype(jnp.float32) + y).astype(x.dtype)


def _modulate(spec: NormSpec, x, scale, shift):
    return (layer_norm(x, spec.eps) * scale[:, None] + shift[:, None]).astype(x.dtype)


def _norm_forward(spec, *inputs):
    results = _norm(spec, *inputs)
    return results, (inputs, cast(tuple, results)[0])


def _norm_backward(spec, saved, gradients):
    """The sum that is normalised is the kernel's; without the gate's gradient the dense layer's result
    is not computed again.
    """
    (dense, x, gate, scale, shift, inverse), total = saved
    d_total, d_norm, _ = gradients
    d_scale, d_shift = jnp.zeros_like(scale), jnp.zeros_like(shift)
    if d_norm is not None:
        total = x if total is None else total
        _, backward = jax.vjp(functools.partial(_modulate, spec), total, scale, shift)
        by_norm, d_scale, d_shift = backward(d_norm)
        d_total = by_norm if d_total is None else d_total + by_norm
    d_dense, d_x, d_gate = None, d_total, None
    if dense is not None:
        _, backward = jax.vjp(_add, dense, x, gate)
        d_dense, d_x, d_gate = backward(d_total)
    d_inverse = None if inverse is None else jnp.zeros_like(inverse)
    return d_dense, d_x, d_gate, d_scale, d_shift, d_inverse


_norm.defvjp(_norm_forward, _norm_backward)


# ---- feed-forward network ------------------------------------------------------------------------
class FrozenDense(NamedTuple):
    """A frozen dense layer in 8 bits without adapters: values [n_out,n_in], scale [n_out], bias."""

    values: jax.Array
    scale: jax.Array
    bias: jax.Array


def feed_forward(
    x: Float[Array, "B S D"], rounded: Rounded, first: FrozenDense, second: FrozenDense
) -> Float[Array, "B S D"]:
    """Return the second layer of GELU of the first layer of x.

    The value of x, whose rounded one is given, is not used. There is no gradient by the layers.
    """
    product, rows = cast(tuple, _feed_forward(x, rounded, first, second.values))
    rows = jax.lax.stop_gradient(rows)
    return Dense(product, second.bias, rows, second.scale, None, None).result()


@jax.custom_vjp
def _feed_forward(x, rounded: Rounded, first: FrozenDense, values):
    """The second layer's product before its scales, and those of its rows."""
    results, _ = _feed_forward_forward(x, rounded, first, values)
    return results


def _feed_forward_forward(x, rounded: Rounded, first: FrozenDense, values):
    product, rows = multiply_8bit(x, rounded, first.values, 1, x.dtype)
    product = checkpoint_name(product, MATMUL)
    hidden = gelu_rows(Dense(product, first.bias, rows, first.scale, None, None), values.dtype)
    # The backward pass needs the scales, which must not be computed by the kernel again.
    hidden = hidden._replace(scale=checkpoint_name(hidden.scale, MATMUL))
    result, scale = multiply_8bit(product, hidden, values, 1, x.dtype)
    result = checkpoint_name(result, MATMUL)
    return (result, scale), (product, rows, first, values, scale)


def _feed_forward_backward(saved, gradients):
    """The gradients are rounded to fp8 by rows as in `quantised.unscaled_product`."""
    product, rows, first, values, scale = saved
    upstream, upstream_scale = scaled_gradient(gradients[0], scale, values)
    dense = Dense(product, first.bias, rows, first.scale, None, None)
    rounded = gelu_gradient_rows(dense, upstream, upstream_scale, values.dtype)
    result, scale = multiply_8bit(product, rounded, first.values, 0, product.dtype)
    return (result.astype(jnp.float32) * scale).astype(product.dtype), None, None, None


_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)


def gelu_rows(dense: Dense, fp8: jnp.dtype) -> Rounded:
    """Return GELU of a dense layer's result, in the type of its product, rounded to `fp8` by rows."""
    from wan_jax.models.fused import calls

    kernel, arrays = _gelu(dense, fp8)
    types = (fp8, jnp.float32)
    values, scale = calls.call(kernel.kernel, calls.TILES.gelu, arrays, {}, types)
    return Rounded(values, scale[..., None])


def gelu_gradient_rows(
    dense: Dense,
    upstream: Float[Array, "B S P"],
    scale: Float32[Array, "B S 1"],
    fp8: jnp.dtype,
) -> Rounded:
    """Return the gradient by a dense layer's product, over the scales of its rows, rounded to `fp8` by
    rows. upstream * scale: the gradient by GELU of the result.
    """
    from wan_jax.models.fused import calls

    kernel, arrays = _gelu(dense, fp8)
    arrays = [upstream, scale[..., 0], *arrays]
    types, tile = (fp8, jnp.float32), calls.TILES.gelu_gradient
    values, scale = calls.call(kernel.gradient, tile, arrays, {}, types)
    return Rounded(values, scale[..., None])


def _gelu(dense: Dense, fp8: jnp.dtype):
    """Return (the description of the kernels, their arrays)."""
    from wan_jax.models.fused import gelu_kernels

    operands, arrays = _operands(dense, 0, dense.product.shape[-1])
    return gelu_kernels.Gelu(operands, fp8, gelu, functools.partial(row_scales, dtype=fp8)), arrays


def _operands(dense: Dense, part: int, width: int):
    """Return (the kernels' description, the arrays) of a dense layer's result."""
    from wan_jax.models.fused import kernels

    operands = kernels.Operands(dense.rows is not None, dense.narrow is not None, part, width)
    rows = None if dense.rows is None else dense.rows[..., 0]
    arrays = [dense.product, dense.bias, rows, dense.scale]
    if dense.narrow is not None and dense.factor is not None:
        # products of Triton sum over a power of two of at least 16
        rank = dense.factor.shape[0]
        missing = max(16, 1 << (rank - 1).bit_length()) - rank
        split = dense.narrow.reshape(*dense.narrow.shape[:-1], -1, rank)
        split = jnp.pad(split, [(0, 0)] * (split.ndim - 1) + [(0, missing)])
        arrays += [
            split.reshape(*dense.narrow.shape[:-1], -1),
            jnp.pad(dense.factor, ((0, missing), (0, 0))),
        ]
    return operands, [x for x in arrays if x is not None]
