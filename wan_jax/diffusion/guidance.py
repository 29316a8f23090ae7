"""The velocity that a sampler follows: the output of the transformer, with or without
classifier-free guidance.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from wan_jax.diffusion.solvers import PerVideo
from wan_jax.models.transformer import WanTransformer3D


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextBatch:
    """The text that the transformer attends to, for a batch of B videos.

    Attributes:
        embeddings: of the prompts, in the encoder's dtype; rows after the prompt are zero.
        negative: of the negative prompt, shared by the batch.
        padding: number of zero rows after the St rows (Wan's text has 512 rows in total).
    """

    embeddings: Float[Array, "B St text_dim"]
    negative: Float[Array, "St text_dim"]
    padding: int = dataclasses.field(metadata={"static": True})


def pair(x: Float[Array, " B *rest"], y: Float[Array, " B *rest"]) -> Float[Array, " 2*B *rest"]:
    """Join two batches to one of 2B, interleaved, so that no video moves to another device."""
    return jnp.stack([x, y], axis=1).reshape(2 * x.shape[0], *x.shape[1:])


def velocity(
    model: WanTransformer3D,
    latents: Float[Array, "B F H W C"],
    timestep: PerVideo,
    text: TextBatch,
    guidance: float,
) -> Float32[Array, "B F H W C"]:
    """Return v, or v_u + guidance (v_c - v_u) if guidance > 1 (Ho & Salimans, arXiv 2207.12598;
    Diffusers' `WanPipeline`).

    v_c and v_u are the velocities for the prompt and for the negative prompt. timestep: on the
    0..1000 scale. The two branches run as one batch of 2B, so that sampling and training compute
    the same.
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
