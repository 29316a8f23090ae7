"""wan_jax/models/vae_chunks.py: chunks of time are exact, tiles blend, and the estimate of the
bytes holds.
"""

import re
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.random_vae import (
    BOTH,
    WAN_21,
    WAN_22,
    abstract,
    largest_difference,
    maker,
    quick_jit,
    random_model,
)
from wan_jax.models import vae_chunks
from wan_jax.models.config import VAEConfig, from_dict


def step(graphdef, state, z, history):
    return nnx.merge(graphdef, state).decode_chunk(z, history)


compiled_step = quick_jit(step)
compiled_encode = quick_jit(
    lambda graphdef, state, x, history: nnx.merge(graphdef, state).encode_chunk(x, history)
)
encode_whole = quick_jit(lambda graphdef, state, x: nnx.merge(graphdef, state).encode(x))
whole = quick_jit(lambda graphdef, state, z: nnx.merge(graphdef, state).decode(z))


def latents(settings, frames, height=1, width=2, seed=3):
    rng = np.random.default_rng(seed)
    return jnp.asarray(
        rng.standard_normal((2, frames, height, width, settings["z_dim"])), jnp.float32
    )


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.slow
@BOTH
def test_chunks_are_the_whole_clip(settings):
    """Chunks of 1 and 2 latent frames, alone and mixed, and one chunk of all."""
    graphdef, state = nnx.split(random_model(settings))
    z = latents(settings, 4)
    expected = whole(graphdef, state, z)
    assert expected.shape[1] == 13
    assert [vae_chunks.chunk_sizes(6, chunk) for chunk in (1, 2, 3, 4)] == [
        [1] * 6,
        [2, 2, 2],
        [3, 3],
        [2, 4],
    ]
    for sizes in ([1] * 4, [2, 2], [1, 2, 1], [2, 1, 1]):
        pieces = list(vae_chunks.decode_chunks(partial(compiled_step, graphdef, state), z, sizes))
        assert [p.shape[1] for p in pieces] == [4 * sizes[0] - 3, *(4 * n for n in sizes[1:])]
        assert largest_difference(np.concatenate(pieces, axis=1), expected) < 1e-5, sizes


@pytest.mark.slow
@BOTH
def test_chunks_are_encoded_as_the_whole_video(settings):
    """Mean and logvar, by chunks of 1 and 2 latent frames; Diffusers encodes the whole video alike
    (`test_vae.py`).
    """
    graphdef, state = nnx.split(random_model(settings))
    cell = settings.get("scale_factor_spatial", 8)
    video = np.random.default_rng(4).uniform(-1, 1, (2, 13, cell, 2 * cell, 3)).astype(np.float32)
    expected = encode_whole(graphdef, state, video)
    assert expected[0].shape[1] == 4
    for sizes in ([1] * 4, [2, 2], [1, 2, 1]):
        step = partial(compiled_encode, graphdef, state)
        pieces = list(vae_chunks.encode_chunks(step, video, sizes, 4))
        assert [p[0].shape[1] for p in pieces] == sizes
        for whole_video, parts in zip(expected, zip(*pieces)):
            assert largest_difference(np.concatenate(parts, axis=1), whole_video) < 1e-5, sizes


@pytest.mark.slow
@BOTH
def test_a_later_chunk_is_not_encoded_as_the_start_of_a_video(settings):
    graphdef, state = nnx.split(random_model(settings))
    cell = settings.get("scale_factor_spatial", 8)
    video = np.random.default_rng(5).uniform(-1, 1, (1, 5, cell, cell, 3)).astype(np.float32)
    _, history = compiled_encode(graphdef, state, video[:, :1], ())
    (mean, _), after = compiled_encode(graphdef, state, video[:, 1:], history)
    assert [h.shape for h in after] == [h.shape for h in history]
    blank = tuple(jnp.zeros_like(h) for h in history)
    (empty, _), _ = compiled_encode(graphdef, state, video[:, 1:], blank)
    assert largest_difference(mean, empty) > 1e-3


