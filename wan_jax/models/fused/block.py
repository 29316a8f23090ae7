"""A transformer block whose products are joined by fused kernels: the same as `transformer.Block`, whose
modules it takes.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from wan_jax.models import fused
from wan_jax.models.attention import attention
from wan_jax.models.layers import (
    Dense,
    LayerNorm,
    Linear,
    RMSNorm,
    fused_dense,
    layer_norm_bound,
    uniform,
)
from wan_jax.models.positions import Positions
from wan_jax.models.quantised import QuantisedLinear, Rounded, rounded_type
from wan_jax.models.sharded_forward import self_attention


@runtime_checkable
class AttentionLayers(Protocol):
    """The parts of `transformer.Attention`."""

    to_q: Linear
    to_k: Linear
    to_v: Linear
    to_out_0: Linear
    norm_q: RMSNorm
    norm_k: RMSNorm
    heads: int
    backend: str


@runtime_checkable
class Projection(Protocol):
    """The parts of `transformer.GELUProjection`."""

    proj: Linear


@runtime_checkable
class FeedForwardLayers(Protocol):
    """The parts of `transformer.FeedForward`."""

    @property
    def net_0(self) -> Projection:
        """The first layer."""
        ...

    net_2: Linear

    def __call__(self, x: jax.Array, bound: jax.Array, /) -> jax.Array:
        """Compute the plain code."""
        ...


@runtime_checkable
class BlockLayers(Protocol):
    """The parts of `transformer.Block`."""

    @property
    def attn1(self) -> AttentionLayers:
        """Self-attention."""
        ...

    @property
    def attn2(self) -> AttentionLayers:
        """Cross-attention."""
        ...

    @property
    def ffn(self) -> FeedForwardLayers:
        """The feed-forward network."""
        ...

    norm2: LayerNorm
    eps: float


def forward(
    block: BlockLayers,
    x: Float[Array, "B S D"],
    context: Float[Array, "B St D"],
    modulation: Float32[Array, "B 6 D"],
    rope: Positions,
    key_counts: Int[np.ndarray, " St"] | None,
) -> Float[Array, "B S D"]:
    """Compute `Block.forward`. modulation: with the block's table added."""
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (
        modulation[:, i : i + 1] for i in range(6)
    )
    # modulated norm, self-attention
    layers = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
    fp8 = rounded_type(layers) if uniform(layers) else None
    bound = layer_norm_bound(x.shape[-1], 1 + scale_a, shift_a)
    spec = fused.NormSpec(block.eps, kept=True, fp8=fp8)
    first = fused.norm(spec, x, None, None, 1 + scale_a, shift_a, bound)
    out = attend(block.attn1, first.norm, first.norm, rope, bound=first.rounded or bound)
    # gated residual, norm, cross-attention
    scale, shift = (y[...][None, None] for y in (block.norm2.scale, block.norm2.bias))
    bound = block.norm2.bound
    spec = fused.NormSpec(block.norm2.eps, kept=True, fp8=rounded_type([block.attn2.to_q]))
    second = fused.norm(spec, x, out, gate_a, scale, shift, bound)
    bound = second.rounded or bound
    out = attend(block.attn2, second.norm, context, None, key_counts, bound=bound)
    # residual, modulated norm, feed-forward network, gated residual
    layers = [block.ffn.net_0.proj, block.ffn.net_2]
    fp8 = feed_forward_type(layers)
    bound = layer_norm_bound(x.shape[-1], 1 + scale_f, shift_f)
    spec = fused.NormSpec(block.eps, kept=fp8 is None, fp8=fp8)
    third = fused.norm(spec, second.x, out, None, 1 + scale_f, shift_f, bound)
    if third.rounded is None:
        y = block.ffn(third.norm, bound)
    else:
        y = fused.feed_forward(third.norm, third.rounded, *map(frozen, layers))
    return (third.x + y.astype(jnp.float32) * gate_f).astype(x.dtype)


def attend(
    layers: AttentionLayers,
    x: Float[Array, "B S D"],
    context: Float[Array, "B Sk D"],
    rope: Positions | None = None,
    key_counts: Int[np.ndarray, " Sk"] | None = None,
    *,
    bound: "Float32[Array, '...'] | Rounded",
) -> Dense:
    """Return what the result of `Attention.__call__` is made of.

    bound: of |x|, or x as it was rounded to fp8.
    """

    def split(y):
        return y.reshape(*y.shape[:2], layers.heads, -1)

    # the layers of x, with what follows each of them
    rotated = rope is not None
    own: dict[str, tuple[Linear, jax.Array | None, fused.Head]]
    own = {"q": (layers.to_q, layers.norm_q.scale[...], fused.Head(True, rotated))}
    if rope is not None:
        own["k"] = layers.to_k, layers.norm_k.scale[...], fused.Head(True, rotated)
        own["v"] = layers.to_v, None, fused.Head(False, False)
    names, found = list(own), {}
    joined = uniform([layer for layer, *_ in own.values()])
    for group in [names] if joined else [[name] for name in names]:
        linear, weights, heads = zip(*(own[name] for name in group))
        results = fused.heads(
            fused.HeadsSpec(heads, x.shape[-1] // layers.heads, layers.norm_q.eps),
            Dense.of(linear, x, bound),
            [weight for weight in weights if weight is not None],
            *((rope.cos, rope.sin) if rope is not None else ()),
        )
        found |= zip(group, map(split, results))
    if rope is None:
        k, v = fused_dense([layers.to_k, layers.to_v], context)
        k, v = split(layers.norm_k(k)), split(v)
        out = attention(found["q"], k, v, backend=layers.backend, key_counts=key_counts)
    else:
        q, k, v = (found[name] for name in names)
        out = self_attention(q, k, v, backend=layers.backend, tokens=rope.tokens)
    return Dense.of([layers.to_out_0], out.reshape(x.shape))


def feed_forward_type(layers: Sequence[Linear]) -> np.dtype | None:
    """Return the fp8 type of `fused.feed_forward`; None where it cannot compute: not in 8 bits, or with
    adapters.
    """
    if any(layer.lora_a is not None for layer in layers):
        return None
    types = {rounded_type([layer]) for layer in layers}
    return types.pop() if len(types) == 1 else None


def frozen(layer: Linear) -> fused.FrozenDense:
    """Return the arrays of a dense layer in 8 bits."""
    assert isinstance(layer, QuantisedLinear) and layer.bias is not None
    return fused.FrozenDense(layer.quantised[...], layer.quantised_scale[...], layer.bias[...])
