"""The causal video VAE of Wan 2.1 (Diffusers `AutoencoderKLWan`), channels-last, whole clips at once.

B videos, T pixel frames = 1 + 4 (F - 1), F latent frames, H W pixels, h w latent height and width. Diffusers
runs chunks with caches; the same result comes from whole clips when (a) every causal convolution sees zero
frames on the left, (b) the temporal upsampling leaves the first frame alone and starts its history after it,
(c) the temporal downsampling copies the first frame and starts its first window there. Only `CausalConv3d`,
`Downsample` and `Upsample` look at other frames: decoding a long video in chunks would carry those three
histories, nothing else.

A whole clip costs memory: the last level of a 480x832x81 decode is 12.4 GB a tensor in fp32 (base_dim 96).
"""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from wan_jax.config import ConfigError, VAEConfig
from wan_jax.layers import Linear

Array = jax.Array


def _conv(x: Array, kernel: Array, stride: int, padding) -> Array:
    """2-D convolution of every frame of x [B,T,H,W,I] with kernel [kh,kw,I,O]."""
    frames = x.reshape(-1, *x.shape[2:])
    y = jax.lax.conv_general_dilated(frames, kernel.astype(x.dtype), (stride, stride), padding,
                                     dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _init(rngs: nnx.Rngs, shape: tuple[int, ...], dtype) -> nnx.Param:
    """normal(0, 1/fan_in), drawn in fp32: keeps the variance of a convolution's input."""
    fan_in = math.prod(shape[:-1])
    return nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5).astype(dtype))


class CausalConv3d(nnx.Module):
    """kernel [kt,kh,kw,in,out] on x [B,T,H,W,in]; kt-1 zero frames on the left, frames zero-padded.

    Computed as y_t = sum_s K_(kt-1-s) * x_(t-s), 2-D convolutions over the frames that exist: a single frame
    costs one 2-D convolution with the last tap, and a clip never multiplies the zero frames. This beats XLA's
    3-D convolution: [1,9,64,128,32] fp32 on two CPU cores 18 ms for 131, with gradients 190 for 458;
    [32,9,64,128,32] bf16 on an H200 1.0 ms for 1.3, with gradients 3.0 for 3.7. One convolution over
    the three frames stacked as channels is 24 % faster to 10 % slower there, in three times the memory.
    """

    def __init__(self, n_in: int, n_out: int, kernel: tuple[int, int, int], *, dtype, rngs: nnx.Rngs):
        self.kernel = _init(rngs, (*kernel, n_in, n_out), dtype)
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype))

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...]
        kt, kh, kw = kernel.shape[:3]
        space = [(kh // 2, kh // 2), (kw // 2, kw // 2)]
        y = _conv(x, kernel[-1], 1, space)
        for s in range(1, min(kt, x.shape[1])):
            past = _conv(x[:, :-s], kernel[-1 - s], 1, space)  # [B,T-s,H,W,out]
            y = y + jnp.pad(past, ((0, 0), (s, 0), (0, 0), (0, 0), (0, 0)))
        return y + self.bias[...].astype(x.dtype)


class Conv2d(nnx.Module):
    """kernel [kh, kw, in, out], applied to every frame of x [B,T,H,W,in]."""

    def __init__(self, n_in: int, n_out: int, *, stride: int = 1, dtype, rngs: nnx.Rngs):
        self.kernel = _init(rngs, (3, 3, n_in, n_out), dtype)
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype))
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        # stride 2 pads right and bottom only
        space = [(1, 1)] * 2 if self.stride == 1 else [(0, 1)] * 2
        return _conv(x, self.kernel[...], self.stride, space) + self.bias[...].astype(x.dtype)


