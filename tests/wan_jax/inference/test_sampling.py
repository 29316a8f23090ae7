"""Sampling batch by batch: what a video does not depend on, and what is freed when."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.from_diffusers import convert
from tests import tiny
from wan_jax.inference import sampling
from wan_jax.inference.placement import choose_placement
from wan_jax.inference.settings import Given, choose_settings
from wan_jax.models.quantised import Quantisation
from wan_jax.storage import model_dir

PROMPTS = ('A red sign with the word "open".', "sea")


@pytest.fixture(scope="module")
def request_of(folders):
    """Returns a function: (other fields, placement) -> a request for 2 x 2 pictures in 2 steps."""
    model = model_dir.open_model(folders[1])

    def make(samples=2, frames=1, **place):
        return sampling.SampleRequest(
            model=model,
            checkpoint=None,
            prompts=PROMPTS,
            negative="ugly",
            samples=samples,
            frames=frames,
            height=32,
            width=48,
            settings=choose_settings(model, 32, 48, Given(steps=2)),
            place=choose_placement(model, len(PROMPTS) * samples, frames, **place),
        )

    return make


def videos_of(request):
    """(All videos of a request, in order; the networks.)"""
    loaded = sampling.load(request)
    batches = list(sampling.sample(request, sampling.encode(request), loaded))
    assert [row for batch in batches for row in batch.rows] == list(range(len(request.prompt_of)))
    assert all(batch.videos.finite.all() for batch in batches)
    return np.concatenate([batch.videos.frames for batch in batches]), loaded


def latents_of(request):
    """All final latents of a request, in order."""
    found = sampling.denoise(request, sampling.encode(request), sampling.load(request))
    return np.concatenate([np.asarray(x) for _, x, _ in found])


def test_noise_depends_on_the_number_of_the_video_alone(request_of):
    every = request_of(devices=1)
    whole = np.asarray(every.initial_noise(np.arange(4)))
    assert len({row.tobytes() for row in whole}) == 4
    for rows in ([2], [3, 0], [1, 1]):
        np.testing.assert_array_equal(every.initial_noise(np.array(rows)), whole[rows])
    more = request_of(samples=7, devices=1)
    np.testing.assert_array_equal(more.initial_noise(np.arange(4)), whole)
    other = dataclasses.replace(every, seed=1)
    assert (np.asarray(other.initial_noise(np.arange(4))) != whole).mean() > 0.99


def test_given_noise(request_of):
    request = request_of(devices=1)
    noise = np.random.default_rng(0).standard_normal((4, *request.shape)).astype(np.float32)
    request = dataclasses.replace(request, noise=noise)
    np.testing.assert_array_equal(request.initial_noise(np.array([3, 1])), noise[[3, 1]])


def test_batches(request_of):
    request = request_of(samples=5, devices=1, batch_size=4)
    assert [rows.tolist() for rows in request.batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert request.padded(request.batches[2]).tolist() == [8, 9, 8, 9]
    assert request.prompt_of.tolist() == [0] * 5 + [1] * 5
    assert [len(rows) for rows in request_of(samples=5, devices=1, batch_size=3).batches] == [
        3,
        3,
        3,
        1,
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, mesh",
    [
        (dict(devices=1, batch_size=3), (1, 1, 1)),  # the last batch is filled up
        (dict(devices=4), (4, 1, 1)),
        (dict(devices=8), (4, 1, 2)),  # two devices for each video
    ],
)
def test_videos_do_not_depend_on_batches_and_devices(request_of, place, mesh):
    whole, networks = videos_of(request_of(devices=1))
    assert not networks.weights.states  # freed before decoding, as there is one batch
    other = request_of(**place)
    assert tuple(other.place.mesh.shape.values()) == mesh
    found, _ = videos_of(other)
    # differently compiled functions: a value near .5 is rounded to a neighbour
    assert np.abs(found.astype(int) - whole).max() <= 1
    assert (found != whole).mean() < 1e-3


@pytest.mark.slow
def test_each_video_is_of_its_own_prompt(request_of):
    """With the text of a prompt and the noise of a video, it ends as alone; another text ends elsewhere."""
    request = request_of(devices=1, batch_size=2)

    whole = latents_of(request)
    noise = np.asarray(request.initial_noise(np.arange(4)))
    for number, prompt in enumerate(PROMPTS):
        own = slice(2 * number, 2 * number + 2)
        alone = dataclasses.replace(request, prompts=(prompt,), noise=noise[own])
        # padded to another length of the text, latents of size 4: some roundings of fp32
        np.testing.assert_allclose(latents_of(alone), whole[own], atol=1e-4)
    swapped = dataclasses.replace(request, prompts=PROMPTS[::-1], noise=noise)
    assert np.abs(latents_of(swapped) - whole).min(axis=0).max() > 1e-2


@pytest.mark.slow
def test_the_velocity_is_shifted_by_the_reward(request_of):
    """By 0.5, which is subtracted, for sigmas from 1 to 0: the latents end near 0.5 higher."""
    request = request_of(samples=1, devices=1)
    shifted = dataclasses.replace(request, reward_shift=lambda x, *_: jnp.full_like(x, 0.5))
    rise = latents_of(shifted) - latents_of(request)
    assert rise.mean() == pytest.approx(0.5, abs=0.2)


@pytest.mark.slow
def test_decoding_waits_where_memory_is_short(request_of):
    """The same videos, whether each batch is decoded at once or all after the transformer is freed."""
    request = request_of(devices=1, batch_size=1)
    beside, networks = videos_of(request)
    assert networks.weights.states and not jax.tree.leaves(networks.weights.states)[0].is_deleted()
    short = dataclasses.replace(request, place=dataclasses.replace(request.place, limit=10**6))
    after, networks = videos_of(short)
    assert not networks.weights.states
    np.testing.assert_array_equal(after, beside)


@pytest.mark.slow
def test_two_experts_in_batches(tmp_path):
    """All batches go through the first expert, then through the second, each with its guidance."""
    source = tiny.write_pipeline(tmp_path / "source", seed=5, boundary=0.875)
    convert(str(source), tmp_path / "model", "float32")
    model = model_dir.open_model(tmp_path / "model")
    given = Given(steps=3, shift=5.0, guidance=4.0, guidance_2=3.0)
    found = {}
    for batch_size in (1, 4):
        request = sampling.SampleRequest(
            model=model,
            checkpoint=None,
            prompts=PROMPTS,
            negative="",
            samples=2,
            frames=1,
            height=32,
            width=48,
            settings=choose_settings(model, 32, 48, given),
            place=choose_placement(model, 4, 1, devices=1, batch_size=batch_size),
            offload="always",
        )
        assert request.settings.guidance == (4.0, 3.0)
        found[batch_size], networks = videos_of(request)
        assert (not networks.weights.states) == (batch_size == 4)
    # differently compiled functions: a value near .5 is rounded to a neighbour
    assert np.abs(found[1].astype(int) - found[4]).max() <= 1


def test_remedies_name_flags_that_would_help(request_of):
    request = request_of(samples=4, frames=9, devices=1, batch_size=8)
    assert "--batch_size=4" in sampling.denoising_remedies(request)
    assert "--frames=5" in sampling.denoising_remedies(request)
    assert {"--weights=fp8", "--dtype=bfloat16"} <= {*sampling.denoising_remedies(request)}
    for stored, flags in (("fp8", ["--weights=nf4"]), ("nf4", [])):
        place = dataclasses.replace(request.place, quantisation=Quantisation(stored))
        assert sampling.fewer_bits(place) == [*flags, "--dtype=bfloat16"]
    large = dataclasses.replace(request, height=480, width=832)
    assert "--tile=224" in sampling.decoding_remedies(large)
    assert "--height=336 --width=592" in sampling.decoding_remedies(large)
