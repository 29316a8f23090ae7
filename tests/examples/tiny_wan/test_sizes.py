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


def test_frame_sizes():
    assert sizes.parse("64x128, 96x192") == ((64, 128), (96, 192))


@pytest.mark.parametrize(
    "text", ["64", "64x", "64x128x3", "60x128", "0x128", "64x128,64x128", "-64x128"]
)
def test_invalid_frame_sizes(text):
    with pytest.raises(ValueError, match=f"sizes={text}"):
        sizes.parse(text)
