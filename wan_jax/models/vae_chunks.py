"""Decoding and encoding videos that are too long or too large for one pass, in pieces: chunks in time
are exact, tiles in space are approximations. Encoding needs less memory than decoding the same video,
so its chunks are chosen by the same estimate.

Device memory in addition to the weights, fp32, one video, as XLA for the CPU compiles it
(`memory_analysis`: temporary buffers plus the history, which is donated). Measured with JAX 0.10.2,
the first three columns of the first row with the current upsampling, the others with an earlier
one. Convolutions on GPUs can need additional workspace:

    chunk of            1 latent frame    2          4          whole, 33 frames    whole, 81 frames
    2.1   480 x 832       9.0 GB        12.1 GB    18.2 GB        30.1 GB             74.4 GB
    2.1   720 x 1280     21.5 GB        30.0 GB    47.0 GB        69.5 GB            171.6 GB
    2.2   480 x 832       7.9 GB        11.0 GB    17.2 GB        26.6 GB             65.9 GB
    2.2   704 x 1280     17.6 GB        24.6 GB    38.8 GB        60.1 GB            148.6 GB

In the four rows, the history of a chunk takes 3.8, 8.7, 2.9 and 6.4 GB. Chunks do not depend on the
length of the video; all values are proportional to B.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Array, Float, Float32

from wan_jax.models.config import VAEConfig

BUDGET = 16e9  # device bytes for decoding, in addition to the weights; above, it runs in chunks
# The table above in units of one frame of the widest tensor: working set of each pixel frame for
# 2.1 and 2.2, and the history with its copies.
FRAME_21 = 3.0
FRAME_22 = 4.4
HISTORY = 24


def decode_bytes(config: VAEConfig, shape: tuple[int, ...], chunk: int, itemsize: int = 4) -> float:
    """Return an upper estimate of the device bytes to decode latents of `shape` [B,F,H,W,C],
    without the weights.

    chunk: latent frames at a time, 0 for the whole video. itemsize: bytes of the compute type.
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
    frame = FRAME_22 if config.is_residual else FRAME_21
    factor = config.scale_factor_temporal
    if chunk:
        return widest * (frame * factor * chunk + HISTORY)
    return widest * (frame * (1 + factor * (f - 1)))


def choose_chunk(
    config: VAEConfig, shape: tuple[int, ...], budget: float = BUDGET, itemsize: int = 4
) -> int:
    """Return the latent frames of a chunk for latents of `shape` [B,F,H,W,C] on one device; 0: the
    whole video at once.

    0 if `budget` bytes are enough for the whole video, and for single frames; else the largest
    chunk that they are enough for, but at least 1.
    """
    f = shape[1]
    if f == 1 or decode_bytes(config, shape, 0, itemsize) <= budget:
        return 0
    fitting = [
        chunk for chunk in range(1, f) if decode_bytes(config, shape, chunk, itemsize) <= budget
    ]
    return max(fitting, default=1)


def chunk_sizes(frames: int, chunk: int) -> list[int]:
    """Return the latent frames of each chunk: the remainder first, then `chunk` each, so that two
    functions are compiled for any length.
    """
    first = (frames - 1) % chunk + 1
    return [first] + [chunk] * ((frames - first) // chunk)


def decode_chunks(step: Callable, latents: Float[Array, "B F H W C"], sizes: list[int]) -> Iterator:
    """Yield the video of the latents in chunks of `sizes` latent frames.

    step: (latents of a chunk, history) -> (its video, history), e.g. by
    `AutoencoderKLWan.decode_chunk`. Raises ValueError when the sizes are not positive or their sum
    is not F.
    """
    if sum(sizes) != latents.shape[1] or min(sizes) < 1:
        raise ValueError(
            f"chunks of {sizes} latent frames do not make up {latents.shape[1]} frames"
        )
    start = 0
    history = ()
    for size in sizes:
        video, history = step(latents[:, start : start + size], history)
        start += size
        yield video


def encode_chunks(
    step: Callable, video: Float[Array, "B frames height width 3"], sizes: list[int], factor: int
) -> Iterator:
    """Yield what `step` returns of the frames of a video in chunks of `sizes` latent frames.

    step: (frames of a chunk, history) -> (result, history), e.g. `AutoencoderKLWan.encode_chunk`.
    factor: frames of a latent frame after the first one, which has one. Raises ValueError when the
    sizes are not positive or the chunks do not make up the video.
    """
    frames = 1 + factor * (sum(sizes) - 1)
    if frames != video.shape[1] or min(sizes) < 1:
        raise ValueError(f"chunks of {sizes} latent frames do not make up {video.shape[1]} frames")
    start = 0
    history = ()
    for size in sizes:
        end = start + factor * size - (factor - 1 if start == 0 else 0)
        result, history = step(video[:, start:end], history)
        start = end
        yield result


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return the first cells of the fewest evenly spaced tiles of `tile` cells that cover `size`
    cells and overlap by at least `overlap`.
    """
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [i * (size - tile) // (count - 1) for i in range(count)]


def _ramp(size: int, overlap: int) -> Float32[np.ndarray, " size"]:
    """Return weights that are 1 inside and decrease towards both ends over `overlap` values, never
    to 0.
    """
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5  # to the nearer end
    return np.minimum(distance / max(overlap, 0.5), 1).astype(np.float32)


def decode_tiles(
    decode: Callable, latents: Float[Array, "B F H W C"], tile: int, overlap: int
) -> Float32[np.ndarray, "B frames height width 3"]:
    """Return the video of the latents, decoded in overlapping tiles of `tile` x `tile` cells and
    blended.

    For frames so large that even a chunk of one latent frame does not fit the device. decode:
    latents [B,F,<=tile,<=tile,C] -> video fp32 on the host.

    Tiles are decoded independently, so the result is an approximation: the attention and the
    convolutions of the lowest levels would look beyond the border of a tile, and colours can differ
    between tiles. A larger overlap hides that better. A single tile is exact. Weights decrease
    linearly towards the borders of a tile and are normalised to a sum of 1. Raises ValueError
    unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(
            f"tile={tile}, overlap={overlap}: tiles must overlap by less than their size, in "
            "latent cells"
        )
    _, _, h, w, _ = latents.shape
    total: np.ndarray | None = None
    weight: np.ndarray | None = None
    for y in tile_starts(h, tile, overlap):
        for x in tile_starts(w, tile, overlap):
            piece = decode(latents[:, :, y : y + tile, x : x + tile])
            factor = piece.shape[2] // min(h, tile)  # pixels of a cell
            if total is None or weight is None:
                total = np.zeros(
                    (*piece.shape[:2], h * factor, w * factor, piece.shape[-1]), np.float32
                )
                weight = np.zeros((h * factor, w * factor, 1), np.float32)
            height, width = piece.shape[2:4]
            rows = slice(y * factor, y * factor + height)
            columns = slice(x * factor, x * factor + width)
            share = np.outer(_ramp(height, overlap * factor), _ramp(width, overlap * factor))
            share = share[..., None]  # [height,width,1]
            total[:, :, rows, columns] += share * piece
            weight[rows, columns] += share
    assert total is not None and weight is not None  # there is at least one tile
    return total / weight
