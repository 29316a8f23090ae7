"""The causal video VAEs of Wan (Diffusers `AutoencoderKLWan`): that of 2.1, and that of 2.2's
TI2V-5B (`is_residual`).

A video has 1 + 4 (F - 1) frames for F latent frames. 2.1: C = 16 latent channels, a latent cell is
8 x 8 pixels. 2.2: C = 48 and 16 x 16 pixels, because the encoder takes patches of 2 x 2 pixels as
channels; every level has a shortcut without weights, and parameters are named by level.

Letters: see `wan_jax`. Inside the networks T, H and W are frames, height and width of the current
level, and f, h, w those of the latents.

A whole video needs much memory: the last level of an 81-frame decode at 480x832 is 12.4 GB per
tensor in fp32 (2.1). `wan_jax.models.vae_chunks` decodes long videos in pieces.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from wan_jax.models.config import ConfigError, VAEConfig
from wan_jax.models.vae_layers import (
    CausalConv3d,
    ChannelNorm,
    Downsample,
    History,
    MidBlock,
    ResidualBlock,
    Upsample,
    average_down,
    duplicate_up,
    patchify,
    unpatchify,
)


class DownBlock(nnx.Module):
    """A level of the 2.2 encoder: residual blocks and downsampler, plus `average_down` of the
    input.

    down: whether to downsample (spatially, temporally).
    """

    def __init__(
        self, n_in: int, n_out: int, resnets: int, down: tuple[bool, bool], *, dtype, rngs: nnx.Rngs
    ):
        for i in range(resnets):
            setattr(
                self,
                f"resnets_{i}",
                ResidualBlock(n_out if i else n_in, n_out, dtype=dtype, rngs=rngs),
            )
        spatial, temporal = down
        self.downsampler = Downsample(n_out, temporal, dtype=dtype, rngs=rngs) if spatial else None
        self.resnets, self.shortcut = resnets, (n_out, 1 + temporal, 1 + spatial)

    def __call__(
        self, x: Float[Array, "B T H W _"], history: History | None = None
    ) -> Float[Array, "B f h w _"]:
        shortcut = average_down(x, *self.shortcut)
        for i in range(self.resnets):
            x = getattr(self, f"resnets_{i}")(x, history)
        return (x if self.downsampler is None else self.downsampler(x, history)) + shortcut


class Encoder(nnx.Module):
    """Pixels to moments of the latents, [B,T,H,W,in_channels] -> [B,f,h,w,2C]; H and W in patches.
    With a history, the frames are a chunk of a video.

    2.1 lists the blocks of all levels in one sequence, 2.2 has one block per level.
    """

    def __init__(self, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, rngs=rngs)
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        down = [(True, temporal) for temporal in config.temperal_downsample] + [(False, False)]
        self.conv_in = CausalConv3d(config.in_channels, dims[0], (3, 3, 3), **kw)
        blocks = []
        for (n_in, n_out), (spatial, temporal) in zip(pairwise(dims), down):
            if config.is_residual:
                blocks.append(
                    DownBlock(n_in, n_out, config.num_res_blocks, (spatial, temporal), **kw)
                )
                continue
            for i in range(config.num_res_blocks):
                blocks.append(ResidualBlock(n_out if i else n_in, n_out, **kw))
            if spatial:
                blocks.append(Downsample(n_out, temporal, **kw))
        for i, block in enumerate(blocks):
            setattr(self, f"down_blocks_{i}", block)
        self.num_blocks = len(blocks)
        self.mid_block = MidBlock(dims[-1], **kw)
        self.norm_out = ChannelNorm(dims[-1], dtype=dtype)
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, (3, 3, 3), **kw)

    def __call__(
        self, x: Float[Array, "B T H W _"], history: History | None = None
    ) -> Float[Array, "B f h w _"]:
        x = self.conv_in(x, history)
        for i in range(self.num_blocks):
            x = getattr(self, f"down_blocks_{i}")(x, history)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid_block(x, history))), history)


class UpBlock(nnx.Module):
    """A level of the decoder: residual blocks and upsampler; in 2.2 plus `duplicate_up` of the
    input.

    up: whether to upsample (spatially, temporally). 2.1's upsampler halves the channels, 2.2's does
    not.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        resnets: int,
        up: tuple[bool, bool],
        residual: bool,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        kw = dict(dtype=dtype, rngs=rngs)
        for i in range(resnets):
            setattr(self, f"resnets_{i}", ResidualBlock(n_out if i else n_in, n_out, **kw))
        spatial, temporal = up
        self.upsampler = Upsample(n_out, n_out, temporal, **kw) if spatial and residual else None
        self.upsamplers_0 = (
            Upsample(n_out, n_out // 2, temporal, **kw) if spatial and not residual else None
        )
        self.resnets, self.shortcut = resnets, (n_out, 1 + temporal, 1 + spatial)

    def __call__(
        self, x: Float[Array, "B f h w _"], history: History | None = None
    ) -> Float[Array, "B T H W _"]:
        h = x
        for i in range(self.resnets):
            h = getattr(self, f"resnets_{i}")(h, history)
        if self.upsampler is not None:
            starts_video = history is None or history.starts_video
            return self.upsampler(h, history) + duplicate_up(x, *self.shortcut, starts_video)
        return h if self.upsamplers_0 is None else self.upsamplers_0(h, history)


class Decoder(nnx.Module):
    """Latents to pixels, [B,f,h,w,C] -> [B,T,H,W,out_channels]; H and W in patches. With a history,
    the latents are a chunk of a video.
    """

    def __init__(self, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, rngs=rngs)
        mult = config.dim_mult[::-1]
        base = config.decoder_base_dim or config.base_dim
        dims = [base * m for m in (mult[0], *mult)]
        up = [(True, temporal) for temporal in config.temperal_downsample[::-1]] + [(False, False)]
        self.conv_in = CausalConv3d(config.z_dim, dims[0], (3, 3, 3), **kw)
        self.mid_block = MidBlock(dims[0], **kw)
        for i, (n_in, n_out) in enumerate(pairwise(dims)):
            halved = i > 0 and not config.is_residual
            block = UpBlock(
                n_in // 2 if halved else n_in,
                n_out,
                config.num_res_blocks + 1,
                up[i],
                config.is_residual,
                **kw,
            )
            setattr(self, f"up_blocks_{i}", block)
        self.num_blocks = len(mult)
        self.norm_out = ChannelNorm(dims[-1], dtype=dtype)
        self.conv_out = CausalConv3d(dims[-1], config.out_channels, (3, 3, 3), **kw)

    def __call__(
        self, x: Float[Array, "B f h w _"], history: History | None = None
    ) -> Float[Array, "B T H W _"]:
        x = self.mid_block(self.conv_in(x, history), history)
        for i in range(self.num_blocks):
            x = getattr(self, f"up_blocks_{i}")(x, history)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), history)