class ChannelNorm(nnx.Module):
    """x / max(||x||, 1e-12) * sqrt(C) * scale over the channels, in fp32 (Diffusers `WanRMS_norm`)."""

    def __init__(self, channels: int, *, dtype):
        self.scale = nnx.Param(jnp.ones((channels,), dtype))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        # the clamp acts on the square, so the gradient at x = 0 is finite
        norm = jnp.sqrt(jnp.maximum(jnp.sum(y * y, axis=-1, keepdims=True), 1e-24))
        return (y / norm * (math.sqrt(x.shape[-1]) * self.scale[...].astype(jnp.float32))).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))); a 1x1x1 convolution of x where the channels change."""

    def __init__(self, n_in: int, n_out: int, *, dtype, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, rngs=rngs)
        self.norm1 = ChannelNorm(n_in, dtype=dtype)
        self.conv1 = CausalConv3d(n_in, n_out, (3, 3, 3), **kw)
        self.norm2 = ChannelNorm(n_out, dtype=dtype)
        self.conv2 = CausalConv3d(n_out, n_out, (3, 3, 3), **kw)
        self.conv_shortcut = CausalConv3d(n_in, n_out, (1, 1, 1), **kw) if n_in != n_out else None

    def __call__(self, x: Array) -> Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """Single-head attention of each frame over its own H*W positions."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.norm = ChannelNorm(channels, dtype=dtype)
        self.to_qkv = Linear(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.proj = Linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        b, t, h, w, c = x.shape
        q, k, v = jnp.split(self.to_qkv(self.norm(x)).reshape(b * t, h * w, 3 * c), 3, axis=-1)
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * c**-0.5
        out = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(logits, axis=-1).astype(x.dtype), v)
        return x + self.proj(out).reshape(x.shape)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.resnets_0 = ResidualBlock(channels, channels, dtype=dtype, rngs=rngs)
        self.attentions_0 = AttentionBlock(channels, dtype=dtype, rngs=rngs)
        self.resnets_1 = ResidualBlock(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.resnets_1(self.attentions_0(self.resnets_0(x)))


class Downsample(nnx.Module):
    """Halves height and width, and the frames after the first where `temporal`."""

    def __init__(self, channels: int, temporal: bool, *, dtype, rngs: nnx.Rngs):
        self.resample_1 = Conv2d(channels, channels, stride=2, dtype=dtype, rngs=rngs)
        if temporal:
            self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), dtype=dtype, rngs=rngs)
        self.temporal = temporal

    def __call__(self, x: Array) -> Array:
        x = self.resample_1(x)
        if not self.temporal or x.shape[1] == 1:
            return x
        y = self.time_conv.bias[...].astype(x.dtype)
        for tap in range(3):  # windows (0,1,2), (2,3,4), ...: T = 1 + 2k frames give k
            y = y + x[:, tap:x.shape[1] - 2 + tap:2] @ self.time_conv.kernel[...][tap, 0, 0].astype(x.dtype)
        return jnp.concatenate([x[:, :1], y], axis=1)  # [B,1+k,H,W,C]


class Upsample(nnx.Module):
    """Doubles height and width, and the frames after the first where `temporal`; halves the channels."""

    def __init__(self, channels: int, temporal: bool, *, dtype, rngs: nnx.Rngs):
        self.resample_1 = Conv2d(channels, channels // 2, dtype=dtype, rngs=rngs)
        if temporal:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), dtype=dtype, rngs=rngs)
        self.temporal = temporal

    def __call__(self, x: Array) -> Array:
        b, t, h, w, c = x.shape
        if self.temporal and t > 1:
            # the earlier frame's channels come first
            pairs = self.time_conv(x[:, 1:]).reshape(b, t - 1, h, w, 2, c)
            rest = pairs.transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * (t - 1), h, w, c)
            x = jnp.concatenate([x[:, :1], rest], axis=1)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.resample_1(x)


class Encoder(nnx.Module):
    """[B,T,H,W,in] -> [B,F,H/8,W/8,2z]; the levels' blocks in one flat list, as in Wan 2.1."""

    def __init__(self, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, rngs=rngs)
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, dims[0], (3, 3, 3), **kw)
        n = 0
        for level, (n_in, n_out) in enumerate(pairwise(dims)):
            for _ in range(config.num_res_blocks):
                setattr(self, f"down_blocks_{n}", ResidualBlock(n_in, n_out, **kw))
                n_in, n = n_out, n + 1
            if level < len(config.dim_mult) - 1:
                setattr(self, f"down_blocks_{n}", Downsample(n_out, config.temperal_downsample[level], **kw))
                n += 1
        self.num_blocks = n
        self.mid_block = MidBlock(dims[-1], **kw)
        self.norm_out = ChannelNorm(dims[-1], dtype=dtype)
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, (3, 3, 3), **kw)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for i in range(self.num_blocks):
            x = getattr(self, f"down_blocks_{i}")(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid_block(x))))


class UpBlock(nnx.Module):
    """A level of the decoder: `resnets` residual blocks; upsample: (spatial, temporal)."""

    def __init__(self, n_in: int, n_out: int, resnets: int, upsample: tuple[bool, bool], *, dtype,
                 rngs: nnx.Rngs):
        for i in range(resnets):
            block = ResidualBlock(n_in if i == 0 else n_out, n_out, dtype=dtype, rngs=rngs)
            setattr(self, f"resnets_{i}", block)
        spatial, temporal = upsample
        self.upsamplers_0 = Upsample(n_out, temporal, dtype=dtype, rngs=rngs) if spatial else None
        self.resnets = resnets

    def __call__(self, x: Array) -> Array:
        for i in range(self.resnets):
            x = getattr(self, f"resnets_{i}")(x)
        return x if self.upsamplers_0 is None else self.upsamplers_0(x)


