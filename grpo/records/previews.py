"""Captioned previews of an evaluation, and contact sheets of them."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wan_jax.storage import media

FPS = 16
GIF_FRAMES, GIF_FPS = 16, 8  # of animated previews
LEAST_HEIGHT = 192  # pixels: smaller videos are enlarged
BACKGROUND, PROMPT, RESULT = (24, 24, 23), (236, 236, 230), (240, 190, 90)  # colours of a caption
PROMPT_LINES = 2  # of a caption; the rest is cut off


@dataclasses.dataclass(frozen=True)
class Sheet:
    """One or several previews as a picture or an animation."""

    data: bytes  # the encoded file
    suffix: str  # .png or .gif
    height: int  # in pixels
    width: int


@dataclasses.dataclass(frozen=True)
class Preview:
    """One preview: its file in full size, and a small picture or animation of it."""

    name: str  # of the prompt, by its number
    path: pathlib.Path
    caption: str
    small: Sheet  # of a picture: itself


def file_name(epoch: int, frames: int) -> str:
    """Return the name of a preview's file after an epoch."""
    return f"epoch_{epoch:06d}.{'mp4' if frames > 1 else 'png'}"


def captions(record: Mapping, count: int) -> list[tuple[str, str]]:
    """Return the prompt and the result of the first videos of an evaluation, as text."""
    found = []
    rewards, texts = record.get("rewards", []), record.get("texts", [])
    for i, prompt in enumerate(record.get("prompts", [])[:count]):
        reward = rewards[i] if i < len(rewards) else math.nan
        result = "not scored" if math.isnan(reward) else f"reward {reward:.2f}"
        read = f", read {texts[i]!r}" if i < len(texts) and texts[i].strip() else ""
        found.append((prompt, f"epoch {record['epoch']}: {result}{read}"))
    return found + [("", f"epoch {record['epoch']}")] * (count - len(found))


def write(
    folder: pathlib.Path, videos: np.ndarray, texts: Sequence[tuple[str, str]], epoch: int
) -> list[Preview]:
    """Write the previews after an epoch into `folder`/000, `folder`/001 and so on.

    videos: uint8 [n, T, H, W, 3]. texts: their `captions`.
    """
    frames, height = videos.shape[1:3]
    large = media.upscale(videos, max(1, -(-LEAST_HEIGHT // height)))
    made = []
    for i, (video, text) in enumerate(zip(captioned(large, texts), texts, strict=True)):
        path = folder / f"{i:03d}" / file_name(epoch, frames)
        path.parent.mkdir(exist_ok=True)
        media.write(path, video, min(FPS, frames))
        if frames > 1:
            small = sheet(videos[i : i + 1], [text], lowest=128, highest=256)
        else:
            small = Sheet(path.read_bytes(), ".png", *video.shape[1:3])
        made.append(Preview(path.parent.name, path, ". ".join(filter(None, text)), small))
    return made


def sheet(videos: np.ndarray, texts: Sequence[tuple[str, str]], lowest: int, highest: int) -> Sheet:
    """Return videos uint8 [n, T, H, W, 3] side by side with their captions: a PNG, or a GIF of some
    of their frames. lowest, highest: pixels of a video's height.
    """
    length = videos.shape[1]
    times = np.unique(np.linspace(0, length - 1, min(length, GIF_FRAMES)).round().astype(int))
    small = np.stack(
        [
            np.stack([media.fit_height(frame, lowest, highest) for frame in videos[:, time]])
            for time in times
        ],
        axis=1,
    )
    labelled = captioned(small, texts)
    sheets = np.stack([media.contact_sheet(labelled[:, i]) for i in range(len(times))])
    if len(sheets) == 1:
        return Sheet(media.png_bytes(sheets[0]), ".png", *sheets.shape[1:3])
    return Sheet(media.gif_bytes(sheets, GIF_FPS), ".gif", *sheets.shape[1:3])


def captioned(videos: np.ndarray, texts: Sequence[tuple[str, str]]) -> np.ndarray:
    """Return videos uint8 [n, T, H, W, 3] with a caption below: [n, T, H + caption, W, 3].

    texts: prompt and result of each.
    """
    n, frames, height, width, _ = videos.shape
    strips = _captions(texts, width)
    result = np.empty((n, frames, height + strips.shape[1], width, 3), np.uint8)
    result[:, :, :height] = videos
    result[:, :, height:] = strips[:, None]
    return result


def _captions(texts: Sequence[tuple[str, str]], width: int) -> np.ndarray:
    """Return captions of this width, uint8 [n, h, width, 3]."""
    size = min(max(11, width // 28), 24)
    font, step, margin = _font(size), round(size * 1.35), size // 2
    wrapped = [(_wrap(prompt, font, width - 2 * margin), result) for prompt, result in texts]
    rows = max(len(lines) for lines, _ in wrapped) + 1
    strips = []
    for lines, result in wrapped:
        strip = Image.new("RGB", (width, rows * step + margin), BACKGROUND)
        draw = ImageDraw.Draw(strip)
        for i, line in enumerate(lines):
            draw.text((margin, margin // 2 + i * step), line, PROMPT, font)
        last = _cut(result, font, width - 2 * margin)
        draw.text((margin, margin // 2 + (rows - 1) * step), last, RESULT, font)
        strips.append(np.asarray(strip))
    return np.stack(strips)


@functools.cache
def _font(size: int):
    return ImageFont.load_default(size)


def _wrap(text: str, font, width: int) -> list[str]:
    """Break a text into at most `PROMPT_LINES` lines of this width in pixels."""
    lines = [""]
    words = text.split()
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == PROMPT_LINES:
            lines[-1] = " ".join([lines[-1], *words[i:]])
            break
        else:
            lines.append(word)
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font, width: int) -> str:
    """Return a line, cut off with dots where it is wider than this many pixels."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