@pytest.mark.parametrize("frames", [3, 6])
def test_a_later_chunk_has_whole_latent_frames(frames):
    model = nnx.merge(*abstract(maker.CONFIG))
    with pytest.raises(ValueError, match=rf"{frames} frames.* 4k frames, use 4"):
        model.encode_chunk(jnp.zeros((1, frames, 8, 8, 3)), (jnp.zeros((1, 2, 8, 8, 3)),))
    with pytest.raises(ValueError, match=r"\[1, 1\].* 9 frames"):
        next(vae_chunks.encode_chunks(None, np.zeros((1, 9, 8, 8, 3)), [1, 1], 4))


@pytest.mark.slow
@BOTH
def test_the_history_matters_and_is_of_two_frames(settings):
    """32 causal convolutions look back in both decoders; without what they carry the second chunk
    differs.
    """
    graphdef, state = nnx.split(random_model(settings | {"num_res_blocks": 2}))
    z = latents(settings, 2)
    _, history = compiled_step(graphdef, state, z[:, :1], ())
    assert len(history) == 32 and {h.shape[:2] for h in history} == {(2, 2)}
    video, after = compiled_step(graphdef, state, z[:, 1:], history)
    assert [h.shape for h in after] == [h.shape for h in history]
    empty, _ = compiled_step(graphdef, state, z[:, 1:], tuple(jnp.zeros_like(h) for h in history))
    assert largest_difference(video, empty) > 1e-2


@pytest.mark.parametrize("sizes", [[2, 2], [3, 0], [4, -1]])
def test_chunks_that_do_not_make_up_the_clip(sizes):
    with pytest.raises(ValueError, match=re.escape(str(sizes))):
        list(vae_chunks.decode_chunks(None, jnp.zeros((1, 3, 1, 1, 16)), sizes))


@pytest.mark.parametrize("frames", [1, 2, 7, 21])
def test_any_clip_needs_two_sizes(frames):
    for chunk in range(1, frames + 2):
        sizes = vae_chunks.chunk_sizes(frames, chunk)
        assert sum(sizes) == frames and set(sizes[1:]) <= {chunk} and 1 <= sizes[0] <= chunk


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, height, width, chunk",
    [
        (WAN_21, 480, 832, 0),
        (WAN_21, 480, 832, 2),
        (WAN_21, 720, 1280, 1),
        (WAN_22, 704, 1280, 0),
        (WAN_22, 704, 1280, 1),
    ],
    ids=["2.1 480", "2.1 480 by 2", "2.1 720 by 1", "2.2 704", "2.2 704 by 1"],
)
def test_the_estimate_covers_what_the_published_models_need(settings, height, width, chunk):
    """XLA's own count of temporary buffers and history, from compiling without weights; at most a
    third too high.
    """
    config, (graphdef, state) = from_dict(VAEConfig, settings), abstract(settings)
    cells = (
        height // config.scale_factor_spatial,
        width // config.scale_factor_spatial,
        config.z_dim,
    )
    z = jax.ShapeDtypeStruct((1, chunk or 9, *cells), jnp.float32)
    if chunk:
        history = jax.eval_shape(partial(step, graphdef), state, z, ())[1]
        compiled = (
            jax.jit(
                partial(step, graphdef),
                donate_argnums=2,
                compiler_options={"xla_backend_optimization_level": 0},
            )
            .lower(state, z, history)
            .compile()
        )
    else:
        history, compiled = (), whole.lower(graphdef, state, z).compile()
    needed = compiled.memory_analysis().temp_size_in_bytes + sum(
        h.size * h.dtype.itemsize for h in history
    )
    estimate = vae_chunks.decode_bytes(config, (1, 9, *cells), chunk)
    print(f"{needed / 1e9:.1f} GB, estimate {estimate / 1e9:.1f} GB")
    assert needed <= estimate <= 1.35 * needed


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, height, width, chunk",
    [(WAN_21, 480, 832, 1), (WAN_22, 704, 1280, 0), (WAN_22, 704, 1280, 1)],
    ids=["2.1 480 by 1", "2.2 704", "2.2 704 by 1"],
)
def test_encoding_needs_no_more_than_the_estimate_for_decoding(settings, height, width, chunk):
    config, (graphdef, state) = from_dict(VAEConfig, settings), abstract(settings)

    def encode(state, video, history):
        return nnx.merge(graphdef, state).encode_chunk(video, history)

    def frames(count):
        return jax.ShapeDtypeStruct((1, count, height, width, 3), jnp.float32)

    video, history = frames(33), ()
    if chunk:
        history = jax.eval_shape(encode, state, frames(1), ())[1]
        video = frames(4 * chunk)
    options = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(encode, donate_argnums=2, compiler_options=options)
    memory = compiled.lower(state, video, history).compile().memory_analysis()
    needed = memory.temp_size_in_bytes + sum(h.size * h.dtype.itemsize for h in history)
    cells = height // config.scale_factor_spatial, width // config.scale_factor_spatial
    estimate = vae_chunks.decode_bytes(config, (1, 9, *cells, config.z_dim), chunk)
    print(f"{needed / 1e9:.1f} GB, estimate {estimate / 1e9:.1f} GB")
    assert needed <= estimate


