"""The Wan diffusion transformer (Diffusers `WanTransformer3DModel`), for text to video.

Arrays are channels-last; a video has S = F*(H/2)*(W/2) tokens. Letters: see `wan_jax`; St text
rows.

Precision (that of Diffusers with `torch_dtype=bfloat16`): weights, matrix products and the residual
stream in `dtype`; the time embedding, the scale_shift_tables, norms, modulation, softmax and RoPE
in fp32.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from wan_jax.models.attention import attention, save_attention
from wan_jax.models.config import TransformerConfig
from wan_jax.models.gelu_kernel import gelu_rows
from wan_jax.models.layers import (
    MATMUL,
    LayerNorm,
    Linear,
    LoRAParam,
    RMSNorm,
    Rounded,
    fused_dense,
    gelu,
    gelu_bound,
    layer_norm,
    layer_norm_bound,
)
from wan_jax.models.positions import Positions, apply_rope, rope_table, timestep_features
from wan_jax.models.quantised import Quantisation, QuantisedLinear, dense, scaled
from wan_jax.models.sharded_forward import Gather, Layout, saved_but_gathers, self_attention

RESIDUAL = "residual"  # name of the input of a block, for rematerialisation policies
# What a block saves for the backward pass; the rest is rematerialised (computed again).
REMAT_POLICIES = {
    # everything
    "none": None,
    # only the input of the block
    "block": jax.checkpoint_policies.nothing_saveable,
    # the input and the results of dense layers and of attention: norms and activations are
    # rematerialised
    "save_matmuls": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(MATMUL), save_attention
    ),
    # only the input, offloaded to host memory
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Attention(nnx.Module):
    """Self- or cross-attention with biased q, k, v, o; q and k are RMS-normed over the full width
    before they are split into heads.
    """

    def __init__(
        self, config: TransformerConfig, linear: Callable[..., Linear], *, dtype, backend: str
    ):
        d = config.width
        self.to_q = linear(d, d)
        self.to_k = linear(d, d)
        self.to_v = linear(d, d)
        self.to_out_0 = linear(d, d)
        self.norm_q = RMSNorm(d, eps=config.eps, dtype=dtype)
        self.norm_k = RMSNorm(d, eps=config.eps, dtype=dtype)
        self.heads = config.num_attention_heads
        self.backend = backend

    def __call__(
        self,
        x: Float[Array, "B S D"],
        context: Float[Array, "B Sk D"],
        rope: Positions | None = None,
        key_counts: Int[np.ndarray, " Sk"] | None = None,
        *,
        bound: Float32[Array, "..."],
    ) -> Float[Array, "B S D"]:
        """Attend from x to `context`; with `rope` it is self-attention, and `context` must be x.

        bound: of |x|, as in `fused_dense`.
        """

        def split(y):
            return y.reshape(*y.shape[:2], self.heads, -1)

        if rope is None:
            q = self.to_q(x, bound)
            k, v = fused_dense([self.to_k, self.to_v], context)
        else:
            q, k, v = fused_dense([self.to_q, self.to_k, self.to_v], x, bound)
        q, k, v = split(self.norm_q(q)), split(self.norm_k(k)), split(v)
        if rope is None:
            out = attention(q, k, v, backend=self.backend, key_counts=key_counts)
        else:
            q, k = (apply_rope(y, rope.cos, rope.sin) for y in (q, k))
            out = self_attention(q, k, v, backend=self.backend, tokens=rope.tokens)
        return self.to_out_0(out.reshape(x.shape))


class GELUProjection(nnx.Module):
    """The first half of the feed-forward network: a dense layer, then tanh-approximated GELU
    (`ffn.net.0`).

    saved: whether the update saves the result of the dense layer, rounded to `dtype`. The rollout
    must then round before GELU too, or the importance ratio of the first update would deviate from
    1 by 1e-4 in bfloat16. Products in 8 bits are always rounded first.
    """

    def __init__(self, d: int, f: int, linear: Callable[..., Linear], *, saved: bool):
        self.proj = linear(d, f)
        self.saved = saved and not self.proj.in_8bit([self.proj])

    def __call__(
        self, x: Float[Array, "B S D"], bound: Float32[Array, "..."]
    ) -> tuple[Float[Array, "B S ffn_dim"], Float32[Array, "B S 1"] | Rounded]:
        """Return the result, and a bound of its absolute values or its rounded values, as
        `fused_dense` takes them.
        """
        proj, rounded = self.proj, None
        if isinstance(proj, QuantisedLinear) and proj.has_kernel:
            parts = proj.parts(x, bound)
            rounded = gelu_rows(*jax.lax.stop_gradient(parts), proj.quantisation.dtype)
            y = scaled(*parts).astype(x.dtype)  # its value is used by the gradient alone
        else:
            y = proj(x, bound)
        if self.saved:
            y = jax.lax.optimization_barrier(y)
        rounded = rounded or gelu_bound(y.max(-1, keepdims=True))
        if not proj.in_8bit([proj]):
            return jax.nn.gelu(y, approximate=True), rounded
        # in fp32 and rounded once: less work for a GPU
        return gelu(y.astype(jnp.float32)).astype(y.dtype), rounded


class FeedForward(nnx.Module):
    """Dense layer, GELU, dense layer."""

    def __init__(self, config: TransformerConfig, linear: Callable[..., Linear], *, saved: bool):
        self.net_0 = GELUProjection(config.width, config.ffn_dim, linear, saved=saved)
        self.net_2 = linear(config.ffn_dim, config.width)

    def __call__(
        self, x: Float[Array, "B S D"], bound: Float32[Array, "..."]
    ) -> Float[Array, "B S D"]:
        return self.net_2(*self.net_0(x, bound))


class Block(nnx.Module):
    """Modulated self-attention, cross-attention to the text, modulated feed-forward network."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype,
        backend: str,
        saved: bool,
        quantisation: Quantisation | None,
        rngs: nnx.Rngs,
    ):
        d = config.width
        linear = partial(dense, quantisation, dtype=dtype, rngs=rngs)
        self.scale_shift_table = nnx.Param(
            jax.random.normal(rngs.params(), (1, 6, d), jnp.float32) * d**-0.5
        )
        self.attn1 = Attention(config, linear, dtype=dtype, backend=backend)
        self.norm2 = LayerNorm(d, eps=config.eps)
        self.attn2 = Attention(config, linear, dtype=dtype, backend=backend)
        self.ffn = FeedForward(config, linear, saved=saved)
        self.eps = config.eps
        self.gather: Gather | None = None  # set by sharded_forward.attach

    def __call__(
        self,
        x: Float[Array, "B S D"],
        context: Float[Array, "B St D"],
        modulation: Float32[Array, "B 6 D"],
        rope: Positions,
        key_counts: Int[np.ndarray, " St"] | None,
    ) -> Float[Array, "B S D"]:
        gather = self.gather
        if gather is None:
            return self.forward(x, context, modulation, rope, key_counts)

        def gathered(x, context, modulation):
            return gather.module(self).forward(x, context, modulation, rope, key_counts)

        if gather.again:
            gathered = jax.checkpoint(gathered, prevent_cse=False, policy=saved_but_gathers)
        return gathered(x, context, modulation)

    def forward(
        self,
        x: Float[Array, "B S D"],
        context: Float[Array, "B St D"],
        modulation: Float32[Array, "B 6 D"],
        rope: Positions,
        key_counts: Int[np.ndarray, " St"] | None,
    ) -> Float[Array, "B S D"]:
        """Compute the block with gathered (whole) parameters."""
        m = self.scale_shift_table[...] + modulation
        # of the attention and of the feed-forward network, each [B,1,D]
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (m[:, i : i + 1] for i in range(6))
        h = (layer_norm(x, self.eps) * (1 + scale_a) + shift_a).astype(x.dtype)
        bound = layer_norm_bound(x.shape[-1], 1 + scale_a, shift_a)
        x = (x + self.attn1(h, h, rope, bound=bound) * gate_a).astype(x.dtype)
        h = self.norm2(x)
        x = x + self.attn2(h, context, key_counts=key_counts, bound=self.norm2.bound)
        h = (layer_norm(x, self.eps) * (1 + scale_f) + shift_f).astype(x.dtype)
        bound = layer_norm_bound(x.shape[-1], 1 + scale_f, shift_f)
        return (x + self.ffn(h, bound).astype(jnp.float32) * gate_f).astype(x.dtype)


