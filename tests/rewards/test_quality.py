"""Measures of quality on pictures and clips whose properties are known, and several rewards at
once.
"""

import functools
import math

import cv2
import numpy as np
import pytest

from rewards.base import Score
from rewards.composite import SeveralRewards, stability
from rewards.quality import MEASURES, QualityReward
from rewards.workers import RewardPool
from tests.rewards import pool_rewards


def clip(frames=5, shift=0, seed=0):
    """A smooth texture [T, 96, 128, 3] that moves `shift` pixels a frame."""
    rng = np.random.default_rng(seed)
    wide = cv2.GaussianBlur(rng.integers(0, 256, (96, 128 + 40, 3)).astype(np.uint8), (0, 0), 3)
    wide = cv2.normalize(wide, None, 30, 220, cv2.NORM_MINMAX)
    return np.stack([wide[:, 20 + shift * t : 148 + shift * t] for t in range(frames)])


def measure(name, frames):
    return QualityReward(name).score(frames).value


def test_sharpness_falls_with_blur_and_rises_with_noise():
    sharp = clip(1)
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
    assert measure("compressibility", flat) < 2 < measure("compressibility", clip(1)) + 1.5 < 8
    assert measure("compressibility", noise) > 8


def test_flicker_is_what_changes_back_and_motion_what_moves():
    still, slow, fast = (clip(shift=s) for s in (0, 1, 3))
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


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_deterministic_and_leave_the_frames_alone(name):
    frames = clip(shift=2)
    before = frames.copy()
    assert measure(name, frames) == measure(name, frames.copy())
    np.testing.assert_array_equal(frames, before)
    with pytest.raises(ValueError, match="uint8"):
        measure(name, frames.astype(np.float32))


def test_unknown_measure():
    with pytest.raises(ValueError, match=r"'speed'.*sharpness, exposure"):
        QualityReward("speed")


def test_several_rewards_keep_apart():
    """In worker processes: every value under its name, and a reward that fails leaves the others
    alone.
    """
    makers = {
        "ocr": pool_rewards.Mean,
        "motion": functools.partial(QualityReward, "motion"),
        "broken": pool_rewards.Broken,
    }
    with RewardPool(functools.partial(SeveralRewards, makers), workers=1) as pool:
        scores = pool.submit(np.stack([clip(), clip(shift=2)]), ["a", "b"]).result()
    assert scores.valid.all() and scores.retries == 0 and scores.texts == ["record a", "record b"]
    np.testing.assert_array_equal(scores.parts["ocr"], scores.values)
    assert scores.parts["motion"][0] < 1e-3 < 0.5 < scores.parts["motion"][1]
    assert np.isnan(scores.parts["broken"]).all() and list(scores.parts) == [
        "ocr",
        "motion",
        "broken",
    ]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["OPEN"], 1),
        ([""], 0),
        (["OPEN", "Open ", "OPEN"], 1),
        (["OPEN", "", "OPEN"], 0),
        (["", ""], 0),
        (["OPEN", "OPEN", "OPEX", "OPEX"], (1 + 0.75 + 1) / 3),
    ],
)
def test_stability_of_the_text(texts, expected):
    assert stability(Score(0.0, frame_texts=tuple(texts))) == pytest.approx(expected)


def test_a_derived_value_needs_no_second_reading():
    makers = {"ocr": pool_rewards.Reader, "stability": None}
    score = SeveralRewards(makers).score(clip(3), "a")
    assert score.parts == (("ocr", 1.0), ("stability", 1.0))


def test_without_the_main_reward_there_is_no_score():
    makers = {"ocr": pool_rewards.Broken, "motion": functools.partial(QualityReward, "motion")}
    with RewardPool(functools.partial(SeveralRewards, makers)) as pool:
        scores = pool.submit(clip()[None], ["a"]).result()
    assert not scores.valid.any() and scores.parts == {}
