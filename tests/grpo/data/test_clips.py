"""Pictures and videos with captions in a folder: which are found, and which of their pixels are taken."""

import json

import numpy as np
import pytest
from PIL import Image

from grpo.data.clips import Clip, check_clip, describe_left_out, find_clips, load_frames
from wan_jax.errors import UserError
from wan_jax.storage import media

RNG = np.random.default_rng(0)


def picture(path, height=16, width=32, mode="RGB", **options):
    """Write a random picture and return its pixels."""
    pixels = RNG.integers(0, 256, (height, width, len(mode)), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def clip(path) -> Clip:
    return Clip(path.name, path, "a sign")


def test_captions_beside_the_files(tmp_path):
    (tmp_path / "deep").mkdir()
    picture(tmp_path / "b.png")
    picture(tmp_path / "deep" / "a.jpg")
    picture(tmp_path / "c.webp")
    (tmp_path / "b.txt").write_text("\ufeffA sign\n that says “b”.\n", encoding="utf-8")
    (tmp_path / "deep" / "a.txt").write_text("deep")
    (tmp_path / "c.webp.txt").write_text("see")
    (tmp_path / "notes.md").write_text("not read")
    found = [(c.name, c.prompt) for c in find_clips(tmp_path)]
    assert found == [("b.png", "A sign that says “b”."), ("c.webp", "see"), ("deep/a.jpg", "deep")]
    assert describe_left_out(tmp_path, find_clips(tmp_path)) == ""
    # a video of a kind that is not read, with its caption
    (tmp_path / "deep" / "film.mov").touch()
    (tmp_path / "deep" / "film.txt").write_text("a film")
    assert "1 files" in describe_left_out(tmp_path, find_clips(tmp_path))
    assert "e.g. deep/film.txt" in describe_left_out(tmp_path, find_clips(tmp_path))


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl"])
def test_captions_in_a_list(tmp_path, name):
    picture(tmp_path / "b.png")
    picture(tmp_path / "a.png")
    picture(tmp_path / "unlisted.png")
    lines = [{"file": "b.png", "prompt": "two", "seed": 3}, {"file": "./a.png", "prompt": "one"}]
    (tmp_path / name).write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert "1 files" in describe_left_out(tmp_path, find_clips(tmp_path))
    assert "e.g. unlisted.png" in describe_left_out(tmp_path, find_clips(tmp_path))
    assert [(c.name, c.prompt) for c in find_clips(tmp_path)] == [
        ("a.png", "one"),
        ("b.png", "two"),
    ]


@pytest.mark.parametrize(
    "line, key",
    [
        ("{", "line 2: not JSON"),
        ('{"file": "a.png"}', "line 2: a line is"),
        ('["a.png", "one"]', "line 2: a line is"),
        ('{"file": "a.png", "prompt": " "}', "line 2: a line is"),
        ('{"file": "b.png", "prompt": "two"}', "line 2: 'b.png' is not a file"),
        ('{"file": "../a.png", "prompt": "two"}', "line 2: '../a.png' is not a file"),
        ('{"file": "a.png", "prompt": "two"}', "line 2: 'a.png' has a caption already"),
        ('{"file": "metadata.jsonl", "prompt": "two"}', "line 2: 'metadata.jsonl' is not read"),
    ],
)
def test_lines_that_are_refused(tmp_path, line, key):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file": "a.png", "prompt": "one"}}\n{line}\n')
    with pytest.raises(UserError) as error:
        find_clips(tmp_path)
    assert key in str(error.value)


def test_folders_that_are_refused(tmp_path):
    def message(folder):
        with pytest.raises(UserError) as error:
            find_clips(folder)
        return str(error.value)

    assert f"--src={tmp_path}/none" in message(tmp_path / "none")
    assert ".mp4" in message(tmp_path)
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("two")
    assert "1 of 2" in message(tmp_path) and "a.txt" in message(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    assert "1 of 2" in message(tmp_path), "an empty caption is none"
    for name in ("metadata.jsonl", "captions.jsonl"):
        (tmp_path / name).write_text('{"file": "a.png", "prompt": "one"}\n')
    assert "metadata.jsonl and captions.jsonl" in message(tmp_path)


def test_a_frame_covers_the_size_and_its_middle_is_kept(tmp_path):
    """At the size itself the pixels are the file's; beyond it, a side is cut on both ends."""
    pixels = picture(tmp_path / "a.png", 16, 48)
    np.testing.assert_array_equal(load_frames(clip(tmp_path / "a.png"), 1, 16, 48, 16)[0], pixels)
    np.testing.assert_array_equal(
        load_frames(clip(tmp_path / "a.png"), 1, 16, 32, 16)[0], pixels[:, 8:40]
    )
    halves = np.zeros((40, 20, 3), np.uint8)
    halves[20:] = 255
    Image.fromarray(halves).save(tmp_path / "b.png")
    frame = load_frames(clip(tmp_path / "b.png"), 1, 16, 32, 16)[0]  # enlarged to 64 x 32, cut
    assert frame.shape == (16, 32, 3) and frame[:6].max() < 20 and frame[10:].min() > 235


def test_transparent_pixels_are_white_and_cameras_turn(tmp_path):
    pixels = picture(tmp_path / "a.png", mode="RGBA")
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert load_frames(clip(tmp_path / "a.png"), 1, 16, 32, 16).min() == 255
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees
    pixels = picture(tmp_path / "b.png", 32, 16, exif=turned)
    np.testing.assert_array_equal(
        load_frames(clip(tmp_path / "b.png"), 1, 16, 32, 16)[0], np.rot90(pixels, -1)
    )


def numbered(frames):
    """Return a video whose frames have a brightness of 8 times their number."""
    return np.repeat(8 * np.arange(frames, dtype=np.uint8), 16 * 32 * 3).reshape(-1, 16, 32, 3)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
@pytest.mark.parametrize(
    "fps, taken", [(10, [0, 1, 2, 3, 4]), (5, [0, 2, 4, 6, 8]), (20, [0, 0, 1, 1, 2])]
)
def test_videos_are_taken_at_the_frame_rate_asked_for(tmp_path, name, fps, taken):
    media.write_video(tmp_path / name, numbered(12), 10)
    check_clip(clip(tmp_path / name), 5, fps)
    frames = load_frames(clip(tmp_path / name), 5, 16, 32, fps)
    # H.264 and the palette of a GIF change a value by less than half a step
    np.testing.assert_array_equal(np.round(frames.mean((1, 2, 3)) / 8), taken)
    assert np.round(load_frames(clip(tmp_path / name), 1, 16, 32, fps).mean() / 8) == 0


@pytest.mark.parametrize("name, early", [("a.mp4", True), ("a.gif", False)])
def test_a_video_that_is_too_short(tmp_path, name, early):
    media.write_video(tmp_path / name, numbered(7), 10)
    for check in (check_clip, lambda c, frames, fps: load_frames(c, frames, 16, 32, fps))[
        not early :
    ]:
        with pytest.raises(UserError) as error:
            check(clip(tmp_path / name), 9, 10)
        assert "7 frames" in str(error.value) and "--frames=5" in str(error.value)


def test_a_picture_is_no_video(tmp_path):
    picture(tmp_path / "a.png")
    for check in (check_clip, lambda c, frames, fps: load_frames(c, frames, 16, 32, fps)):
        with pytest.raises(UserError) as error:
            check(clip(tmp_path / "a.png"), 5, 16)
        assert "is a picture" in str(error.value) and "--frames=1" in str(error.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.mp4"])
def test_files_that_are_something_else(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a picture" * 50)
    for check in (check_clip, lambda c, frames, fps: load_frames(c, frames, 16, 32, fps)):
        with pytest.raises(UserError) as error:
            check(clip(tmp_path / name), 1, 16)
        assert f"{tmp_path / name} cannot be read" in str(error.value)


def test_a_truncated_picture(tmp_path):
    picture(tmp_path / "a.png", 64, 64)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(UserError) as error:
        load_frames(clip(tmp_path / "a.png"), 1, 16, 32, 16)
    assert "a.png cannot be read" in str(error.value)
