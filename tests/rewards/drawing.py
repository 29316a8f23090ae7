"""Videos for the tests: drawn text, in a font that matplotlib ships, and plain frames."""

import pathlib

import cv2
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


def filled(*values):
    """uint8 [B, 2, 2, 2, 3], each video filled with its value. The rewards of `pool_rewards`
    misbehave at 1.
    """
    return np.stack([np.full((2, 2, 2, 3), value, np.uint8) for value in values])


def texture(frames=5, shift=0, seed=0):
    """uint8 [T, 96, 128, 3], a smooth texture that moves by `shift` pixels per frame."""
    rng = np.random.default_rng(seed)
    wide = cv2.GaussianBlur(rng.integers(0, 256, (96, 128 + 40, 3)).astype(np.uint8), (0, 0), 3)
    wide = cv2.normalize(wide, None, 30, 220, cv2.NORM_MINMAX)
    return np.stack([wide[:, 20 + shift * t : 148 + shift * t] for t in range(frames)])
