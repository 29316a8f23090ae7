"""wan_jax/models/vae.py against Diffusers (live and recorded), and the properties it promises.

B videos, T pixel frames, F latent frames, H W pixels.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.random_vae import (
    BOTH,
    GOLDEN,
    WAN_21,
    WAN_22,
    abstract,
    build,
    largest_difference,
    maker,
    quick_jit,
    random_model,
    relative_error,
)
from wan_jax.models import flat_params
from wan_jax.models.config import ConfigError, VAEConfig, from_dict
from wan_jax.models.vae import AutoencoderKLWan
from wan_jax.storage import key_table

TWO_BLOCKS = {"base_dim": 8, "num_res_blocks": 2}
OTHER_SHAPE = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "z_dim": 4,
    "dim_mult": [1, 3, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "scale_factor_spatial": 4,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
# 2.2 as published in all but width; then without patches and with a last level that changes the
# channels
TWO_BLOCKS_22 = maker.CONFIG_22 | {"num_res_blocks": 2}
OTHER_SHAPE_22 = (
    maker.CONFIG_22
    | OTHER_SHAPE
    | {
        "base_dim": 4,
        "dim_mult": [1, 4, 2],
        "patch_size": None,
        "in_channels": 3,
        "out_channels": 3,
    }
)


def outputs(graphdef, state, video, z) -> dict:
    model = nnx.merge(graphdef, state)
    mean, logvar = model.encode(video)
    return {"mean": mean, "logvar": logvar, "video": model.decode(z)}


compiled_outputs = quick_jit(outputs)


def run(model, video, z) -> dict:
    """The posterior of `video` and the decoded `z`; one program a config, dtype and shape."""
    return compiled_outputs(*nnx.split(model), video, z)


def recorded_size(settings) -> tuple[int, int]:
    """Return the height and width of `test_recorded_outputs`, for which the model is compiled
    already.
    """
    return next(
        (height, width) for config, height, width in maker.RECORDED.values() if config == settings
    )


# --- against Diffusers ----------------------------------------------------------------------------


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("case", maker.LATENT_FRAMES)
@pytest.mark.parametrize("file", maker.RECORDED)
def test_recorded_outputs(file, case):
    path, (config, height, width) = GOLDEN / f"{file}.npz", maker.RECORDED[file]
    assert path.stat().st_size < 300_000
    with np.load(path) as recorded:
        assert json.loads(str(recorded["config"])) == config and int(recorded["seed"]) == maker.SEED
        inputs = maker.random_inputs(maker.SEED, maker.LATENT_FRAMES[case], height, width, config)
        for name, ours in run(random_model(config), *inputs).items():
            assert relative_error(ours, recorded[f"{case}_{name}"]) <= 1e-5, name
        assert np.mean(np.abs(recorded[f"{case}_video"]) == 1) < 0.2  # the clamp hides little


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    "settings, height, width, lengths",
    [
        (maker.CONFIG | TWO_BLOCKS, 16, 24, [3]),
        (maker.CONFIG | OTHER_SHAPE, 16, 24, [1, 2]),
        (TWO_BLOCKS_22, 32, 48, [3]),
        (OTHER_SHAPE_22, 16, 24, [1, 2]),
    ],
    ids=["two blocks", "other shape", "2.2 two blocks", "2.2 other shape"],
)
def test_diffusers(settings, height, width, lengths):
    """1, 2 and 3 latent frames of each generation; `test_recorded_outputs` has 1 and 3 of another
    configuration.
    """
    model, weights = maker.peer(settings, seed=5)
    ours = build(settings, weights)
    for frames in lengths:
        inputs = maker.random_inputs(frames, frames, height, width, settings)
        theirs = maker.run(model, *inputs)
        for name, value in run(ours, *inputs).items():
            error = relative_error(value, theirs[name])
            print(f"F={frames} {name}: {error:.1e}")
            assert error <= 1e-5, (frames, name)


# --- parameters -----------------------------------------------------------------------------------


def test_parameters_of_the_published_vae():
    shapes = {k: v.shape for k, v in flat_params.flatten(abstract(WAN_21)[1]).items()}
    sizes = {
        part: sum(int(np.prod(s)) for k, s in shapes.items() if k.startswith(part))
        for part in ("", "encoder/", "decoder/")
    }
    assert sizes == {"": 126_892_531, "encoder/": 53_595_872, "decoder/": 73_295_331}
    theirs = {e.key: e.shape for e in key_table.entries("vae", shapes)}
    assert len(theirs) == 194
    assert theirs["encoder.down_blocks.8.time_conv.weight"] == (384, 384, 3, 1, 1)
    assert theirs["decoder.up_blocks.0.upsamplers.0.time_conv.weight"] == (768, 384, 3, 1, 1)
    assert theirs["decoder.up_blocks.2.upsamplers.0.resample.1.weight"] == (96, 192, 3, 3)
    assert theirs["decoder.mid_block.attentions.0.norm.gamma"] == (384, 1, 1)
    assert theirs["encoder.down_blocks.6.conv_shortcut.weight"] == (384, 192, 1, 1, 1)


def test_parameters_of_the_published_2_2_vae():
    shapes = {k: v.shape for k, v in flat_params.flatten(abstract(WAN_22)[1]).items()}
    sizes = {
        part: sum(int(np.prod(s)) for k, s in shapes.items() if k.startswith(part))
        for part in ("", "encoder/", "decoder/")
    }
    assert sizes == {"": 704_688_668, "encoder/": 149_627_776, "decoder/": 555_049_228}
    theirs = {e.key: e.shape for e in key_table.entries("vae", shapes)}
    assert len(theirs) == 196
    assert theirs["encoder.down_blocks.2.downsampler.time_conv.weight"] == (640, 640, 3, 1, 1)
    assert theirs["decoder.up_blocks.0.upsampler.time_conv.weight"] == (2048, 1024, 3, 1, 1)
    assert theirs["decoder.up_blocks.2.upsampler.resample.1.weight"] == (512, 512, 3, 3)
    assert theirs["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"] == (512, 1024, 1, 1, 1)
    assert theirs["encoder.down_blocks.1.resnets.0.norm1.gamma"] == (160, 1, 1, 1)


@pytest.mark.quick_cases(1)
@pytest.mark.parity
@pytest.mark.parametrize("settings", [maker.CONFIG | TWO_BLOCKS, TWO_BLOCKS_22], ids=["2.1", "2.2"])
def test_keys_of_diffusers_both_ways(settings):
    model, weights = maker.peer(settings)
    back = dict(
        key_table.to_theirs("vae", flat_params.flatten(nnx.state(build(settings, weights))))
    )
    assert set(back) == set(model.state_dict())
    for key, value in back.items():
        np.testing.assert_array_equal(value, weights[key])


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.slow
@BOTH
def test_the_first_frame_is_coded_as_a_single_frame(settings):
    model = random_model(settings)
    video, z = maker.random_inputs(7, 3, *recorded_size(settings), settings)
    clip, picture = run(model, video, z), run(model, video[:, :1], z[:, :1])
    for name in clip:
        assert largest_difference(clip[name][:, :1], picture[name]) < 1e-5, name


@pytest.mark.slow
@BOTH
def test_single_frames_use_the_last_temporal_tap_only(settings):
    model = random_model(settings)
    graphdef, state = nnx.split(model)
    flat = flat_params.flatten(state)
    for path, value in flat.items():
        if "time_conv" in path:
            flat[path] = jnp.full_like(value, jnp.nan)
        elif path.endswith("kernel") and value.ndim == 5:
            flat[path] = value.at[:-1].set(jnp.nan)
    broken = nnx.merge(graphdef, flat_params.unflatten(state, flat))
    inputs = maker.random_inputs(8, 1, *recorded_size(settings), settings)
    expected = run(model, *inputs)
    for name, value in run(broken, *inputs).items():
        np.testing.assert_array_equal(value, expected[name], name)


@pytest.mark.slow
def test_later_frames_do_not_change_earlier_ones_and_earlier_ones_change_later_ones():
    model = random_model()
    video, z = maker.random_inputs(9, 3, 16, 24, maker.CONFIG)

    def flipped(frames, latents):  # those pixel and latent frames change their sign
        x, y = video.copy(), z.copy()
        x[:, frames] *= -1
        y[:, latents] *= -1
        return run(model, x, y)

    base = run(model, video, z)
    late, early = flipped(slice(5, None), slice(2, None)), flipped(slice(5), slice(2))
    for name, cut in (("mean", 2), ("logvar", 2), ("video", 5)):
        assert largest_difference(late[name][:, :cut], base[name][:, :cut]) < 1e-5
        for frame in range(cut, base[name].shape[1]):
            assert largest_difference(late[name][:, frame], base[name][:, frame]) > 1e-2
        assert largest_difference(early[name][:, cut], base[name][:, cut]) > 1e-3


@pytest.mark.slow
def test_videos_of_a_batch_are_independent():
    model = random_model()
    inputs = maker.random_inputs(10, 3, 16, 24, maker.CONFIG)
    both = run(model, *inputs)
    for name, value in run(model, *(x[::-1] for x in inputs)).items():
        assert relative_error(value[::-1], both[name]) < 1e-6


# --- numbers --------------------------------------------------------------------------------------


def test_clamps():
    model = random_model()
    z_dim = maker.CONFIG["z_dim"]
    model.quant_conv.bias[...] = jnp.zeros((2 * z_dim,)).at[z_dim].set(1e3).at[z_dim + 1].set(-1e3)
    model.decoder.conv_out.bias[...] = jnp.array([50.0, -50.0, 0.0])
    out = run(model, *maker.random_inputs(8, 1, 16, 24, maker.CONFIG))
    np.testing.assert_array_equal(out["logvar"][..., 0], 20.0)
    np.testing.assert_array_equal(out["logvar"][..., 1], -30.0)
    np.testing.assert_array_equal(out["video"][..., 0], 1.0)
    np.testing.assert_array_equal(out["video"][..., 1], -1.0)
    assert 0 < float(jnp.abs(out["video"][..., 2]).max()) < 1


def test_normalise():
    mean, std = np.linspace(-2, 2, 16), np.linspace(0.5, 3, 16)
    settings = maker.CONFIG | {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    model = nnx.merge(*abstract(settings))  # no weights are read
    z = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 16)).astype(np.float32)
    assert relative_error(model.normalise(z), (z - mean) / std) < 1e-6
    assert relative_error(model.denormalise(z), z * std + mean) < 1e-6
    assert relative_error(model.denormalise(model.normalise(z)), z) < 1e-6
    half = jnp.asarray(z, jnp.bfloat16)
    assert model.normalise(half).dtype == model.denormalise(half).dtype == jnp.float32


@pytest.mark.slow
def test_bfloat16_trains():
    """bf16 weights and compute: outputs near fp32's, fp32 results, and a gradient for every
    parameter.

    Two levels with one change of size have a layer of every kind.
    """
    settings = (
        maker.CONFIG
        | OTHER_SHAPE
        | {
            "dim_mult": [1, 2],
            "temperal_downsample": [True],
            "scale_factor_spatial": 2,
            "scale_factor_temporal": 2,
        }
    )
    inputs = maker.random_inputs(11, 2, 8, 12, settings)
    model = random_model(settings, dtype=jnp.bfloat16)
    assert {v.dtype for v in flat_params.flatten(nnx.state(model)).values()} == {
        jnp.dtype(jnp.bfloat16)
    }
    exact = run(random_model(settings), *inputs)

    def loss(state, graphdef):
        out = outputs(graphdef, state, *inputs)
        return sum(jnp.mean(x**2) for x in out.values()), out

    graphdef, state = nnx.split(model)
    step = quick_jit(lambda graphdef, state: jax.grad(loss, has_aux=True)(state, graphdef))
    grads, out = step(graphdef, state)
    for name, value in out.items():
        assert value.dtype == jnp.float32
        assert 1e-4 < relative_error(value, exact[name]) < 0.05, name
    for path, grad in flat_params.flatten(grads).items():
        assert grad.dtype == jnp.bfloat16, path
        grad = np.asarray(grad, np.float32)
        assert np.isfinite(grad).all() and grad.any(), path


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 4, 16, 16, 3), r"4 frames.*1 \+ 4k.*use 1"),
        ((1, 12, 16, 16, 3), "12 frames.*use 9"),
        ((1, 5, 20, 16, 3), "height 20.*multiple of 8.*use 16"),
        ((1, 5, 16, 4, 3), "width 4.*multiple of 8.*use 8"),
        ((1, 3, 5, 16, 16), r"\(1, 3, 5, 16, 16\).*width, 3\]"),
        ((5, 16, 16, 3), r"\(5, 16, 16, 3\)"),
        ((1, 0, 16, 16, 3), "no axis empty"),
    ],
)
def test_videos_that_cannot_be_coded(shape, words):
    model = nnx.merge(*abstract(maker.CONFIG))
    with pytest.raises(ValueError, match=words):
        model.encode(jnp.zeros(shape))


def test_latents_that_cannot_be_decoded():
    model = nnx.merge(*abstract(maker.CONFIG))
    with pytest.raises(ValueError, match=r"z has shape \(1, 2, 2, 2, 48\).*16\]"):
        model.decode(jnp.zeros((1, 2, 2, 2, 48)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch_size": 2}, "scale_factor_spatial=8.*patch_size make it 16; set it to 16"),
        ({"patch_size": 2, "scale_factor_spatial": 16}, "in_channels=3.*multiple of 4"),
        ({"is_residual": True, "dim_mult": [1, 3, 2, 4]}, r"shortcuts.*dim_mult=\[1, 3, 2, 4\]"),
        (
            {"temperal_downsample": [True, True]},
            "temperal_downsample has 2 values.*4.*3 are needed",
        ),
        ({"temperal_downsample": [False, False, True]}, "scale_factor_temporal=4.*set it to 2"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial=16.*set it to 8"),
    ],
)
def test_configs_of_other_vaes_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        AutoencoderKLWan(from_dict(VAEConfig, maker.CONFIG | changes), rngs=nnx.Rngs(0))
