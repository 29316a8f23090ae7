"""Files are read back: sizes, colours, frame counts, and what must be refused."""

import base64
import io

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from wan_jax.storage import media


def clip(frames=4, h=34, w=51):
    """Flat colours that change from frame to frame, so that compression leaves them alone."""
    colors = np.array(
        [(200, 40, 40), (40, 180, 60), (50, 60, 190), (220, 220, 220), (20, 20, 20)], np.uint8
    )
    return np.broadcast_to(colors[np.arange(frames) % 5][:, None, None], (frames, h, w, 3)).copy()


def read_mp4(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    w, h = meta["size"]
    return meta, np.stack([np.frombuffer(f, np.uint8).reshape(h, w, 3) for f in reader])


@pytest.mark.parametrize("scale, size", [(1, (34, 52)), (3, (102, 154))])
def test_mp4(tmp_path, scale, size):
    video, path = clip(), tmp_path / "a.mp4"
    media.write_video(path, video, fps=5, scale=scale)
    meta, back = read_mp4(path)
    assert (
        back.shape == (4, *size, 3)
        and meta["codec"] == "h264"
        and meta["pix_fmt"].startswith("yuv420p")
    )
    assert meta["fps"] == pytest.approx(5)
    error = np.abs(back.astype(int) - video[:, :1, :1].astype(int))
    assert error.max() < 16, "every pixel, the padded edge included, keeps its colour"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    "found", ["/nowhere/ffmpeg", RuntimeError("No ffmpeg exe could be found."), ImportError()]
)
def test_without_ffmpeg_is_said_before_the_work(monkeypatch, found):
    def exe():
        if isinstance(found, str):
            return found
        raise found

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", exe)
    assert media.check_suffix("a.gif", 3) == ".gif"
    with pytest.raises(ValueError, match="IMAGEIO_FFMPEG_EXE"):
        media.check_suffix("a.mp4", 3)


def test_gif(tmp_path):
    video, path = clip(), tmp_path / "a.GIF"
    media.write_video(path, video, fps=5)
    with Image.open(path) as image:
        assert image.n_frames == 4 and image.size == (51, 34) and image.info["duration"] == 200
        for t in range(4):
            image.seek(t)
            np.testing.assert_allclose(
                np.asarray(image.convert("RGB")).astype(int), video[t], atol=4
            )


def test_png_is_exact(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    media.write_image(tmp_path / "a.png", frame)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), frame)
    media.write(tmp_path / "b.png", frame[None], fps=16, scale=2)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.png"))[::2, 1::2], frame)
    head, data = media.png_data_uri(frame).split(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), frame)


def test_mp4_data_uri(tmp_path):
    head, data = media.mp4_data_uri(clip(), fps=4, scale=2).split(",")
    (tmp_path / "a.mp4").write_bytes(base64.b64decode(data))
    assert head == "data:video/mp4;base64" and read_mp4(tmp_path / "a.mp4")[1].shape == (
        4,
        68,
        102,
        3,
    )


@pytest.mark.parametrize(
    "name, frames, choices",
    [
        ("a.webm", 4, ".mp4, .gif"),
        ("a", 4, ".mp4, .gif"),
        ("a.png", 4, ".mp4, .gif"),
        ("a.jpg", 1, ".png, .mp4, .gif"),
    ],
)
def test_unknown_suffix_names_the_choices(tmp_path, name, frames, choices):
    with pytest.raises(ValueError, match=f"choose one of {choices}"):
        media.write(tmp_path / name, clip(frames), fps=4)
    assert not list(tmp_path.iterdir())