def _check_config(config: VAEConfig):
    """Raise `ConfigError` on a VAE that this module would not compute as Diffusers does."""
    levels = len(config.dim_mult)
    temporal = config.temperal_downsample
    patch = config.patch_size or 1
    if len(temporal) != levels - 1:
        raise ConfigError(
            f"vae config: temperal_downsample has {len(temporal)} values; dim_mult has "
            f"{levels}, so {levels - 1} are needed"
        )
    factors = {
        "scale_factor_spatial": patch * 2 ** (levels - 1),
        "scale_factor_temporal": 2 ** sum(temporal),
    }
    for name, factor in factors.items():
        if getattr(config, name) != factor:
            raise ConfigError(
                f"vae config: {name}={getattr(config, name)}, but dim_mult, temperal_downsample "
                f"and patch_size make it {factor}; set it to {factor}"
            )
    for name in ("in_channels", "out_channels"):
        if getattr(config, name) % patch**2:
            raise ConfigError(
                f"vae config: {name}={getattr(config, name)} counts the channels of whole patches; "
                f"with patch_size={patch} it must be a multiple of {patch**2}"
            )
    if config.is_residual:
        _check_shortcuts(config.dim_mult, temporal)


def _check_shortcuts(mult: tuple[int, ...], temporal: tuple[bool, ...]):
    """Raise `ConfigError` when `average_down` or `duplicate_up` cannot divide their channels
    evenly.
    """
    factors = [4 * (1 + t) for t in temporal]
    down = zip((1, *mult), mult, (*factors, 1))
    up = zip((mult[-1], *mult[::-1]), mult[::-1], factors[::-1])
    if any(n_in * factor % n_out for n_in, n_out, factor in down) or any(
        n_out * factor % n_in for n_in, n_out, factor in up
    ):
        raise ConfigError(
            f"vae config: the shortcuts of is_residual=true cannot divide the channels of dim_mult="
            f"{list(mult)}; Wan 2.2 has [1, 2, 4, 4]"
        )


