"""The shapes of tiny-wan's letters: distances to the outlines of matplotlib's DejaVu fonts."""

import dataclasses
import functools
import os

import jax
import numpy as np

from examples.tiny_wan.prompts import ALPHABET

FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSans.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
EM = 48  # texels per em
ABOVE, BELOW = 0.86, 0.34  # what a cell of the atlas holds above and below the baseline, in em
SPREAD = 6.0  # texels: distances to the outline are stored from -SPREAD to SPREAD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Atlas:
    """Letter shapes as signed distances to the outline, positive inside."""

    # uint32 [fonts, letters, rows, columns]: a texel and three neighbours, 8 bits each
    texels: jax.Array | np.ndarray
    advances: jax.Array | np.ndarray  # float32 [fonts, letters], em


@functools.lru_cache
def build_atlas(fonts: tuple[str, ...] = FONTS, alphabet: str = ALPHABET) -> Atlas:
    """Draw the alphabet in matplotlib's DejaVu fonts and measure the distances to the outlines.

    Raises:
      ValueError: a letter is wider than its cell.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    from scipy.ndimage import distance_transform_edt

    big, folder = 4, os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    rows, columns = round((ABOVE + BELOW) * EM), round(1.25 * EM)
    distance = np.zeros((len(fonts), len(alphabet), rows, columns), np.float32)
    advances = np.zeros((len(fonts), len(alphabet)), np.float32)
    for f, name in enumerate(fonts):
        font = ImageFont.truetype(os.path.join(folder, name), EM * big)
        for a, letter in enumerate(alphabet):
            # a cell is as wide as the letter's advance, or wider where its ink would reach into a
            # neighbour's
            ink_left, _, ink_right, _ = font.getbbox(letter, anchor="ls")
            left, right = min(0, ink_left - big), max(font.getlength(letter), ink_right + big)
            image = Image.new("L", (columns * big, rows * big))
            ImageDraw.Draw(image).text(
                (-left, round(ABOVE * EM * big)), letter, 255, font, anchor="ls"
            )
            ink = np.asarray(image) > 127
            inside, outside = (np.asarray(distance_transform_edt(x)) for x in (ink, ~ink))
            signed = (inside - outside) / big
            distance[f, a] = signed.reshape(rows, big, columns, big)[:, 1:3, :, 1:3].mean((1, 3))
            advances[f, a] = (right - left) / (EM * big)
    if advances.max() * EM > columns - 1:
        raise ValueError(f"a letter is {advances.max():.2f} em wide, its cell {columns / EM:.2f}")
    byte = np.clip(np.round((distance / SPREAD + 1) * 127.5), 0, 255).astype(np.uint32)
    byte = np.pad(byte, ((0, 0), (0, 0), (0, 1), (0, 1)), mode="edge")
    upper, lower = byte[..., :-1, :], byte[..., 1:, :]
    texels = upper[..., :-1] | upper[..., 1:] << 8 | lower[..., :-1] << 16 | lower[..., 1:] << 24
    return Atlas(texels, advances)
