"""The Wan diffusion transformer (Diffusers `WanTransformer3DModel`), for text to video.

Shapes: B videos, F latent frames, H W latent height and width, C channels, S = F*(H/2)*(W/2)
tokens, D width, N heads, L layers. Layout is channels-last.

Precision (Diffusers' own under `torch_dtype=bfloat16`): weights and matrix products in `dtype`; the
time embedding, the scale_shift_tables, norms, modulation, softmax and RoPE in fp32; the residual
stream in `dtype`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from wan_jax.distributed.sharding import saved_but_gathers, self_attention
from wan_jax.models.attention import attention
from wan_jax.models.config import TransformerConfig
from wan_jax.models.layers import MATMUL, LayerNorm, Linear, LoRAParam, RMSNorm, joined, layer_norm

Array = jax.Array
RESIDUAL = "residual"  # a block's input, as rematerialisation knows it
# What of a block's forward pass the backward pass finds: everything; the block's input; that and
# the results of all dense layers, so that only norms, activations and attention are computed again;
# the input, waiting in host memory.
REMAT_POLICIES = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "save_matmuls": jax.checkpoint_policies.save_only_these_names(MATMUL),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rope_table(
    grid: tuple[int, int, int], head_dim: int, max_len: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [S, head_dim/2] fp32 for a token grid (F, H/2, W/2), tokens row-major.

    head_dim splits into rotation pairs for time, height and width (22+21+21 of 64 for head_dim
    128); each axis has its own frequencies 10000^(-2i/dim_axis) and positions from 0. Angles in
    float64, as Diffusers.
    """
    if max(grid) > max_len:
        raise ValueError(
            f"token grid {grid} exceeds rope_max_seq_len {max_len}; use fewer frames or a smaller "
            "size"
        )
    hw_dim = 2 * (head_dim // 6)
    dims = (head_dim - 2 * hw_dim, hw_dim, hw_dim)
    angles = []
    for axis, (size, dim) in enumerate(zip(grid, dims)):
        freqs = 10000.0 ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        angle = np.arange(size, dtype=np.float64)[:, None] * freqs  # [size, dim/2]
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(np.broadcast_to(angle.reshape(shape), (*grid, dim // 2)))
    angle = np.concatenate(angles, axis=-1).reshape(-1, head_dim // 2)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def apply_rope(x: Array, cos: np.ndarray | Array, sin: np.ndarray | Array) -> Array:
    """Rotates the interleaved pairs (x0, x1), (x2, x3), ... of x [B, S, N, head_dim] in fp32; x's
    dtype is kept.

    Each value times its cosine plus its neighbour times the signed sine: reads and writes stay in
    order, where taking the pairs apart and stacking them again makes GPUs write every other value.
    """
    # constants of the program, or a device's rows of them
    xp = np if isinstance(cos, np.ndarray) else jnp
    c = xp.repeat(cos, 2, axis=-1)[:, None]  # [S, 1, head_dim]
    s = xp.stack([-sin, sin], axis=-1).reshape(c.shape)
    y = x.astype(jnp.float32)
    neighbour = y.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return (y * c + neighbour * s).astype(x.dtype)


def timestep_features(timesteps: Array, dim: int) -> Array:
    """[cos | sin] of t * exp(-ln(10000) i / (dim/2)), fp32 [B, dim]; t is on the 0..1000 scale."""
    half = dim // 2
    freqs = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = timesteps.astype(jnp.float32)[:, None] * freqs
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Positions(NamedTuple):
    """The rows' places: rotary angles, and where the rows are a device's share of a video's tokens,
    their number S.
    """

    cos: Array  # fp32 [S, head_dim/2]
    sin: Array
    tokens: int | None = None


class Attention(nnx.Module):
    """Self- or cross-attention: biased q, k, v, o; q and k RMS-normed over the full width before
    the head split.
    """

    def __init__(self, config: TransformerConfig, *, dtype, backend: str, rngs: nnx.Rngs):
        d = config.width
        self.to_q = Linear(d, d, dtype=dtype, rngs=rngs)
        self.to_k = Linear(d, d, dtype=dtype, rngs=rngs)
        self.to_v = Linear(d, d, dtype=dtype, rngs=rngs)
        self.to_out_0 = Linear(d, d, dtype=dtype, rngs=rngs)
        self.norm_q = RMSNorm(d, eps=config.eps, dtype=dtype)
        self.norm_k = RMSNorm(d, eps=config.eps, dtype=dtype)
        self.heads = config.num_attention_heads
        self.backend = backend

    def __call__(
        self, x: Array, context: Array, rope: Positions | None = None, key_counts=None
    ) -> Array:
        # [B,S,D], [B,Sk,D] -> [B,S,D]; self-attention where there is a rope
        def split(y):
            return y.reshape(*y.shape[:2], self.heads, -1)

        if rope is None:
            q, (k, v) = self.to_q(x), joined([self.to_k, self.to_v], context)
        else:
            q, k, v = joined([self.to_q, self.to_k, self.to_v], x)
        q, k, v = split(self.norm_q(q)), split(self.norm_k(k)), split(v)
        if rope is None:
            out = attention(q, k, v, backend=self.backend, key_counts=key_counts)
        else:
            q, k = (apply_rope(y, rope.cos, rope.sin) for y in (q, k))
            out = self_attention(q, k, v, backend=self.backend, tokens=rope.tokens)
        return self.to_out_0(out.reshape(x.shape))


class GELUProjection(nnx.Module):
    """The first half of the feed-forward network: dense, then tanh-approximated GELU (`ffn.net.0`).

    saved: the update keeps the dense layer's result, rounded to `dtype`, so that GELU cannot be
    part of its product, as it may be in a rollout. The rollout then rounds too, or the first
    update's ratio would be off by 1e-4 in bfloat16.
    """

    def __init__(self, d: int, f: int, *, saved: bool, dtype, rngs: nnx.Rngs):
        self.proj = Linear(d, f, dtype=dtype, rngs=rngs)
        self.saved = saved

    def __call__(self, x: Array) -> Array:
        y = self.proj(x)
        return jax.nn.gelu(jax.lax.optimization_barrier(y) if self.saved else y, approximate=True)


class FeedForward(nnx.Module):
    def __init__(self, config: TransformerConfig, *, saved: bool, dtype, rngs: nnx.Rngs):
        self.net_0 = GELUProjection(
            config.width, config.ffn_dim, saved=saved, dtype=dtype, rngs=rngs
        )
        self.net_2 = Linear(config.ffn_dim, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.net_2(self.net_0(x))


class Block(nnx.Module):
    """Modulated self-attention, cross-attention to the text, modulated feed-forward."""

    def __init__(
        self, config: TransformerConfig, *, dtype, backend: str, saved: bool, rngs: nnx.Rngs
    ):
        d = config.width
        self.scale_shift_table = nnx.Param(
            jax.random.normal(rngs.params(), (1, 6, d), jnp.float32) * d**-0.5
        )
        self.attn1 = Attention(config, dtype=dtype, backend=backend, rngs=rngs)
        self.norm2 = LayerNorm(d, eps=config.eps)
        self.attn2 = Attention(config, dtype=dtype, backend=backend, rngs=rngs)
        self.ffn = FeedForward(config, saved=saved, dtype=dtype, rngs=rngs)
        self.eps = config.eps
        self.gather = None  # set by layout.attach

    def __call__(
        self, x: Array, context: Array, modulation: Array, rope: Positions, key_counts
    ) -> Array:
        # x [B,S,D], context [B,St,D], modulation fp32 [B,6,D]
        if self.gather is None:
            return self.forward(x, context, modulation, rope, key_counts)

        def gathered(x, context, modulation):
            return self.gather.module(self).forward(x, context, modulation, rope, key_counts)

        if self.gather.again:
            gathered = jax.checkpoint(gathered, prevent_cse=False, policy=saved_but_gathers)
        return gathered(x, context, modulation)

    def forward(
        self, x: Array, context: Array, modulation: Array, rope: Positions, key_counts
    ) -> Array:
        """`__call__` with all of the block's parameters whole."""
        m = self.scale_shift_table[...] + modulation
        # each [B,1,D]
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (m[:, i : i + 1] for i in range(6))
        h = (layer_norm(x, self.eps) * (1 + scale_a) + shift_a).astype(x.dtype)
        x = (x + self.attn1(h, h, rope) * gate_a).astype(x.dtype)
        x = x + self.attn2(self.norm2(x), context, key_counts=key_counts)
        h = (layer_norm(x, self.eps) * (1 + scale_f) + shift_f).astype(x.dtype)
        return (x + self.ffn(h).astype(jnp.float32) * gate_f).astype(x.dtype)


class TimestepEmbedding(nnx.Module):
    def __init__(self, freq_dim: int, d: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(freq_dim, d, dtype=jnp.float32, rngs=rngs)
        self.linear_2 = Linear(d, d, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class TextProjection(nnx.Module):
    def __init__(self, text_dim: int, d: int, *, dtype, rngs: nnx.Rngs):
        self.linear_1 = Linear(text_dim, d, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(d, d, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=True))


class ConditionEmbedder(nnx.Module):
    """Timesteps [B] and text [B,St,text_dim] to temb [B,D], modulation [B,6,D] and context
    [B,St,D], in `dtype`.
    """

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        d = config.width
        self.time_embedder = TimestepEmbedding(config.freq_dim, d, rngs=rngs)
        self.time_proj = Linear(d, 6 * d, dtype=dtype, rngs=rngs)
        self.text_embedder = TextProjection(config.text_dim, d, dtype=dtype, rngs=rngs)
        self.freq_dim = config.freq_dim
        self.dtype = dtype

    def __call__(self, timesteps: Array, text: Array) -> tuple[Array, Array, Array]:
        temb = self.time_embedder(timestep_features(timesteps, self.freq_dim)).astype(self.dtype)
        modulation = self.time_proj(jax.nn.silu(temb))
        return temb, modulation.reshape(temb.shape[0], 6, -1), self.text_embedder(text)


class WanTransformer3D(nnx.Module):
    """velocity = model(latents, timesteps, text).

    dtype: storage and compute type of the weights (see the module's docstring for what stays fp32).
    attention: a concrete backend of `attention.choose_backend`. remat: what the backward pass
    computes again, one of `REMAT_POLICIES`; 'block' takes the activation memory of one block, and
    one residual stream a layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype=jnp.bfloat16,
        attention: str = "xla",
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(
                f"remat={remat!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}"
            )
        d, patch = config.width, math.prod(config.patch_size)
        # in fp32 nothing is rounded
        saved = remat in ("none", "save_matmuls") and jnp.dtype(dtype).itemsize == 2

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs):
            return Block(config, dtype=dtype, backend=attention, saved=saved, rngs=rngs)

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
        self.layout = None  # set by layout.attach

    def __call__(
        self, latents: Array, timesteps: Array, text: Array, *, text_padding: int = 0
    ) -> Array:
        """latents [B,F,H,W,C], timesteps [B] on the 0..1000 scale, text [B,St,text_dim] -> velocity
        fp32 [B,F,H,W,C].

        text_padding: how many zero rows follow the St given ones. Wan attends to the padding, so St
        + text_padding must be what the model was trained with (512); the zero rows are computed
        once and counted.
        """
        if self.layout is None:
            return self.forward(latents, timesteps, text, text_padding)
        return self.layout.run(self, latents, timesteps, text, text_padding)

    def forward(self, latents: Array, timesteps: Array, text: Array, text_padding: int) -> Array:
        """`__call__` on whole arrays, or inside `layout.run` on a device's own videos and
        parameters.
        """
        config = self.config
        b, f, h, w, _ = latents.shape
        _, ph, pw = config.patch_size
        grid = (f, h // ph, w // pw)
        key_counts = None
        if text_padding:
            text = jnp.pad(text, ((0, 0), (0, 1), (0, 0)))
            key_counts = np.array([1] * (text.shape[1] - 1) + [text_padding])

        x = latents.astype(self.dtype).reshape(b, f, grid[1], ph, grid[2], pw, -1)
        x = x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, math.prod(grid), -1)  # [B,S,(ph pw C)]
        rope = Positions(*rope_table(grid, config.attention_head_dim, config.rope_max_seq_len))
        # from here S is this device's
        if split := self.layout is not None and self.layout.mesh.shape["context"] > 1:
            x, *angles = (
                self.layout.own_tokens(y, axis)
                for y, axis in ((x, 1), (rope.cos, 0), (rope.sin, 0))
            )
            rope = Positions(*angles, math.prod(grid))
        x = self.patch_embedding(x)  # [B,S,D]
        temb, modulation, context = self.condition_embedder(timesteps, text)
        modulation = modulation.astype(jnp.float32)
        graphdef, adapters, params = nnx.split(self.blocks, LoRAParam, ...)
        # of all blocks at once
        adapters = jax.tree.map(lambda factor: factor.astype(self.dtype), adapters)

        def run_block(x, block_params):
            x = checkpoint_name(x, RESIDUAL)
            return nnx.merge(graphdef, *block_params)(
                x, context, modulation, rope, key_counts
            ), None

        if policy := REMAT_POLICIES[self.remat]:
            run_block = jax.checkpoint(run_block, prevent_cse=False, policy=policy)
        x, _ = jax.lax.scan(run_block, x, (adapters, params))

        m = self.scale_shift_table[...] + temb.astype(jnp.float32)[:, None]  # [B,2,D]
        x = (layer_norm(x, config.eps) * (1 + m[:, 1:]) + m[:, :1]).astype(self.dtype)
        x = self.proj_out(x)  # [B,S,(ph pw C)]
        if split:
            x = self.layout.all_tokens(x, math.prod(grid))
        x = x.reshape(b, f, grid[1], grid[2], ph, pw, -1).transpose(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(b, f, h, w, -1).astype(jnp.float32)