def test_refuses():
    for bad, message in (
        (clip().astype(np.float32), "uint8"),
        (clip()[0], r"\[frames, height, width, 3\]"),
        (clip()[:0], "no empty axis"),
        (clip()[..., :1], r"\[frames, height, width, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            media.write_video("unused.mp4", bad, fps=4)
    with pytest.raises(ValueError, match="fps=0"):
        media.write_video("unused.mp4", clip(), fps=0)
    with pytest.raises(ValueError, match="scale=0"):
        media.upscale(clip(), 0)


def test_contact_sheet():
    frames = clip(5, 6, 8)
    sheet = media.contact_sheet(frames, columns=3)
    assert sheet.shape == (2 * 8 + 2, 3 * 10 + 2, 3)
    for i in range(5):
        y, x = divmod(i, 3)
        picture = sheet[y * 8 + 2 : y * 8 + 8, x * 10 + 2 : x * 10 + 10]
        np.testing.assert_array_equal(picture, frames[i])
    assert (sheet[:2] == 128).all() and (sheet[10:, 22:] == 128).all()
    assert media.contact_sheet(frames[:2], columns=3).shape == (10, 22, 3)


def test_fit_height():
    for h, expected in ((16, 64), (30, 90), (64, 64), (128, 128), (129, 65), (512, 128)):
        assert media.fit_height(np.zeros((h, 10, 3), np.uint8), 64, 128).shape[0] == expected
    checker = np.tile(np.array([[0, 200], [200, 0]], np.uint8)[..., None], (4, 4, 3))
    assert (media.shrink(checker, 2) == 100).all()


def test_side_by_side():
    left, right = (np.full((3, 4, 6, 3), value, np.uint8) for value in (1, 2))
    both = media.side_by_side(left, right)
    assert both.shape == (3, 4, 16, 3) and both.dtype == np.uint8
    assert (
        (both[:, :, :6] == 1).all()
        and (both[:, :, 6:10] == 128).all()
        and (both[:, :, 10:] == 2).all()
    )
    with pytest.raises(ValueError, match=r"\[3, 4, 6, 3\] and \[2, 4, 6, 3\]"):
        media.side_by_side(left, right[:2])


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_what_can_be_written_leaves_nothing_but_its_folder(tmp_path, name):
    media.check_writable(tmp_path / "new" / name, 5 if name != "a.png" else 1, 32, 48, 16.0)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder.png", "is a folder"),
        ("file/a.png", "cannot be written"),
        ("x" * 300 + ".png", "File name too long"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        media.check_writable(tmp_path / name, 1, 32, 48, 16.0)


def test_a_picture_takes_the_place_of_one_that_may_not_be_changed(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    (tmp_path / "a.png").chmod(0o400)
    media.write(tmp_path / "a.png", np.full((1, 8, 8, 3), 7, np.uint8), 16)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == 7).all() and len(
        list(tmp_path.iterdir())
    ) == 1


# --- grids ----------------------------------------------------------------------------------------


def test_grid_has_every_video_in_its_place_under_its_caption():
    rng = np.random.default_rng(0)
    videos = rng.integers(0, 255, (2, 3, 5, 20, 30, 3), np.uint8)  # rows, columns, frames
    rows = [list(videos[0]), [videos[1, 0], None, videos[1, 2]]]
    grid = media.grid(rows, ["short", "a long caption that is broken into two lines"])
    gap = media.PAIR_GAP
    first = media.caption_band("short", 3 * (30 + gap) + gap)
    second = media.caption_band(
        "a long caption that is broken into two lines", 3 * (30 + gap) + gap
    )
    assert len(second) > len(first) and second.min() < 100 < second.max()
    assert grid.shape == (5, len(first) + len(second) + 2 * (20 + gap), 3 * (30 + gap) + gap, 3)
    np.testing.assert_array_equal(grid[3, : len(first)], first)
    tops = len(first), len(first) + 20 + gap + len(second)
    for row, top in enumerate(tops):
        for column in range(3):
            left = gap + column * (30 + gap)
            cell = grid[:, top : top + 20, left : left + 30]
            if (row, column) == (1, 1):
                assert (cell == media.GREY).all()
            else:
                np.testing.assert_array_equal(cell, videos[row, column])


def test_a_long_caption_is_cut():
    band = media.caption_band("word " * 500, 200)
    assert band.shape == media.caption_band("word " * 5000, 200).shape
    assert len(band) < 100


@pytest.mark.parametrize("shapes", [[(1, 4, 4, 3), (1, 4, 6, 3)], []])
def test_a_grid_of_different_videos_is_refused(shapes):
    with pytest.raises(ValueError, match="one shape"):
        media.grid([[np.zeros(shape, np.uint8) for shape in shapes]], ["x"])
