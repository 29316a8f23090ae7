"""The layers that the transformer and the text encoder share: dense layers, RMS norm, layer norm.

Parameters are named as in the published state dict, with Flax's names for the last part (`weight`
is `kernel`, `scale` or `embedding`): see `wan_jax/storage/key_table.py`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

MATMUL = "matmul"  # name of the result of a dense layer, for rematerialisation policies


class LoRAParam(nnx.Param):
    """A trainable low-rank factor; a variable type of its own, so that `nnx.split(model, LoRAParam,
    ...)` selects it.
    """


class Rounded(NamedTuple):
    """An array [..., n] that was rounded to fp8 by rows: its values, and their scales [..., 1]. Takes
    the place of a bound where what comes before it has rounded it.
    """

    values: jax.Array
    scale: jax.Array


class Linear(nnx.Module):
    """y = x W + b in `dtype`, plus `(lora_scale * (x A)) B` if an adapter is attached
    (`wan_jax/models/lora.py`).

    kernel [in, out] and bias [out] are stored in `dtype`; lora_a [in, rank] and lora_b [rank, out]
    in fp32, and computed in `dtype`. The adapter is never merged into the kernel: the reference
    model is the same arrays without it, and an update is often less than the last bit of the
    kernel. The scale is applied on the narrow side, where it costs least.
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
        self.lora_a: LoRAParam | None = nnx.data(None)  # set by lora.attach
        self.lora_b: LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of the weights: (layers,) of scanned blocks outside of the scan."""
        return self.kernel.shape[:-2]

    @staticmethod
    def in_8bit(layers: Sequence["Linear"]) -> bool:
        """Return whether `product` is computed in 8 bits. It is then in fp32, and has a name for
        rematerialisation policies.
        """
        return False

    @staticmethod
    def product(
        layers: Sequence["Linear"],
        x: Float[Array, "*batch n_in"],
        bound: jax.Array | Rounded | None = None,
    ) -> jax.Array:
        """Return x times the weights of several layers, side by side, in the dtype of x, or in fp32
        if `in_8bit`.

        bound: as in `fused_dense`.
        """
        return x @ concatenate([layer.kernel[...] for layer in layers])

    def __call__(
        self, x: Float[Array, "*batch n_in"], bound: jax.Array | Rounded | None = None
    ) -> Float[Array, "*batch n_out"]:
        return fused_dense([self], x, bound)[0]


def fused_dense(
    layers: Sequence[Linear],
    x: Float[Array, "*batch n_in"],
    bound: jax.Array | Rounded | None = None,
) -> list[Float[Array, "*batch _"]]:
    """Return the result of each of several dense layers for the same x, computed as one product.

    One wide product uses a GPU better than narrow ones. Adapters are fused too: their first factors
    are concatenated, their second ones are the blocks of a block-diagonal matrix. Layers are
    computed separately if only some have adapters or biases, or if their scales differ.

    bound: of |x|, fp32 [..., 1], or x as it was rounded; None: not known. Products in 8 bits then
        compute it.
    """
    first = layers[0]
    if len({(y.bias is None, y.lora_a is None, y.lora_scale) for y in layers}) > 1:
        return [fused_dense([layer], x, bound)[0] for layer in layers]
    x = x.astype(first.dtype)
    y, in_8bit = first.product(layers, x, bound), first.in_8bit(layers)
    # Either all of these layers have a bias, or none; and so for adapters.
    if first.bias is not None:
        y = y + concatenate([layer.bias[...] for layer in layers if layer.bias is not None])
    if first.lora_a is not None:
        a = [layer.lora_a[...].astype(first.dtype) for layer in layers if layer.lora_a is not None]
        b = [layer.lora_b[...].astype(first.dtype) for layer in layers if layer.lora_b is not None]
        narrow = (x @ concatenate(a)) * first.lora_scale
        if in_8bit:
            narrow = checkpoint_name(narrow, MATMUL)
        y = y + narrow @ jax.scipy.linalg.block_diag(*b)
    y = y.astype(first.dtype)
    if not in_8bit:
        y = checkpoint_name(y, MATMUL)
    return jnp.split(y, np.cumsum([layer.out_features for layer in layers])[:-1], axis=-1)


def gelu(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Return tanh-approximated GELU with 1 + tanh(z) = 2 sigmoid(2 z): less work for a GPU."""
    return x * jax.nn.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3))


def gelu_bound(largest: Float[Array, "..."]) -> Float32[Array, "..."]:
    """Return a bound of |GELU| of values up to `largest`: it is between -0.171 and 0 for negative
    values, below the identity for positive ones.
    """
    return jnp.maximum(largest, 0.25).astype(jnp.float32)


def concatenate(arrays: Sequence[Array]) -> Array:
    """Concatenate along the last axis; a single array is returned as it is."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in fp32, returned in the dtype
    of x.
    """

    def __init__(self, features: int, *, eps: float = 1e-6, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Float[Array, "*batch D"], eps: float) -> Float32[Array, "*batch D"]:
    """Return (x - mean) / sqrt(var + eps) over the last axis, computed in fp32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def layer_norm_bound(
    features: int, scale: Float32[Array, "... D"], shift: Float32[Array, "... D"]
) -> Float32[Array, "... 1"]:
    """Return a bound of |layer_norm(x) * scale + shift|: no normalised value exceeds sqrt(D)."""
    largest_scale, largest_shift = (jnp.abs(y).max(-1, keepdims=True) for y in (scale, shift))
    return features**0.5 * largest_scale + largest_shift


class LayerNorm(nnx.Module):
    """`layer_norm` with an fp32 scale and bias, returned in the dtype of x."""

    def __init__(self, features: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return (layer_norm(x, self.eps) * self.scale[...] + self.bias[...]).astype(x.dtype)

    @property
    def bound(self) -> Float32[Array, " 1"]:
        """`layer_norm_bound` of the result."""
        scale, shift = self.scale[...], self.bias[...]
        return layer_norm_bound(scale.shape[-1], scale, shift)
