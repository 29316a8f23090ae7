"""The configurations of the published models, and of a converted one."""

import pytest

from wan_jax.inference.pipeline import latent_shape
from wan_jax.models.presets import PRESETS, of_folder
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


def test_a_converted_model_has_its_own(folders):
    model = model_dir.open_model(folders[1])
    preset = of_folder(model)
    assert preset.repository == str(model.path) and preset.experts == model.experts
    assert preset.transformer == model.config("transformer") and preset.vae == model.config("vae")
