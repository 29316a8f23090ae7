"""The layers that the transformer and the text encoder share: dense, RMS norm, layer norm.

Parameters are named as the published state dict names them, up to Flax's words (`weight` is `kernel`, `scale` or
`embedding`): see `convert/key_table.py`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
MATMUL = "matmul"  # a dense layer's result, as rematerialisation knows it


class LoRAParam(nnx.Param):
    """A trainable low-rank factor; a variable type of its own, so that `nnx.split(model, LoRAParam, ...)` finds it."""


class Linear(nnx.Module):
    """y = x W + b in `dtype`, plus `lora_scale * (x A) B` where an adapter is attached (`wan_jax/lora.py`).

    kernel [in, out] and bias [out] are stored in `dtype`; lora_a [in, r] and lora_b [r, out] in fp32, and computed in
    `dtype`. The adapter is never merged into the kernel: the reference model is the same arrays without it.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), (in_features, out_features), jnp.float32) * in_features**-0.5
        self.kernel = nnx.Param(kernel.astype(dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None
        self.lora_a = nnx.data(None)  # set by lora.attach
        self.lora_b = nnx.data(None)
        self.lora_scale = 0.0
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:  # [..., in] -> [..., out]
        x = x.astype(self.dtype)
        y = x @ self.kernel[...]
        if self.bias is not None:
            y = y + self.bias[...]
        if self.lora_a is not None:
            low = x @ self.lora_a[...].astype(self.dtype)  # [..., r]
            y = y + (low @ self.lora_b[...].astype(self.dtype)) * self.lora_scale
        return checkpoint_name(y, MATMUL)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in fp32, returned in x's dtype."""

    def __init__(self, features: int, *, eps: float = 1e-6, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Array, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) over the last axis, without parameters, in fp32; the result stays fp32."""
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
