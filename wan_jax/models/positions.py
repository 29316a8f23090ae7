"""Positions and timesteps as the transformer uses them: rotary embeddings of the token grid, and
sinusoidal features of the timestep.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32


def rope_table(
    grid: tuple[int, int, int], head_dim: int, max_len: int = 1024
) -> tuple[Float32[np.ndarray, "S half_head"], Float32[np.ndarray, "S half_head"]]:
    """Return cos and sin [S, head_dim/2] for a token grid (F, H/2, W/2), tokens in row-major order.

    head_dim is split into rotation pairs for time, height and width (22 + 21 + 21 of 64 for
    head_dim 128). Each axis has its own frequencies 10000^(-2i/dim_axis) and positions from 0.
    Angles are computed in float64, as in Diffusers. Raises ValueError when the grid exceeds
    `max_len`.
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


def apply_rope(
    x: Float[Array, "B S N head_dim"],
    cos: Float32[np.ndarray, "S half_head"] | Float32[Array, "S half_head"],
    sin: Float32[np.ndarray, "S half_head"] | Float32[Array, "S half_head"],
) -> Float[Array, "B S N head_dim"]:
    """Rotate the interleaved pairs (x0, x1), (x2, x3), ... of each head in fp32.

    Computes each value times its cosine plus its neighbour times the signed sine, so memory is read
    and written in order. Splitting the pairs and stacking them again makes GPUs write every other
    value.
    """
    # NumPy for a constant of the jitted function, JAX for this device's rows of it
    xp = np if isinstance(cos, np.ndarray) else jnp
    cosine = xp.repeat(cos, 2, axis=-1)[:, None]  # [S, 1, head_dim]
    signed_sine = xp.stack([-sin, sin], axis=-1).reshape(cosine.shape)
    y = x.astype(jnp.float32)
    neighbour = y.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return (y * cosine + neighbour * signed_sine).astype(x.dtype)


def timestep_features(timesteps: Float[Array, " B"], dim: int) -> Float32[Array, "B dim"]:
    """Return [cos | sin] of t * exp(-ln(10000) i / (dim/2)) for timesteps t, 0..1000."""
    half = dim // 2
    freqs = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = timesteps.astype(jnp.float32)[:, None] * freqs
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Positions(NamedTuple):
    """The rotary angles of the token rows, and the number S of all tokens of a video if the rows
    are the share of one device (None otherwise).
    """

    cos: Float32[np.ndarray, "S half_head"] | Float32[Array, "S half_head"]
    sin: Float32[np.ndarray, "S half_head"] | Float32[Array, "S half_head"]
    tokens: int | None = None
