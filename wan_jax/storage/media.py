"""Pictures and videos as files and as text: PNG, GIF and H.264 in MP4, from uint8 arrays [frames,
height, width, 3] or [height, width, 3].
"""

import base64
import contextlib
import io
import os
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wan_jax.command_line.limits import Range

VIDEO_SUFFIXES = (".mp4", ".gif")
FPS = Range(0.1, 1000)  # frames a second that both formats can hold
GREY = 128  # between pictures
SHEET_GAP = 2  # pixels between the pictures of a contact sheet
PAIR_GAP = 4  # pixels between two videos side by side
CAPTION_SIZE = 12  # pixels of the letters over a row of a grid
CAPTION_LINES = 3
CRF = 18  # x264 quality, from 0 (best) to 51: at 18, letters of 10 pixels are legible


def check_suffix(path, frames: int) -> str:
    """Return the suffix of `path` in lower case. Raises ValueError when a video of `frames` frames
    cannot be written in that format, or not on this machine.
    """
    suffix = pathlib.Path(path).suffix.lower()
    choices = VIDEO_SUFFIXES if frames > 1 else (".png", *VIDEO_SUFFIXES)
    if suffix not in choices:
        raise ValueError(
            f"{path}: {frames} frame(s) cannot be written as {suffix or 'a file without suffix'}; "
            f"choose one of {', '.join(choices)}"
        )
    if suffix == ".mp4":
        check_ffmpeg()
    return suffix


def check_ffmpeg() -> None:
    """Raise ValueError when no MP4 can be written, before hours of work instead of at their end."""
    try:
        found = shutil.which(imageio_ffmpeg.get_ffmpeg_exe())
    except (RuntimeError, ImportError):  # neither the package's own ffmpeg nor another one
        found = None
    if found is None:
        raise ValueError(
            "no ffmpeg to write videos with; pip install --force-reinstall imageio-ffmpeg brings "
            "one, or set IMAGEIO_FFMPEG_EXE to the path of yours"
        )


def check_writable(path, frames: int, height: int, width: int, fps: float) -> None:
    """Raise ValueError when no video of this size can be written to `path`, before hours of work.

    A small one is written next to it as a trial. The folder is created.
    """
    path = pathlib.Path(path)
    check_no_folder(path)
    trial = path.with_name(f".{path.stem}.trial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(trial, np.zeros((min(frames, 2), height, width, 3), np.uint8), fps)
        trial.unlink()
    except MemoryError:
        raise ValueError(
            f"{path}: this machine has no memory for frames of {height} x {width}; choose a smaller "
            "size"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror or error}); choose another file"
        ) from None


def check_no_folder(path) -> None:
    """Raise ValueError when `path` is a folder."""
    if os.path.isdir(path):  # False where the name is too long, which is an error when writing
        raise ValueError(f"{path} is a folder; give the name of a file in it")


def write(path, video: np.ndarray, fps: float, scale: int = 1) -> None:
    """Write a video uint8 [frames, height, width, 3] in the format of the suffix: .png for one
    frame, .mp4 or .gif for any number.
    """
    _check(video, 4)
    if check_suffix(path, len(video)) == ".png":
        write_image(path, upscale(video[0], scale))
    else:
        write_video(path, video, fps, scale)


def write_image(path, frame: np.ndarray) -> None:
    """Write a frame uint8 [height, width, 3] as PNG."""
    if (suffix := pathlib.Path(path).suffix.lower()) != ".png":
        raise ValueError(
            f"{path}: an image cannot be written as {suffix or 'a file without suffix'}; choose "
            ".png"
        )
    data = png_bytes(frame)
    with _whole(path) as temporary:
        temporary.write_bytes(data)


