"""The velocity a sampler follows: the transformer's, with or without classifier-free guidance."""

import dataclasses

import jax
import jax.numpy as jnp

from wan_jax.models.transformer import WanTransformer3D


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextBatch:
    """What the transformer attends to for a batch of B videos."""

    embeddings: jax.Array  # [B, St, text_dim] in the encoder's type, rows past the prompt zeroed
    negative: jax.Array  # [St, text_dim], the negative prompt's, shared by the batch
    # zero rows beyond St (Wan's text has 512 in all)
    padding: int = dataclasses.field(metadata={"static": True})


def pair(x: jax.Array, y: jax.Array) -> jax.Array:
    """[B, ...] twice to [2B, ...], interleaved: each device keeps its own videos."""
    return jnp.stack([x, y], axis=1).reshape(2 * x.shape[0], *x.shape[1:])


def velocity(
    model: WanTransformer3D,
    latents: jax.Array,
    timestep: jax.Array,
    text: TextBatch,
    guidance: float,
) -> jax.Array:
    """v, or v_u + guidance (v_c - v_u) when guidance > 1 (Ho & Salimans, arXiv 2207.12598;
    Diffusers' WanPipeline).

    latents fp32 [B,F,H,W,C], timestep scalar or [B] on the 0..1000 scale -> fp32 [B,F,H,W,C]. The
    two branches run as one batch of 2B, so sampling and training see the same arithmetic.
    """
    b = latents.shape[0]
    t = jnp.broadcast_to(timestep, (b,))
    if guidance <= 1:
        return model(latents, t, text.embeddings, text_padding=text.padding)
    negative = jnp.broadcast_to(text.negative[None], text.embeddings.shape)
    both = model(
        pair(latents, latents),
        pair(t, t),
        pair(text.embeddings, negative),
        text_padding=text.padding,
    )
    both = both.reshape(b, 2, *latents.shape[1:])
    conditional, unconditional = both[:, 0], both[:, 1]
    return unconditional + guidance * (conditional - unconditional)