class Decoder(nnx.Module):
    """[B,F,h,w,z] -> [B,T,8h,8w,out]."""

    def __init__(self, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, rngs=rngs)
        mult, base = config.dim_mult[::-1], config.decoder_base_dim or config.base_dim
        dims = [base * m for m in (mult[0], *mult)]
        temporal = config.temperal_downsample[::-1]
        self.conv_in = CausalConv3d(config.z_dim, dims[0], (3, 3, 3), **kw)
        self.mid_block = MidBlock(dims[0], **kw)
        last = len(mult) - 1
        for i, (n_in, n_out) in enumerate(pairwise(dims)):
            upsample = (i < last, i < last and temporal[i])
            block = UpBlock(n_in if i == 0 else n_in // 2, n_out, config.num_res_blocks + 1, upsample, **kw)
            setattr(self, f"up_blocks_{i}", block)
        self.num_blocks = len(mult)
        self.norm_out = ChannelNorm(dims[-1], dtype=dtype)
        self.conv_out = CausalConv3d(dims[-1], config.out_channels, (3, 3, 3), **kw)

    def __call__(self, x: Array) -> Array:
        x = self.mid_block(self.conv_in(x))
        for i in range(self.num_blocks):
            x = getattr(self, f"up_blocks_{i}")(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


def _check_config(config: VAEConfig):
    """Raises `ConfigError` on a VAE that this module would not compute as Diffusers does."""
    if config.is_residual or config.patch_size:
        raise ConfigError("vae config: the Wan 2.2 residual VAE (is_residual=true) is not supported by this "
                          "version; use a Wan 2.1 checkpoint")
    levels, temporal = len(config.dim_mult), config.temperal_downsample
    if len(temporal) != levels - 1:
        raise ConfigError(f"vae config: temperal_downsample has {len(temporal)} values; dim_mult has "
                          f"{levels}, so {levels - 1} are needed")
    factors = {"scale_factor_spatial": 2 ** (levels - 1), "scale_factor_temporal": 2 ** sum(temporal)}
    for name, factor in factors.items():
        if getattr(config, name) != factor:
            raise ConfigError(f"vae config: {name}={getattr(config, name)}, but dim_mult and "
                              f"temperal_downsample make it {factor}; set it to {factor}")


class AutoencoderKLWan(nnx.Module):
    """dtype: storage and compute type; the norms' statistics and the latents' mean and std stay fp32."""

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        _check_config(config)
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), dtype=dtype, rngs=rngs)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1), dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype

    def encode(self, video: Array) -> tuple[Array, Array]:
        """video [B,T,H,W,3] in [-1,1], T = 1 + 4k -> posterior mean and logvar, fp32 [B,F,h,w,z].

        Both as the encoder gives them, not normalised; logvar is clamped to [-30, 20]. Raises ValueError on a
        frame count, size or channel count that the model cannot code.
        """
        self._check(video, self.config.in_channels, "video")
        _, t, h, w, _ = video.shape
        ft, fs = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        if (t - 1) % ft:
            raise ValueError(f"video has {t} frames; the VAE codes 1 + {ft}k frames, "
                             f"use {max(1, t - (t - 1) % ft)}")
        for name, size in (("height", h), ("width", w)):
            if size < fs or size % fs:
                raise ValueError(f"video has {name} {size}; it must be a multiple of {fs}, "
                                 f"use {max(fs, size - size % fs)}")
        moments = self.quant_conv(self.encoder(video.astype(self.dtype))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Array) -> Array:
        """z [B,F,h,w,z] (denormalised latents) -> video fp32 [B,1+4(F-1),8h,8w,3] clamped to [-1,1].

        Raises ValueError on another rank or channel count.
        """
        self._check(z, self.config.z_dim, "z")
        video = self.decoder(self.post_quant_conv(z.astype(self.dtype)))
        return jnp.clip(video.astype(jnp.float32), -1.0, 1.0)

    def normalise(self, z: Array) -> Array:
        """(z - mean) / std per channel, fp32: what the transformer works on."""
        return (z.astype(jnp.float32) - self._mean()) / self._std()

    def denormalise(self, latents: Array) -> Array:
        """latents * std + mean per channel, fp32."""
        return latents.astype(jnp.float32) * self._std() + self._mean()

    def _mean(self) -> Array:
        return jnp.asarray(self.config.latents_mean, jnp.float32)

    def _std(self) -> Array:
        return jnp.asarray(self.config.latents_std, jnp.float32)

    @staticmethod
    def _check(x: Array, channels: int, name: str):
        if x.ndim != 5 or x.shape[-1] != channels or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [B, frames, height, width, "
                             f"{channels}], channels last and no axis empty")
