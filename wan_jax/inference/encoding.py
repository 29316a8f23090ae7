"""From videos to latents: the VAE's encoder, in chunks where a video is long."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.inference.pipeline import DECODER_OPTIONS
from wan_jax.models import vae_chunks
from wan_jax.models.config import VAEConfig
from wan_jax.models.vae import AutoencoderKLWan


def make_video_encoder(graphdef, config: VAEConfig, *, chunk: int | None = None) -> Callable:
    """Return the VAE encoder: (vae state, uint8 [B, frames, height, width, 3]) -> normalised latents
    on the host, float32 [B, F, H, W, C].

    The latents are the mean of the posterior, so equal videos have equal latents.

    Args:
        graphdef: graph of the VAE.
        config: of the VAE.
        chunk: latent frames at a time, 0 for whole videos; None: whole videos if they need less than
            `vae_chunks.BUDGET` bytes by estimate, else the largest chunk that fits, at least one.

    Raises ValueError as `AutoencoderKLWan.encode`.
    """

    def latents(vae: AutoencoderKLWan, moments) -> jax.Array:
        return vae.normalise(moments[0])

    def pixels(video: jax.Array) -> jax.Array:
        return video.astype(jnp.float32) / 127.5 - 1.0

    @partial(jax.jit, compiler_options=DECODER_OPTIONS)
    def encode(state, video):
        vae: AutoencoderKLWan = nnx.merge(graphdef, state)
        return latents(vae, vae.encode(pixels(video)))

    @partial(jax.jit, donate_argnums=(2,), compiler_options=DECODER_OPTIONS)
    def encode_chunk(state, video, history):
        vae: AutoencoderKLWan = nnx.merge(graphdef, state)
        moments, history = vae.encode_chunk(pixels(video), history)
        return latents(vae, moments), history

    def run(state, video: np.ndarray) -> np.ndarray:
        b, frames, height, width, _ = video.shape
        factor, cell = config.scale_factor_temporal, config.scale_factor_spatial
        count = (frames - 1) // factor + 1
        shape = (b, count, height // cell, width // cell, config.z_dim)
        size = vae_chunks.choose_chunk(config, shape) if chunk is None else chunk
        if not 0 < size < count:
            return np.asarray(encode(state, video))
        sizes = vae_chunks.chunk_sizes(count, size)
        pieces = vae_chunks.encode_chunks(
            partial(encode_chunk, state), jnp.asarray(video), sizes, factor
        )
        return np.concatenate([np.asarray(piece) for piece in pieces], axis=1)

    return run