def write_video(path, video: np.ndarray, fps: float, scale: int = 1, *, crf: int = CRF) -> None:
    """Write a video uint8 [frames, height, width, 3] as .mp4 (H.264, yuv420p, odd sizes padded by a
    pixel) or .gif.

    scale: nearest-neighbour enlargement. yuv420p halves the resolution of colour, so coloured
    letters in a tiny video need at least 2. If writing fails, no incomplete file is left.
    """
    _check(video, 4)
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix not in VIDEO_SUFFIXES:
        raise ValueError(
            f"{path}: a video cannot be written as {suffix or 'a file without suffix'}; "
            f"choose one of {', '.join(VIDEO_SUFFIXES)}"
        )
    if fps not in FPS:
        raise ValueError(f"fps={fps} {FPS.requirement(fps)}; Wan's videos have 16")
    video = upscale(video, scale)
    with _whole(path) as temporary:
        if suffix == ".gif":
            temporary.write_bytes(gif_bytes(video, fps))
        else:
            _write_mp4(temporary, video, fps, crf)


@contextlib.contextmanager
def _whole(path) -> Iterator[pathlib.Path]:
    """Yield a temporary file to write, which is renamed to `path` once it is complete."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def upscale(frames: np.ndarray, scale: int) -> np.ndarray:
    """Enlarge [..., height, width, 3] by a whole factor; every pixel becomes a block."""
    if scale < 1 or scale != int(scale):
        raise ValueError(f"scale={scale} must be a whole number of at least 1")
    return frames if scale == 1 else frames.repeat(int(scale), -3).repeat(int(scale), -2)


def shrink(frame: np.ndarray, factor: int) -> np.ndarray:
    """Shrink a frame uint8 [height, width, 3] by a whole factor, rounded up; each pixel is the mean
    of a block.
    """
    return frame if factor == 1 else np.asarray(Image.fromarray(frame).reduce(factor))


def fit_height(frame: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    """Enlarge or shrink a frame uint8 [height, width, 3] by a whole factor, to about `lowest` to
    `highest` pixels of height.
    """
    h = frame.shape[0]
    return shrink(frame, -(-h // highest)) if h > highest else upscale(frame, -(-lowest // h))


def contact_sheet(frames: np.ndarray, columns: int = 4) -> np.ndarray:
    """Arrange frames uint8 [N, height, width, 3] in a grid: [rows (height + gap) + gap, columns
    (width + gap) + gap, 3].

    Row by row from the top left, with gaps of grey; fewer than `columns` frames make one shorter
    row.
    """
    _check(frames, 4)
    n, h, w, _ = frames.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    gap = SHEET_GAP
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), GREY, np.uint8)
    for i, frame in enumerate(frames):
        y = (i // columns) * (h + gap) + gap
        x = (i % columns) * (w + gap) + gap
        sheet[y : y + h, x : x + w] = frame
    return sheet


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Join two videos uint8 [frames, height, width, 3] to one with a grey gap, [frames, height, 2
    width + gap, 3]. Raises ValueError on different shapes.
    """
    _check(left, 4)
    _check(right, 4)
    if left.shape != right.shape:
        raise ValueError(
            f"videos of {list(left.shape)} and {list(right.shape)} cannot stand side by side: give "
            "the same frames, height and width"
        )
    frames, height, _, _ = left.shape
    grey = np.full((frames, height, PAIR_GAP, 3), GREY, np.uint8)
    return np.concatenate([left, grey, right], axis=2)


def grid(videos: Sequence[Sequence[np.ndarray | None]], captions: Sequence[str]) -> np.ndarray:
    """Arrange videos uint8 [frames, height, width, 3] of one shape in rows with a caption above each:
    [frames, rows (text + height + gap) + gap, columns (width + gap) + gap, 3].

    videos: row by row; None leaves the place grey. captions: of each row, broken into lines. Raises
    ValueError on rows of different lengths or videos of different shapes.
    """
    shapes = {video.shape for row in videos for video in row if video is not None}
    if len(shapes) != 1 or len({len(row) for row in videos}) != 1 or len(captions) != len(videos):
        raise ValueError(
            f"a grid needs videos of one shape, rows of one length and a caption for each, got the "
            f"shapes {sorted(shapes)}, rows of {[len(row) for row in videos]} and {len(captions)} "
            "captions"
        )
    (shape,) = shapes
    frames, height, width, _ = shape
    gap = PAIR_GAP
    total = len(videos[0]) * (width + gap) + gap
    rows = []
    for row, caption in zip(videos, captions):
        band = np.full((frames, gap + height, total, 3), GREY, np.uint8)
        for column, video in enumerate(row):
            if video is not None:
                x = gap + column * (width + gap)
                band[:, :height, x : x + width] = video
        text = caption_band(caption, total)
        rows += [np.broadcast_to(text, (frames, *text.shape)), band]
    return np.concatenate(rows, axis=1)