class TimestepEmbedding(nnx.Module):
    """Dense layer, SiLU, dense layer on `timestep_features`, in fp32."""

    def __init__(self, freq_dim: int, d: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(freq_dim, d, dtype=jnp.float32, rngs=rngs)
        self.linear_2 = Linear(d, d, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float32[Array, "B freq_dim"]) -> Float32[Array, "B D"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class TextProjection(nnx.Module):
    """Dense layer, GELU, dense layer on the text embeddings."""

    def __init__(self, text_dim: int, d: int, *, dtype, rngs: nnx.Rngs):
        self.linear_1 = Linear(text_dim, d, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(d, d, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B St text_dim"]) -> Float[Array, "B St D"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=True))


class ConditionEmbedder(nnx.Module):
    """The embeddings of timesteps and text, in `dtype`: temb, modulation of the blocks, context."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        d = config.width
        self.time_embedder = TimestepEmbedding(config.freq_dim, d, rngs=rngs)
        self.time_proj = Linear(d, 6 * d, dtype=dtype, rngs=rngs)
        self.text_embedder = TextProjection(config.text_dim, d, dtype=dtype, rngs=rngs)
        self.freq_dim = config.freq_dim
        self.dtype = dtype

    def __call__(
        self, timesteps: Float[Array, " B"], text: Float[Array, "B St text_dim"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B 6 D"], Float[Array, "B St D"]]:
        temb = self.time_embedder(timestep_features(timesteps, self.freq_dim)).astype(self.dtype)
        modulation = self.time_proj(jax.nn.silu(temb))
        return temb, modulation.reshape(temb.shape[0], 6, -1), self.text_embedder(text)


class WanTransformer3D(nnx.Module):
    """The transformer: velocity = model(latents, timesteps, text).

    Args:
        config: its sizes.
        dtype: storage and compute type of the weights (the module's docstring lists what is fp32).
        attention: a concrete backend, of `attention.choose_backend`.
        remat: one of `REMAT_POLICIES`. 'block' needs the activation memory of one block, and one
            residual stream per layer.
        quantisation: how the dense layers of the blocks are stored; None: in `dtype`.
        rngs: for random weights.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype=jnp.bfloat16,
        attention: str = "xla",
        remat: str = "none",
        quantisation: Quantisation | None = None,
        rngs: nnx.Rngs,
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(
                f"remat={remat!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}"
            )
        d = config.width
        patch = math.prod(config.patch_size)
        # see GELUProjection; in fp32 nothing is rounded
        saved = remat in ("none", "save_matmuls") and jnp.dtype(dtype).itemsize == 2

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs):
            return Block(
                config,
                dtype=dtype,
                backend=attention,
                saved=saved,
                quantisation=quantisation,
                rngs=rngs,
            )

        self.patch_embedding = Linear(patch * config.in_channels, d, dtype=dtype, rngs=rngs)
        self.condition_embedder = ConditionEmbedder(config, dtype=dtype, rngs=rngs)
        self.blocks = make_blocks(rngs)
        self.scale_shift_table = nnx.Param(
            jax.random.normal(rngs.params(), (1, 2, d), jnp.float32) * d**-0.5
        )
        self.proj_out = Linear(d, patch * config.out_channels, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.layout: Layout | None = None  # set by sharded_forward.attach

    def __call__(
        self,
        latents: Float[Array, "B F H W C"],
        timesteps: Float[Array, " B"],
        text: Float[Array, "B St text_dim"],
        *,
        text_padding: int = 0,
    ) -> Float32[Array, "B F H W out_channels"]:
        """Return the velocity.

        timesteps: on the 0..1000 scale. text_padding: number of zero rows after the St given ones.
        Wan attends to the padding, so St + text_padding must be the length that the model was
        trained with (512). The zero rows are computed once and counted.
        """
        if self.layout is None:
            return self.forward(latents, timesteps, text, text_padding)
        return self.layout.run(self, latents, timesteps, text, text_padding)

    def forward(
        self,
        latents: Float[Array, "B F H W C"],
        timesteps: Float[Array, " B"],
        text: Float[Array, "B St text_dim"],
        text_padding: int,
    ) -> Float32[Array, "B F H W out_channels"]:
        """Compute the velocity from whole arrays, or inside `Layout.run` from the videos and
        parameters of one device.
        """
        config = self.config
        b, f, h, w, _ = latents.shape
        _, ph, pw = config.patch_size
        grid = (f, h // ph, w // pw)

        # Text: one zero row stands for all of the padding.
        key_counts = None
        if text_padding:
            text = jnp.pad(text, ((0, 0), (0, 1), (0, 0)))
            key_counts = np.array([1] * (text.shape[1] - 1) + [text_padding])

        # Patches of the latents as tokens, and their positions.
        x = latents.astype(self.dtype).reshape(b, f, grid[1], ph, grid[2], pw, -1)
        x = x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, math.prod(grid), -1)  # [B,S,(ph pw C)]
        rope = Positions(*rope_table(grid, config.attention_head_dim, config.rope_max_seq_len))
        layout = self.layout
        if layout is not None and layout.mesh.shape["context"] == 1:
            layout = None  # the tokens are not split
        if layout is not None:  # from here on S counts the rows of this device
            x = layout.own_tokens(x, 1)
            cos = layout.own_tokens(rope.cos, 0)
            sin = layout.own_tokens(rope.sin, 0)
            rope = Positions(cos, sin, math.prod(grid))
        x = self.patch_embedding(x)  # [B,S,D]
        temb, modulation, context = self.condition_embedder(timesteps, text)
        modulation = modulation.astype(jnp.float32)

        # The blocks; adapters are cast for all blocks at once.
        graphdef, adapters, params = nnx.split(self.blocks, LoRAParam, ...)
        adapters = jax.tree.map(lambda factor: factor.astype(self.dtype), adapters)

        def run_block(x, block_params):
            x = checkpoint_name(x, RESIDUAL)
            return nnx.merge(graphdef, *block_params)(
                x, context, modulation, rope, key_counts
            ), None

        if policy := REMAT_POLICIES[self.remat]:
            run_block = jax.checkpoint(run_block, prevent_cse=False, policy=policy)
        x, _ = jax.lax.scan(run_block, x, (adapters, params))

        # Modulated output layer, and patches back to latents.
        m = self.scale_shift_table[...] + temb.astype(jnp.float32)[:, None]  # [B,2,D]
        x = (layer_norm(x, config.eps) * (1 + m[:, 1:]) + m[:, :1]).astype(self.dtype)
        x = self.proj_out(x)  # [B,S,(ph pw C)]
        if layout is not None:
            x = layout.all_tokens(x, math.prod(grid))
        x = x.reshape(b, f, grid[1], grid[2], ph, pw, -1).transpose(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(b, f, h, w, -1).astype(jnp.float32)
