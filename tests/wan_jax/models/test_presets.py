"""The configurations of the published models, and of a converted one."""

import dataclasses
import json
import shutil

import pytest

from wan_jax.inference.pipeline import latent_shape
from wan_jax.models.presets import GENERAL, PRESETS, of_folder, published
from wan_jax.storage import model_dir


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_fit_together(name):
    preset = PRESETS[name]
    for config in (preset.transformer, preset.vae, preset.text_encoder):
        config.validate()
    assert preset.transformer.in_channels == preset.vae.z_dim
    assert preset.transformer.text_dim == preset.text_encoder.d_model
    assert latent_shape(5, 480, 832, preset.vae, preset.transformer)[-1] == preset.vae.z_dim
    assert len(preset.experts) == (2 if name == "wan2.2-a14b" else 1)
    assert len(preset.sampling.guidance) == len(preset.experts)


@pytest.mark.parametrize(
    "name, steps, guidance, shift, small_shift, fps",
    [
        ("wan2.1-1.3b", 50, (6.0,), 8.0, 8.0, 16),
        ("wan2.1-14b", 50, (5.0,), 5.0, 3.0, 16),
        ("wan2.2-a14b", 40, (4.0, 3.0), 12.0, 12.0, 16),
        ("wan2.2-ti2v-5b", 50, (5.0,), 5.0, 5.0, 24),
    ],
)
def test_published_settings(name, steps, guidance, shift, small_shift, fps):
    """The values of Wan's own repositories, at 720p and at 480p."""
    sampling = PRESETS[name].sampling
    assert (sampling.steps, sampling.guidance, sampling.fps) == (steps, guidance, fps)
    sizes = [(720, 1280), (1280, 720), (704, 1280), (480, 832), (832, 480), (512, 512)]
    assert [sampling.shift_for(*size) for size in sizes] == [shift] * 3 + [small_shift] * 3


def test_a_model_is_recognised_by_its_networks(folders, tmp_path):
    """Experts included: 2.1 14B and A14B have the same transformer and VAE."""
    model = model_dir.open_model(shutil.copytree(folders[1], tmp_path / "model"))
    assert published(model) is None and GENERAL.shift_for(480, 832) is None
    for name, preset in PRESETS.items():
        (model.path / "transformer" / "config.json").write_text(
            json.dumps(dataclasses.asdict(preset.transformer))
        )
        (model.path / "vae" / "config.json").write_text(json.dumps(dataclasses.asdict(preset.vae)))
        manifest = model.manifest | {"components": preset.experts}
        index = model.index | {"boundary_ratio": preset.boundary}
        assert published(dataclasses.replace(model, manifest=manifest, index=index)) == name


def test_a_converted_model_has_its_own(folders):
    model = model_dir.open_model(folders[1])
    preset = of_folder(model)
    assert preset.repository == str(model.path) and preset.experts == model.experts
    assert preset.transformer == model.config("transformer") and preset.vae == model.config("vae")
