"""Measures of quality, on images and videos with known properties."""

import math

import cv2
import numpy as np
import pytest

from rewards.quality import MEASURES, QualityReward
from tests.rewards.drawing import texture


def measure(name, frames):
    return QualityReward(name).score(frames).value


def test_sharpness_falls_with_blur_and_rises_with_noise():
    sharp = texture(1)
    blurred = cv2.GaussianBlur(sharp[0], (0, 0), 3)[None]
    noisy = np.clip(sharp + np.random.default_rng(1).normal(0, 20, sharp.shape), 0, 255).astype(
        np.uint8
    )
    assert (
        measure("sharpness", blurred)
        < measure("sharpness", sharp) - 1
        < measure("sharpness", noisy) - 2
    )
    assert math.isfinite(measure("sharpness", np.zeros((1, 32, 32, 3), np.uint8)))


def test_exposure_and_contrast_are_mean_and_deviation_of_the_luma():
    halves = np.zeros((1, 40, 40, 3), np.uint8)
    halves[:, :, 20:] = 200
    assert measure("exposure", halves) == pytest.approx(100, abs=1e-3)
    assert measure("contrast", halves) == pytest.approx(100, abs=1e-3)
    assert measure("exposure", np.full((1, 8, 8, 3), (255, 0, 0), np.uint8)) == pytest.approx(
        0.299 * 255, abs=1e-3
    )


def test_compressibility_knows_flat_from_noise():
    flat = np.full((1, 64, 64, 3), 90, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    assert measure("compressibility", flat) < 2 < measure("compressibility", texture(1)) + 1.5 < 8
    assert measure("compressibility", noise) > 8


def test_flicker_is_what_changes_back_and_motion_what_moves():
    still, slow, fast = (texture(shift=s) for s in (0, 1, 3))
    flickering = still.copy()
    flickering[1::2] = np.clip(flickering[1::2].astype(int) + 20, 0, 255)
    assert measure("flicker", still) == 0 <= measure("motion", still) < 1e-3  # % of the diagonal
    assert measure("flicker", flickering) == pytest.approx(40, rel=0.1)
    assert measure("motion", flickering) < measure("motion", slow) < measure("motion", fast)
    # one pixel of 96 x 128 a frame is 0.625 % of the diagonal
    assert measure("motion", slow) == pytest.approx(0.625, rel=0.25)
    assert measure("motion", fast) == pytest.approx(3 * 0.625, rel=0.25)
    for name in ("flicker", "motion"):
        assert measure(name, still[:1]) == 0


def test_dark_edges_and_colours_on_frames_with_known_shares():
    quarter = np.full((2, 40, 40, 3), 255, np.uint8)
    quarter[:, :20, :20] = 20
    assert measure("dark", quarter) == 0.25
    assert measure("dark", np.full((1, 8, 8, 3), 39, np.uint8)) == 0  # 0.15 x 255 = 38.25
    assert measure("edges", quarter) == pytest.approx(40 / 1600, rel=0.1)  # two sides of 20 pixels
    assert measure("edges", np.full((1, 40, 40, 3), 90, np.uint8)) == 0
    four = np.zeros((1, 8, 8, 3), np.uint8)
    four[:, 4:, :, 0], four[:, :, 4:, 1] = 128, 128
    assert measure("colours", four) == 2
    assert measure("colours", np.full((1, 8, 8, 3), 7, np.uint8)) == 0


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_deterministic_and_leave_the_frames_alone(name):
    frames = texture(shift=2)
    before = frames.copy()
    assert measure(name, frames) == measure(name, frames.copy())
    np.testing.assert_array_equal(frames, before)
    with pytest.raises(ValueError, match="uint8"):
        measure(name, frames.astype(np.float32))


def test_unknown_measure():
    with pytest.raises(ValueError, match=r"'speed'.*sharpness, exposure"):
        QualityReward("speed")
