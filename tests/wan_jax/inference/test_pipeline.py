"""The stages of sampling: embeddings, sizes, and decoding in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.command_line.cli import UserError
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.inference import pipeline
from wan_jax.models import vae_chunks
from wan_jax.models.config import TransformerConfig, VAEConfig
from wan_jax.storage import model_dir

PROMPTS = ('A red sign with the word "open".', "Someone wrote “it's late” on a  wall.")


def test_each_prompt_is_encoded_as_if_alone(folders, monkeypatch):
    monkeypatch.setattr(pipeline, "ENCODER_BATCH", 2)
    model = model_dir.open_model(folders[1])
    together = pipeline.embed_prompts(model, [PROMPTS[0], "x" * 70, PROMPTS[1]])
    assert together.rows % pipeline.ROW_MULTIPLE == 0
    alone = pipeline.embed_prompts(model, PROMPTS[1:])
    np.testing.assert_allclose(together.prompts[2], alone.prompts[0], atol=1e-5)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batch = together.batch([2], device, device)
    assert not batch.embeddings[0, len(alone.prompts[0]) :].any()
    assert batch.padding == 512 - batch.embeddings.shape[1] == 512 - together.rows


def test_sizes_that_wan_cannot_make():
    vae, transformer = VAEConfig(latents_mean=(0,) * 16, latents_std=(1,) * 16), TransformerConfig()
    assert pipeline.latent_shape(81, 480, 832, vae, transformer) == (21, 60, 104, 16)
    for arguments, message in (
        ((4, 480, 832), "frames=4.*use 1"),
        ((5, 472, 832), "height=472.*use 464|480"),
        ((5, 480, 8), "width=8.*use 16"),
        ((4097, 480, 832), "frames=4097.*4093"),
        ((5, 16400, 832), "height=16400.*16384"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline.latent_shape(*arguments, vae, transformer)
    vae = VAEConfig(z_dim=48, is_residual=True, patch_size=2, scale_factor_spatial=16)
    transformer = TransformerConfig(in_channels=48, out_channels=48)
    assert pipeline.latent_shape(121, 704, 1280, vae, transformer) == (31, 44, 80, 48)
    with pytest.raises(UserError, match="height=720 must be a multiple of 32; use 704"):
        pipeline.latent_shape(121, 720, 1280, vae, transformer)


@pytest.mark.slow
def test_decoding_in_pieces(folders, monkeypatch):
    """By argument, by the automatic choice, on one device and several: the pixels of the whole
    clip.
    """
    graphdef, state = pipeline.load_vae(
        model_dir.open_model(folders[1]), mesh_lib.make_mesh(devices=jax.devices()[:1])
    )
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 6, 16)), jnp.float32)
    sizes, wrapped = [], vae_chunks.decode_chunks

    def spy(step, latents, chunks):
        sizes.append(chunks)
        return wrapped(step, latents, chunks)

    monkeypatch.setattr(vae_chunks, "decode_chunks", spy)
    decode = pipeline.make_decoder(graphdef)
    whole, finite = vars(decode(state, latents)()).values()
    assert finite.dtype == bool and finite.tolist() == [True, True]
    assert (
        type(whole) is np.ndarray and whole.dtype == np.uint8 and whole.shape == (2, 9, 32, 48, 3)
    )
    assert not sizes and len(np.unique(whole)) > 50

    def same(video, finite=(True, True)):
        found = video()
        assert found.frames.dtype == np.uint8 and found.finite.tolist() == list(finite)
        return np.abs(found.frames[found.finite].astype(int) - whole[found.finite]).max() <= 1

    in_chunks = pipeline.make_decoder(graphdef, chunk=2)
    assert same(in_chunks(state, latents)) and same(
        pipeline.make_decoder(graphdef, chunk=3)(state, latents)
    )
    assert sizes == [[1, 2]]
    monkeypatch.setattr(vae_chunks, "BUDGET", 1.0)
    assert same(pipeline.make_decoder(graphdef)(state, latents))
    assert sizes.pop() == [1, 1, 1]
    assert (
        not np.abs(decode(state, latents[:, :1])().frames.astype(int) - whole[:, :1]).max() > 1
        and len(sizes) == 1
    )
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:2])
    sharded = jax.device_put(latents, sharding_lib.batch_sharding(mesh))
    assert same(in_chunks(sharding_lib.replicate(state, mesh), sharded)) and len(sizes) == 2
    tiled = pipeline.make_decoder(graphdef, chunk=2, tile=4, overlap=2)
    assert tiled(state, latents)().frames.shape == whole.shape and len(sizes) == 4
    # one tile
    assert same(pipeline.make_decoder(graphdef, chunk=0, tile=8, overlap=2)(state, latents))
    for bad in (np.nan, np.inf):
        broken = latents.at[1, 2, 0, 0, 0].set(bad)  # in the last chunk
        for decoder in (decode, in_chunks, tiled):
            assert same(decoder(state, broken), (True, False)) or decoder is tiled


def test_one_ahead_asks_for_the_next_before_it_gives_the_last():
    asked = []
    numbers = (asked.append(i) or i for i in range(3))
    assert [(i, list(asked)) for i in pipeline.one_ahead(numbers)] == [
        (0, [0, 1]),
        (1, [0, 1, 2]),
        (2, [0, 1, 2]),
    ]
    assert list(pipeline.one_ahead(iter(()))) == []


@pytest.mark.parametrize("settings", [{"chunk": -1}, {"tile": -1}, {"tile": 8, "overlap": 8}])
def test_pieces_that_cannot_be(settings):
    with pytest.raises(ValueError, match=r"chunk=.*tile=.*overlap="):
        pipeline.make_decoder(None, **settings)
