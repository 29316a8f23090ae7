"""Videos and pictures with captions in a folder, as data to train on.

    FOLDER/sign.png, FOLDER/sign.txt      a caption beside each file: its text without line breaks
    FOLDER/metadata.jsonl                 or one file for all, also captions.jsonl:
                                          {"file": "sign.png", "prompt": "..."} a line

Files are read in the order of their names, in sub-folders too. A frame is resized until it covers the
size that is asked for, and its middle is kept. The first frames of a video are taken, at the frame
rate that is asked for.
"""

import contextlib
import dataclasses
import json
import pathlib
import warnings
import zlib
from collections.abc import Generator, Iterable, Iterator

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from wan_jax.command_line import cli
from wan_jax.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".gif")
LISTS = ("metadata.jsonl", "captions.jsonl")
LINE = '{"file": "sign.png", "prompt": "..."}'


@dataclasses.dataclass(frozen=True)
class Clip:
    """A picture or a video with its caption.

    Attributes:
        name: of the file, relative to the folder.
        path: of the file.
        prompt: the caption.
    """

    name: str
    path: pathlib.Path
    prompt: str

    def digest(self) -> str:
        """Return the size and the CRC-32 of the file. Raises `UserError` if it cannot be read."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror})") from None
        return f"{len(content)}-{zlib.crc32(content):08x}"


def find_clips(folder: pathlib.Path) -> list[Clip]:
    """Return the pictures and videos of a folder with their captions, by name. Raises `UserError`
    where there are none, or a caption or a listed file is missing.
    """
    if not folder.is_dir():
        raise UserError(f"--src={folder} is not a folder")
    lists = [name for name in LISTS if (folder / name).is_file()]
    if len(lists) > 1:
        raise UserError(f"--src={folder} has {' and '.join(lists)}: keep one of them")
    clips = _listed(folder, folder / lists[0]) if lists else _with_texts(folder)
    if not clips:
        raise UserError(
            f"--src={folder} has no picture or video: {', '.join((*PICTURES, *VIDEOS))} are read"
        )
    return sorted(clips, key=lambda clip: clip.name)


def describe_left_out(folder: pathlib.Path, clips: Iterable[Clip]) -> str:
    """Return a line about the pictures, videos and captions in a folder that belong to none of its
    clips, "" without any: they are not in its list, or captions of files of another kind.
    """
    used = set()
    for clip in clips:
        path = clip.path.resolve()
        used |= {path, path.with_suffix(".txt"), path.with_name(f"{path.name}.txt")}
    kinds = (*PICTURES, *VIDEOS)
    others = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in (*kinds, ".txt") and path.is_file() and path.resolve() not in used
    ]
    if not others:
        return ""
    return (
        f"note: {len(others)} files in --src={folder} are left out, e.g. {min(others)}: pictures and "
        f"videos are {', '.join(kinds)}, and where there is a list of captions, it has to name them"
    )


def _listed(folder: pathlib.Path, path: pathlib.Path) -> list[Clip]:
    """Return the clips that a list names. Raises `UserError`."""
    clips: dict[str, Clip] = {}
    text = cli.read_text(path, "list of captions", f"give a line {LINE} for each file")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        name, prompt = (
            (fields.get("file"), fields.get("prompt")) if isinstance(fields, dict) else ("", "")
        )
        if not (isinstance(name, str) and isinstance(prompt, str) and name and prompt.strip()):
            raise UserError(f"{path}, line {number}: a line is {LINE}, it is {line.strip()[:80]!r}")
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise UserError(f"{path}, line {number}: {name!r} is not a file in {folder}")
        if file.suffix.lower() not in (*PICTURES, *VIDEOS):
            raise UserError(
                f"{path}, line {number}: {name!r} is not read, only "
                f"{', '.join((*PICTURES, *VIDEOS))} are"
            )
        name = str(file.resolve().relative_to(folder.resolve()))
        if name in clips:
            raise UserError(f"{path}, line {number}: {name!r} has a caption already")
        clips[name] = Clip(name, file, " ".join(prompt.split()))
    return [*clips.values()]


def _with_texts(folder: pathlib.Path) -> list[Clip]:
    """Return the clips with a caption beside each. Raises `UserError`."""
    clips, bare = [], []
    for path in folder.rglob("*"):
        if path.suffix.lower() not in (*PICTURES, *VIDEOS) or not path.is_file():
            continue
        name = str(path.relative_to(folder))
        beside = [path.with_suffix(".txt"), path.with_name(f"{path.name}.txt")]
        captions = [file for file in beside if file.is_file()]
        text = cli.read_text(captions[0], "caption", "") if captions else ""
        if not text.strip():
            bare.append(name)
        clips.append(Clip(name, path, " ".join(text.split())))
    if bare:
        name = min(bare)
        raise UserError(
            f"--src={folder}: {len(bare)} of {len(clips)} files have no caption, e.g. {name}: write "
            f"it into {pathlib.Path(name).with_suffix('.txt')}, or all into {LISTS[0]} with a line "
            f"{LINE} each"
        )
    return clips


def check_clip(clip: Clip, frames: int, fps: float) -> None:
    """Raise `UserError` as `load_frames` does, by the head of the file alone."""
    with _readable(clip):
        if clip.path.suffix.lower() != ".mp4":
            with Image.open(clip.path) as file:
                known = None if getattr(file, "is_animated", False) else 1
        else:
            seconds = _meta(clip.path)["duration"]
            known = int(seconds * fps + 0.5) if seconds else None
    if known is not None and known < frames:
        raise _too_short(clip, known, frames, fps)


def load_frames(clip: Clip, frames: int, height: int, width: int, fps: float) -> np.ndarray:
    """Return the first frames of a clip, uint8 [frames, height, width, 3].

    frames: 1 takes the first frame of a video. fps: frames a second that are taken of a video: those
    shown at these times. Raises `UserError` on a file that cannot be read, a picture where several
    frames are asked for, and a video that is too short.
    """
    with _readable(clip):
        shown = _mp4(clip.path) if clip.path.suffix.lower() == ".mp4" else _pictures(clip.path)
        with contextlib.closing(shown):
            taken = [_cover(frame, height, width) for frame in _at_rate(shown, frames, fps)]
    if len(taken) < frames:
        raise _too_short(clip, len(taken), frames, fps)
    return np.stack(taken)


@contextlib.contextmanager
def _readable(clip: Clip) -> Iterator[None]:
    """Convert the errors of a file that is damaged, or something else, to `UserError`."""
    try:
        yield
    except UnidentifiedImageError:
        raise UserError(f"{clip.path} cannot be read (not a picture)") from None
    # what Pillow and ffmpeg raise
    except (OSError, ValueError, RuntimeError, EOFError, SyntaxError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{clip.path} cannot be read ({lines[-1][:200]})") from None
    except Image.DecompressionBombError:
        raise UserError(f"{clip.path} cannot be read (it has too many pixels)") from None


def _too_short(clip: Clip, found: int, frames: int, fps: float) -> UserError:
    if clip.path.suffix.lower() in PICTURES or found <= 1:
        what, fitting = "is a picture", 1
    else:
        what, fitting = f"has {found} frames at --fps={fps:g}", (found - 1) // 4 * 4 + 1
    return UserError(
        f"{clip.path} {what}, and --frames={frames}: encode it into another --out with "
        f"--frames={fitting}, or remove it from the folder"
    )


def _at_rate(
    shown: Iterator[tuple[float, Image.Image]], frames: int, fps: float
) -> Iterator[Image.Image]:
    """Yield the frames shown at the times 0, 1 / fps, 2 / fps, ..., at most `frames` of them.

    shown: frames with the time in seconds until which each is shown, in order.
    """
    taken = 0
    for end, frame in shown:
        while taken < frames and taken / fps < end - 1e-6:
            taken += 1
            yield frame
        if taken == frames:
            return


def _pictures(path: pathlib.Path) -> Generator[tuple[float, Image.Image]]:
    """Yield the frames of a picture or a GIF; a frame without a duration is shown for 0.1 s, as
    browsers do.
    """
    with Image.open(path) as file:
        end = 0.0
        still = getattr(file, "n_frames", 1) == 1
        for frame in ImageSequence.Iterator(file):
            end += 1e-3 * (frame.info.get("duration") or 100)
            yield (1e-3 if still else end), _opaque(ImageOps.exif_transpose(frame))
            if path.suffix.lower() in PICTURES:
                return


def _opaque(frame: Image.Image) -> Image.Image:
    """Return a frame in RGB; what is transparent becomes white."""
    if frame.mode not in ("RGBA", "LA", "PA") and "transparency" not in frame.info:
        return frame.convert("RGB")
    frame = frame.convert("RGBA")
    white = Image.new("RGBA", frame.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, frame).convert("RGB")


def _meta(path: pathlib.Path) -> dict:
    """Return what the head of a video says. Raises OSError or ValueError on one without frames."""
    with _reading(path) as reader:
        meta = next(reader)
    if not meta["fps"]:
        raise ValueError("its frame rate is not known")
    return meta


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[Generator]:
    """Yield ffmpeg's reader of a video, which is ended afterwards."""
    # the forked process runs ffmpeg at once, which is safe in spite of JAX's threads
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning
        )
        with contextlib.closing(imageio_ffmpeg.read_frames(str(path))) as reader:
            yield reader


def _mp4(path: pathlib.Path) -> Generator[tuple[float, Image.Image]]:
    """Yield the frames of a video in MP4."""
    meta = _meta(path)
    with _reading(path) as reader:
        next(reader)
        for number, data in enumerate(reader, 1):
            yield number / meta["fps"], Image.frombytes("RGB", meta["size"], data)


def _cover(frame: Image.Image, height: int, width: int) -> np.ndarray:
    """Return the middle of a frame that is resized to cover the size, uint8 [height, width, 3]."""
    return np.asarray(ImageOps.fit(frame, (width, height), Image.Resampling.LANCZOS))
