"""Frames with text, drawn with a font that ships with matplotlib."""

import pathlib

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = str(pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf")


def draw(text, height, width, size, ink=(20, 20, 20), paper=(235, 235, 235)):
    """uint8 [H, W, 3] RGB with `text` in the middle; "\\n" breaks lines."""
    image = Image.new("RGB", (width, height), paper)
    ImageDraw.Draw(image).multiline_text(
        (width / 2, height / 2),
        text,
        font=ImageFont.truetype(FONT, size),
        fill=ink,
        anchor="mm",
        align="center",
    )
    return np.asarray(image)


def video(text, frames=3, height=64, width=128, size=24):
    """uint8 [T, H, W, 3], the same on each frame."""
    return np.stack([draw(text, height, width, size)] * frames)
