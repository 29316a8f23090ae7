"""The layers that the transformer and the text encoder share: dense, RMS norm, layer norm.

Parameters are named as the published state dict names them, up to Flax's words (`weight` is
`kernel`, `scale` or `embedding`): see `convert/key_table.py`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
MATMUL = "matmul"  # a dense layer's result, as rematerialisation knows it


class LoRAParam(nnx.Param):
    """A trainable low-rank factor; a variable type of its own, so that `nnx.split(model, LoRAParam,
    ...)` finds it.
    """


class Linear(nnx.Module):
    """y = x W + b in `dtype`, plus `(lora_scale * (x A)) B` where an adapter is attached
    (`wan_jax/models/lora.py`).

    kernel [in, out] and bias [out] are stored in `dtype`; lora_a [in, r] and lora_b [r, out] in
    fp32, and computed in `dtype`. The adapter is never merged into the kernel: the reference model
    is the same arrays without it, and what an update adds is often less than the kernel's last bit.
    The scale is on the narrow side, part of the product.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kernel = (
            jax.random.normal(rngs.params(), (in_features, out_features), jnp.float32)
            * in_features**-0.5
        )
        self.kernel = nnx.Param(kernel.astype(dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None
        self.lora_a = nnx.data(None)  # set by lora.attach
        self.lora_b = nnx.data(None)
        self.lora_scale = 0.0
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:  # [..., in] -> [..., out]
        return joined([self], x)[0]


def joined(layers: Sequence[Linear], x: Array) -> list[Array]:
    """What each of several dense layers makes of the same x [..., in], in one product; [..., out]
    of each.

    One wide product fills a GPU better than narrow ones, and the adapters add up inside it: their
    first factors stand side by side, their second ones on the diagonal of one matrix. Layers of
    which only some have adapters or biases, or which scale them differently, are computed one by
    one.
    """
    first = layers[0]
    if len({(y.bias is None, y.lora_a is None, y.lora_scale) for y in layers}) > 1:
        return [joined([layer], x)[0] for layer in layers]
    x = x.astype(first.dtype)
    y = x @ beside([layer.kernel[...] for layer in layers])
    if first.bias is not None:
        y = y + beside([layer.bias[...] for layer in layers])
    if first.lora_a is not None:
        a, b = (
            [factor[...].astype(first.dtype) for factor in factors]
            for factors in zip(*((layer.lora_a, layer.lora_b) for layer in layers))
        )
        y = y + ((x @ beside(a)) * first.lora_scale) @ jax.scipy.linalg.block_diag(*b)
    y = checkpoint_name(y, MATMUL)
    return jnp.split(y, np.cumsum([layer.kernel.shape[-1] for layer in layers])[:-1], axis=-1)


def beside(arrays: Sequence[Array]) -> Array:
    """Side by side along the last axis."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in fp32, returned in x's
    dtype.
    """

    def __init__(self, features: int, *, eps: float = 1e-6, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Array, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) over the last axis, without parameters, in fp32; the result
    stays fp32.
    """
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """`layer_norm` with a scale and a bias, both kept in fp32; the result is returned in x's dtype."""

    def __init__(self, features: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return (layer_norm(x, self.eps) * self.scale[...] + self.bias[...]).astype(x.dtype)
