"""UMT5 text encoder of the Wan models (transformers `UMT5EncoderModel`).

Embedding lookup, L pre-norm layers of self-attention and gated-GELU feed-forward network, final RMS
norm. Differences from other encoders, each of which gives plausible but wrong hidden states when it
is missed:

* every layer has its own table of relative positions (T5 shares that of the first layer);
* attention scores are not divided by sqrt(head_dim), and the embedding is not multiplied by
  sqrt(D);
* no dense layer has a bias, and norms are RMS norms without mean;
* the GELU is the tanh approximation.

Shapes: B prompts, St text tokens, D width, N heads, L layers; d_kv is the size of a head. All L
layers are stacked on axis 0 of `encoder/block/*` and run by `lax.scan`, so one layer is compiled
instead of 24.

Precision: parameters, matrix products and the residual stream are in `dtype`; norms and the softmax
in fp32. Dropout, which Wan never uses, is left out.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from wan_jax.models.config import TextEncoderConfig
from wan_jax.models.layers import Linear, RMSNorm


def relative_buckets(
    length: int, num_buckets: int, max_distance: int
) -> Int32[np.ndarray, "length length"]:
    """Return the bucket of the distance key - query for all pairs [query, key].

    Bidirectional T5 buckets (Raffel et al. 2020, section 2.1): the upper half is for keys to the
    right. Within a half of h = num_buckets / 2, distances n < h/2 have one bucket each, and larger
    ones share logarithmic buckets, h/2 + floor(log(n / (h/2)) / log(max_distance / (h/2)) * h/2);
    the last one has all from max_distance on. In NumPy and fp32, the precision of the original,
    because a different rounding could change the floor of the logarithm.
    """
    position = np.arange(length, dtype=np.int32)
    distance = position[None, :] - position[:, None]  # [St, St]
    half = num_buckets // 2
    exact = half // 2
    n = np.abs(distance)
    ratio = np.log(np.maximum(n, exact).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return np.where(n < exact, n, far) + half * (distance > 0).astype(np.int32)


class Embedding(nnx.Module):
    """A lookup table [rows, features], initialised normal(0, std).

    A small table is read by a one-hot product, because the gradient of a lookup adds the row of
    every token with atomic operations, which collide when a few rows are used by all. On an H200
    the one-hot product took the training step of examples/tiny_wan, 110,000 characters, from 190 to
    70 ms.
    """

    def __init__(self, rows: int, features: int, *, std: float, dtype, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            (jax.random.normal(rngs.params(), (rows, features)) * std).astype(dtype)
        )

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        table = self.embedding[...]
        if table.shape[0] > 512:
            return table[ids]
        return jnp.matmul(
            jax.nn.one_hot(ids, table.shape[0], dtype=table.dtype), table, precision="highest"
        )


class SelfAttention(nnx.Module):
    """softmax(q k^T + bias[bucket(key - query)]) v with scale 1; padded keys are masked, softmax in
    fp32.

    The initialisation is T5's: because scores are not scaled, q is smaller by d_kv^-0.5.
    """

    def __init__(self, config: TextEncoderConfig, *, dtype, rngs: nnx.Rngs):
        d = config.d_model
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = Linear(d, inner, bias=False, dtype=dtype, rngs=rngs)
        self.q.kernel = nnx.Param(self.q.kernel[...] * config.d_kv**-0.5)
        self.k = Linear(d, inner, bias=False, dtype=dtype, rngs=rngs)
        self.v = Linear(d, inner, bias=False, dtype=dtype, rngs=rngs)
        self.o = Linear(inner, d, bias=False, dtype=dtype, rngs=rngs)
        self.relative_attention_bias = Embedding(
            config.relative_attention_num_buckets,
            config.num_heads,
            std=d**-0.5,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B St D"],
        buckets: Int32[Array, "St St"],
        mask: Bool[Array, "B St"],
    ) -> Float[Array, "B St D"]:
        def split_heads(y):
            return y.reshape(*y.shape[:2], self.heads, -1)  # [B, St, N, d_kv]

        q, k, v = split_heads(self.q(x)), split_heads(self.k(x)), split_heads(self.v(x))
        scores = jnp.einsum("bqnk,btnk->bnqt", q, k, preferred_element_type=jnp.float32)
        bias = self.relative_attention_bias(buckets).astype(jnp.float32)  # [St, St, N]
        scores = scores + bias.transpose(2, 0, 1)  # [B, N, St, St]
        # finite, so that a row without any valid key gives numbers that `encode` zeroes, not NaN
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("bnqt,btnk->bqnk", weights, v)
        return self.o(y.reshape(*y.shape[:2], -1))


class GatedFeedForward(nnx.Module):
    """wo(gelu_tanh(wi_0 x) * wi_1 x)."""

    def __init__(self, config: TextEncoderConfig, *, dtype, rngs: nnx.Rngs):
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False, dtype=dtype, rngs=rngs)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False, dtype=dtype, rngs=rngs)
        self.wo = Linear(config.d_ff, config.d_model, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B St D"]) -> Float[Array, "B St D"]:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class AttentionLayer(nnx.Module):
    """`layer_0` of a block: x + SelfAttention(norm(x))."""

    def __init__(self, config: TextEncoderConfig, *, dtype, rngs: nnx.Rngs):
        self.SelfAttention = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B St D"],
        buckets: Int32[Array, "St St"],
        mask: Bool[Array, "B St"],
    ) -> Float[Array, "B St D"]:
        return x + self.SelfAttention(self.layer_norm(x), buckets, mask)


class FeedForwardLayer(nnx.Module):
    """`layer_1` of a block: x + FFN(norm(x))."""

    def __init__(self, config: TextEncoderConfig, *, dtype, rngs: nnx.Rngs):
        self.DenseReluDense = GatedFeedForward(config, dtype=dtype, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(self, x: Float[Array, "B St D"]) -> Float[Array, "B St D"]:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nnx.Module):
    """One layer of the encoder."""

    def __init__(self, config: TextEncoderConfig, dtype, rngs: nnx.Rngs):
        self.layer_0 = AttentionLayer(config, dtype=dtype, rngs=rngs)
        self.layer_1 = FeedForwardLayer(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B St D"],
        buckets: Int32[Array, "St St"],
        mask: Bool[Array, "B St"],
    ) -> Float[Array, "B St D"]:
        return self.layer_1(self.layer_0(x, buckets, mask))


class Stack(nnx.Module):
    """The L blocks, stacked on axis 0 of every parameter of `block`, and the final norm."""

    def __init__(self, config: TextEncoderConfig, *, dtype, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs):
            return Block(config, dtype, rngs)

        self.block = make_blocks(rngs)
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B St D"],
        buckets: Int32[Array, "St St"],
        mask: Bool[Array, "B St"],
    ) -> Float[Array, "B St D"]:
        graph, params = nnx.split(self.block)  # params: every leaf [L, ...]

        def layer(x, params):
            return nnx.merge(graph, params)(x, buckets, mask), None

        x, _ = jax.lax.scan(layer, x, params)
        return self.final_layer_norm(x)


class UMT5Encoder(nnx.Module):
    """Token ids to hidden states. Use `encode` for the input of the Wan transformer.

    `dtype` is that of parameters and computation. The initialisation is T5's, fit for training from
    scratch.
    """

    def __init__(self, config: TextEncoderConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, std=1.0, dtype=dtype, rngs=rngs)
        self.encoder = Stack(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: Int[Array, "B St"], mask: Bool[Array, "B St"] | Int[Array, "B St"]
    ) -> Float[Array, "B St D"]:
        """Return the hidden states in `dtype`; mask: nonzero for a token.

        Rows after the mask have no meaning; rows within it do not depend on St.
        """
        config = self.config
        buckets = jnp.asarray(
            relative_buckets(
                ids.shape[1],
                config.relative_attention_num_buckets,
                config.relative_attention_max_distance,
            )
        )
        return self.encoder(self.shared(ids), buckets, mask.astype(bool))


def encode(
    model: UMT5Encoder, ids: Int[Array, "B St"], mask: Bool[Array, "B St"] | Int[Array, "B St"]
) -> Float[Array, "B St D"]:
    """Return the hidden states, zero in the rows after the mask, as Diffusers'
    `WanPipeline._get_t5_prompt_embeds`.

    The transformer has no text mask and attends to the zero rows too, so St is part of the model:
    it must be the length that the model was trained with (512 for the published ones).
    """
    return jnp.where(mask.astype(bool)[..., None], model(ids, mask), 0)