class AutoencoderKLWan(nnx.Module):
    """The VAE: encoder, decoder, and the normalisation of the latents.

    dtype: storage and compute type; statistics of norms, and mean and std of latents are fp32.
    """

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        _check_config(config)
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = CausalConv3d(
            2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), dtype=dtype, rngs=rngs
        )
        self.post_quant_conv = CausalConv3d(
            config.z_dim, config.z_dim, (1, 1, 1), dtype=dtype, rngs=rngs
        )
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype

    def encode(
        self, video: Float[Array, "B frames height width 3"]
    ) -> tuple[Float32[Array, "B F H W C"], Float32[Array, "B F H W C"]]:
        """Return mean and logvar of the posterior of a video in [-1, 1] with 1 + 4k frames.

        They are not normalised; logvar is clamped to [-30, 20]. Raises ValueError on a number of
        frames, a size or a number of channels that the model cannot encode.
        """
        return self._encode(video, None)

    def encode_chunk(
        self, video: Float[Array, "B frames height width 3"], history: tuple[Array, ...] = ()
    ) -> tuple[tuple[Float32[Array, "B F H W C"], Float32[Array, "B F H W C"]], tuple[Array, ...]]:
        """Encode the next frames of a video: 1 + 4k of them at its start, then 4k. Returns (mean,
        logvar) of their latents, as `encode`, and the history for the next chunk.

        history: what the previous chunk returned, () at the start of a video. Concatenated, the
        chunks are `encode` of the whole video, up to rounding. Raises ValueError as `encode`.
        """
        updated = History(history)
        return self._encode(video, updated), updated.frames

    def _encode(self, video: Array, history: History | None) -> tuple[Array, Array]:
        patch = self.config.patch_size or 1
        self._check(video, self.config.in_channels // patch**2, "video")
        _, frames, height, width, _ = video.shape
        factor = self.config.scale_factor_temporal
        first = 1 if history is None or history.starts_video else 0
        if (frames - first) % factor:
            raise ValueError(
                f"video has {frames} frames; the VAE codes {'1 + ' * first}{factor}k frames, "
                f"use {max(first or factor, frames - (frames - first) % factor)}"
            )
        cell = self.config.scale_factor_spatial
        for name, size in (("height", height), ("width", width)):
            if size < cell or size % cell:
                raise ValueError(
                    f"video has {name} {size}; it must be a multiple of {cell}, "
                    f"use {max(cell, size - size % cell)}"
                )
        patches = patchify(video.astype(self.dtype), patch)
        moments = self.quant_conv(self.encoder(patches, history)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "B F H W C"]) -> Float32[Array, "B frames height width 3"]:
        """Return the video of denormalised latents, clamped to [-1, 1]. Raises ValueError on
        another rank or number of channels.
        """
        return self._decode(z, None)

    def decode_chunk(
        self, z: Float[Array, "B F H W C"], history: tuple[Array, ...] = ()
    ) -> tuple[Float32[Array, "B frames height width 3"], tuple[Array, ...]]:
        """Decode the next F >= 1 latent frames of a video. Returns their frames, as `decode`, and
        the history for the next chunk.

        history: what the previous chunk returned, () at the start of a video. The first chunk gives
        1 + 4 (F - 1) frames, later ones 4 F; concatenated they are `decode` of the whole video, up
        to rounding. Raises ValueError as `decode`.
        """
        updated = History(history)
        return self._decode(z, updated), updated.frames

    def _decode(self, z: Array, history: History | None) -> Array:
        self._check(z, self.config.z_dim, "z")
        patches = self.decoder(self.post_quant_conv(z.astype(self.dtype)), history)
        video = unpatchify(patches.astype(jnp.float32), self.config.patch_size or 1)
        return jnp.clip(video, -1.0, 1.0)

    def normalise(self, z: Float[Array, "B F H W C"]) -> Float32[Array, "B F H W C"]:
        """Return (z - mean) / std per channel, the input of the transformer."""
        return (z.astype(jnp.float32) - self._mean()) / self._std()

    def denormalise(self, latents: Float[Array, "B F H W C"]) -> Float32[Array, "B F H W C"]:
        """Return latents * std + mean per channel, the input of `decode`."""
        return latents.astype(jnp.float32) * self._std() + self._mean()

    def _mean(self) -> Array:
        return jnp.asarray(self.config.latents_mean, jnp.float32)

    def _std(self) -> Array:
        return jnp.asarray(self.config.latents_std, jnp.float32)

    @staticmethod
    def _check(x: Array, channels: int, name: str):
        """Raise ValueError unless x is [B, frames, height, width, channels] and not empty."""
        if x.ndim != 5 or x.shape[-1] != channels or 0 in x.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be [B, frames, height, width, "
                f"{channels}], channels last and no axis empty"
            )
