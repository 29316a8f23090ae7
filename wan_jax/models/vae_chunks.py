"""Decoding videos too long or too large for one pass, in pieces: chunks of time are exact, tiles of
space are not.

B videos, T pixel frames, F latent frames, H W pixels, h w latent height and width, z latent
channels, C 3 colours.

Device bytes beside the weights, fp32, one video, as XLA for CPU compiles it (`memory_analysis`:
temporary buffers plus the history, which is donated), with JAX 0.10.2 in the first three columns of
the first row, before the VAE upsampled by phases in the others. GPU convolutions can need workspace
on top:

    chunk of            1 latent frame    2          4          whole, 33 frames    whole, 81 frames
    2.1   480 x 832       9.0 GB        12.1 GB    18.2 GB        30.1 GB             74.4 GB
    2.1   720 x 1280     21.5 GB        30.0 GB    47.0 GB        69.5 GB            171.6 GB
    2.2   480 x 832       7.9 GB        11.0 GB    17.2 GB        26.6 GB             65.9 GB
    2.2   704 x 1280     17.6 GB        24.6 GB    38.8 GB        60.1 GB            148.6 GB

Of a chunk's, the history is 3.8, 8.7, 2.9 and 6.4 GB. Chunks do not depend on the clip's length;
all grows with B.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from wan_jax.models.config import VAEConfig

Array = jax.Array

BUDGET = 16e9  # device bytes that decoding may take beside the weights before it goes in chunks
# the table above in frames of the widest tensor: working set of each pixel frame, and the history
# with its copies
FRAME_21, FRAME_22, HISTORY = 3.0, 4.4, 24


def decode_bytes(config: VAEConfig, shape: tuple[int, ...], chunk: int, itemsize: int = 4) -> int:
    """An estimate, from above, of the device bytes to decode latents of `shape` [B,F,h,w,z],
    weights not counted.

    chunk: latent frames at a time, 0 for the whole clip. itemsize: bytes of the compute type.
    """
    b, f, h, w, _ = shape
    cells = h * w * (config.scale_factor_spatial // (config.patch_size or 1)) ** 2
    # the last upsampler works on full-size frames with the channels of the level before
    widest = (
        b
        * cells
        * (config.decoder_base_dim or config.base_dim)
        * max(config.dim_mult[:2])
        * itemsize
    )
    ft = config.scale_factor_temporal
    frame = FRAME_22 if config.is_residual else FRAME_21
    return widest * (frame * ft * chunk + HISTORY if chunk else frame * (1 + ft * (f - 1)))


def choose_chunk(
    config: VAEConfig, shape: tuple[int, ...], budget: float = BUDGET, itemsize: int = 4
) -> int:
    """Latent frames a chunk for latents of `shape` [B,F,h,w,z] on one device; 0: the whole clip at
    once.

    Whole where `budget` bytes allow it, and for single frames; else the largest chunk that they
    allow, at least 1.
    """
    f = shape[1]
    if f == 1 or decode_bytes(config, shape, 0, itemsize) <= budget:
        return 0
    fitting = [c for c in range(1, f) if decode_bytes(config, shape, c, itemsize) <= budget]
    return max(fitting, default=1)


def chunk_sizes(frames: int, chunk: int) -> list[int]:
    """Latent frames of each chunk: `chunk`, and the first what is left over, so that any clip needs
    two programs.
    """
    first = (frames - 1) % chunk + 1
    return [first] + [chunk] * ((frames - first) // chunk)


def decode_chunks(step: Callable, latents: Array, sizes: list[int]) -> Iterator[Array]:
    """The video of latents [B,F,h,w,z] in pieces [B,t,H,W,C], one a chunk of `sizes` latent frames.

    step: (latents of a chunk, history) -> (piece, history), e.g. on
    `AutoencoderKLWan.decode_chunk`. Raises ValueError where the sizes are not F in sum or not
    positive.
    """
    if sum(sizes) != latents.shape[1] or min(sizes) < 1:
        raise ValueError(
            f"chunks of {sizes} latent frames do not make up {latents.shape[1]} frames"
        )
    start, history = 0, ()
    for size in sizes:
        video, history = step(latents[:, start : start + size], history)
        start += size
        yield video


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the fewest evenly spaced tiles of `tile` cells start that cover `size` and share >=
    `overlap` cells.
    """
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [i * (size - tile) // (count - 1) for i in range(count)]


def _ramp(size: int, overlap: int) -> np.ndarray:
    """fp32 [size]: 1 inside, falling towards both ends over `overlap` values, never 0."""
    near = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5  # distance to the nearer end
    return np.minimum(near / max(overlap, 0.5), 1).astype(np.float32)


def decode_tiles(decode: Callable, latents: Array, tile: int, overlap: int) -> np.ndarray:
    """The video fp32 [B,T,H,W,C] of latents [B,F,h,w,z] from overlapping tiles of `tile` x `tile`
    cells, blended.

    decode: latents [B,F,<=tile,<=tile,z] -> video fp32 on the host. Tiles do not see each other, so
    the result is an approximation: the attention and the convolutions of the lowest levels look
    across a tile's border, and colours can drift from tile to tile; a larger overlap hides it
    better. Where one tile covers everything it is exact. Weights fall linearly towards a tile's
    borders and sum to 1. Raises ValueError unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(
            f"tile={tile}, overlap={overlap}: tiles must overlap by less than their size, in "
            "latent cells"
        )
    _, _, h, w, _ = latents.shape
    out = weight = None
    for y in tile_starts(h, tile, overlap):
        for x in tile_starts(w, tile, overlap):
            piece = decode(latents[:, :, y : y + tile, x : x + tile])
            factor = piece.shape[2] // min(h, tile)
            if out is None:
                out = np.zeros(
                    (*piece.shape[:2], h * factor, w * factor, piece.shape[-1]), np.float32
                )
                weight = np.zeros((h * factor, w * factor, 1), np.float32)
            rows, columns = (
                slice(at * factor, at * factor + n) for at, n in zip((y, x), piece.shape[2:4])
            )
            # [rows,columns,1]
            share = np.outer(*(_ramp(n, overlap * factor) for n in piece.shape[2:4]))[..., None]
            out[:, :, rows, columns] += share * piece
            weight[rows, columns] += share
    return out / weight