def test_small_decodes_are_whole_and_large_ones_chunked():
    choose = partial(vae_chunks.choose_chunk, from_dict(VAEConfig, WAN_21))
    assert choose((64, 1, 64, 64, 16)) == 0  # single frames
    assert choose((1, 3, 60, 104, 16)) == 0
    assert choose((1, 21, 60, 104, 16)) == 2
    assert choose((8, 21, 60, 104, 16)) == choose((1, 21, 90, 160, 16)) == 1
    assert choose((1, 21, 60, 104, 16), budget=40e9) == 8
    assert choose((1, 21, 60, 104, 16), itemsize=2) == 6
    assert choose((1, 21, 60, 104, 16), budget=200e9) == 0
    tiny = from_dict(VAEConfig, maker.CONFIG)
    assert vae_chunks.choose_chunk(tiny, (64, 5, 4, 16, 16)) == 0


# --- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, tile, overlap, starts",
    [
        (60, 32, 8, [0, 14, 28]),
        (60, 60, 8, [0]),
        (5, 8, 2, [0]),
        (16, 8, 0, [0, 8]),
        (17, 8, 0, [0, 4, 9]),
    ],
)
def test_tiles_cover(size, tile, overlap, starts):
    assert vae_chunks.tile_starts(size, tile, overlap) == starts
    for a, b in pairwise(starts):
        assert b - a <= tile - overlap
    assert starts[-1] + tile >= size


def test_tiles_blend():
    """A stand-in decoder without a view beyond its cell is reproduced; one that adds a constant a
    tile is blended.
    """
    z = latents(maker.CONFIG, 2, height=7, width=9)

    def local(z):
        return np.repeat(np.repeat(np.asarray(z[..., :3]), 8, axis=2), 8, axis=3)

    np.testing.assert_allclose(vae_chunks.decode_tiles(local, z, 4, 2), local(z), atol=1e-6)
    np.testing.assert_allclose(vae_chunks.decode_tiles(local, z, 4, 0), local(z), atol=1e-6)
    calls = []

    def constant(z):
        calls.append(z.shape)
        return np.full_like(local(z), len(calls))

    # two tiles side by side, columns 0-31 and 16-47
    out = vae_chunks.decode_tiles(constant, z[:, :, :4, :6], 4, 2)
    assert calls == [(2, 2, 4, 4, 16)] * 2
    assert (out[..., :16, :] == 1).all() and (out[..., 32:, :] == 2).all()
    seam = out[0, 0, 0, 16:32, 0]
    np.testing.assert_allclose(seam, 1 + (np.arange(16) + 0.5) / 16, atol=1e-6)


@pytest.mark.slow
def test_tiles_of_the_real_decoder_are_near_and_nearer_with_overlap():
    graphdef, state = nnx.split(random_model())
    z = latents(maker.CONFIG, 1, height=4, width=16)
    expected = np.asarray(whole(graphdef, state, z))
    errors = []
    for tile, overlap in ((8, 0), (8, 6), (16, 6)):
        out = vae_chunks.decode_tiles(
            lambda z: np.asarray(whole(graphdef, state, z)), z, tile, overlap
        )
        assert out.shape == expected.shape
        errors.append(float(np.linalg.norm(out - expected) / np.linalg.norm(expected)))
    print("tile errors", errors)
    assert errors[0] > errors[1] > 1e-4 and errors[2] < 1e-6


@pytest.mark.parametrize("tile, overlap", [(8, 8), (0, 0), (8, -1)])
def test_tiles_that_cannot_be(tile, overlap):
    with pytest.raises(ValueError, match=f"tile={tile}, overlap={overlap}"):
        vae_chunks.decode_tiles(None, jnp.zeros((1, 1, 9, 9, 16)), tile, overlap)
