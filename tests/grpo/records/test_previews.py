"""Captioned previews: the video is whole above its caption, files have one name a prompt."""

import math

import imageio_ffmpeg
import numpy as np
from PIL import Image

from grpo.records import previews

RECORD = {
    "epoch": 3,
    "prompts": ["A sign that says “open”, " + "very " * 40 + "big.", "short", "left out"],
    "rewards": [0.456, math.nan, 1.0],
    "texts": ["OPEN", " ", "x"],
}


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_captions():
    texts = previews.captions(RECORD, 2)
    assert texts[0] == (RECORD["prompts"][0], "epoch 3: reward 0.46, read 'OPEN'")
    assert texts[1] == ("short", "epoch 3: not scored")
    assert previews.captions({"epoch": 3}, 1) == [("", "epoch 3")]


def test_the_video_is_whole_above_its_caption():
    videos = noise(2, 3, 200, 320, 3)
    made = previews.captioned(videos, previews.captions(RECORD, 2))
    assert made.shape[:2] == (2, 3) and made.shape[3:] == (320, 3) and 230 < made.shape[2] < 300
    np.testing.assert_array_equal(made[:, :, :200], videos)
    long, short = made[0, 0, 200:], made[1, 0, 200:]
    assert (long == previews.PROMPT).all(-1).any() and (long == previews.RESULT).all(-1).any()
    np.testing.assert_array_equal(short, made[1, 2, 200:])
    edge = long[:, -4:]
    assert (edge == previews.BACKGROUND).all(), "text is cut off before the edge"


def test_files(tmp_path):
    texts = previews.captions(RECORD, 2)
    first, second = previews.write(tmp_path, noise(2, 1, 16, 32, 3), texts, 3)
    assert (first.name, second.path) == ("000", tmp_path / "001" / "epoch_000003.png")
    assert first.caption.endswith(f"big.. {texts[0][1]}") and first.small.suffix == ".png"
    picture = np.asarray(Image.open(first.path))
    np.testing.assert_array_equal(picture[:192:12, ::12], noise(2, 1, 16, 32, 3)[0, 0])
    (clip,) = previews.write(tmp_path, noise(1, 5, 192, 320, 3), texts[:1], 12)
    assert clip.path == tmp_path / "000" / "epoch_000012.mp4" and clip.small.suffix == ".gif"
    reader = imageio_ffmpeg.read_frames(str(clip.path))
    size = next(reader)["size"]
    assert size[0] == 320 and size[1] > 230 and len(list(reader)) == 5


def test_a_sheet_has_a_caption_for_each(tmp_path):
    sheet = previews.sheet(noise(2, 1, 16, 32, 3), previews.captions(RECORD, 2), 128, 256)
    assert sheet.suffix == ".png" and sheet.width == 2 * 256 + 3 * 2 and sheet.height > 128 + 30
