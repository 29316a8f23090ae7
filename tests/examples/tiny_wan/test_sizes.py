"""Sizes of tiny-wan are those of the shipped model."""

import json
import pathlib

import pytest

from examples.tiny_wan import sizes

TINY_WAN = pathlib.Path(__file__).parents[3] / "assets/tiny-wan"
MEASURED = ("latents_mean", "latents_std")  # after training


@pytest.mark.parametrize(
    "component, expected",
    [
        ("transformer", sizes.TRANSFORMER),
        ("vae", sizes.VAE),
        ("text_encoder", sizes.TEXT_ENCODER),
    ],
)
def test_config_is_the_shipped_one(component, expected):
    shipped = json.loads((TINY_WAN / component / "config.json").read_text())
    assert shipped.keys() == expected.keys()
    for key in shipped.keys() - set(MEASURED):
        assert shipped[key] == expected[key], key