def caption_band(text: str, width: int) -> np.ndarray:
    """Return text as a picture uint8 [lines x line height, width, 3], dark on light, broken into at
    most `CAPTION_LINES` lines.
    """
    font = ImageFont.load_default(CAPTION_SIZE)
    margin = PAIR_GAP
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - 2 * margin:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], lines[CAPTION_LINES - 1] + " ..."]
    step = CAPTION_SIZE * 4 // 3
    picture = Image.new("RGB", (width, step * len(lines) + margin), (245, 245, 245))
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((margin, margin // 2 + number * step), line, fill=(20, 20, 20), font=font)
    return np.asarray(picture)


def png_bytes(frame: np.ndarray) -> bytes:
    """Return a frame uint8 [height, width, 3] as the bytes of a PNG file."""
    _check(frame, 3)
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", optimize=True)
    return file.getvalue()


def gif_bytes(video: np.ndarray, fps: float) -> bytes:
    """Return a video uint8 [frames, height, width, 3] as the bytes of an endless GIF."""
    _check(video, 4)
    file = io.BytesIO()
    frames = [Image.fromarray(frame) for frame in video]
    frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0
    )
    return file.getvalue()


def png_data_uri(frame: np.ndarray) -> str:
    """Return a frame uint8 [height, width, 3] as a `data:` URI in its own size. Enlarge it with CSS
    `image-rendering: pixelated`.
    """
    return _data_uri("image/png", png_bytes(frame))


def jpeg_data_uri(frame: np.ndarray, quality: int = 90) -> str:
    """Return a frame uint8 [height, width, 3] as a `data:` URI, if PNG would be too large; with
    full colour resolution.
    """
    _check(frame, 3)
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality, subsampling=0)
    return _data_uri("image/jpeg", file.getvalue())


def mp4_data_uri(video: np.ndarray, fps: float, scale: int = 1, *, crf: int = CRF) -> str:
    """Return a video uint8 [frames, height, width, 3] as the `data:` URI of an H.264 MP4."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "video.mp4")
        write_video(path, video, fps, scale, crf=crf)
        return _data_uri("video/mp4", path.read_bytes())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _write_mp4(path: pathlib.Path, video: np.ndarray, fps: float, crf: int) -> None:
    _, h, w, _ = video.shape
    # yuv420p needs even sizes
    video = np.pad(video, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (w + w % 2, h + h % 2),
        fps=fps,  # pyright: ignore[reportArgumentType]  (a float works as well)
        codec="libx264",
        quality=None,  # pyright: ignore[reportArgumentType]  (no -qscale)
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=["-crf", str(crf), "-movflags", "+faststart"],
    )
    # the forked process runs ffmpeg at once, which is safe in spite of JAX's threads
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning
        )
        writer.send(None)
    try:
        for frame in video:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()
    if not path.is_file() or not path.stat().st_size:
        raise OSError(f"ffmpeg wrote no video to {path}")


def _check(frames: np.ndarray, ndim: int) -> None:
    """Raise ValueError unless `frames` is a uint8 RGB array of this number of axes."""
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        raise ValueError(
            "frames must be a uint8 numpy array, got "
            f"{getattr(frames, 'dtype', type(frames).__name__)}"
        )
    if frames.ndim != ndim or frames.shape[-1] != 3 or 0 in frames.shape:
        axes = "[frames, height, width, 3]" if ndim == 4 else "[height, width, 3]"
        raise ValueError(f"frames must be {axes} with no empty axis, got {list(frames.shape)}")
