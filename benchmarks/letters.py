"""Measures which text reward notices damaged letters: signs that are still read right.

    python -m benchmarks.letters [--signs 96] [--reader_two rapidocr_v4]

Words are drawn, and each is damaged in three ways at a random place of its ink: a part is erased, a
stroke is added, two letters are joined. Signs that `rapidocr` reads right after that are kept, since
the others cost reward anyway. The figures are the shares of pairs of a clean and a damaged sign in
which the clean one has the higher value (AUC): 0.5 is blind, 1 sees all.
"""

import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw, ImageFont

from rewards.ocr.engines import ENGINES, make_engine
from rewards.ocr.rules import confident_spelling, spelling

WORDS = (
    "HELLO OPEN PIZZA SALE MARKET JAZZ EXIT WELCOME COFFEE BAKERY GARDEN HOTEL MUSEUM BRIDGE "
    "FLOWER WINTER"
).split()
SIZES = (28, 36, 44)  # pixels of the font
INK, PAPER = (20, 20, 20), (235, 235, 235)
DAMAGES = ("erased", "stroke", "joined")


def draw(word: str, size: int) -> Image.Image:
    """Return a sign of 128 x 256 pixels."""
    image = Image.new("RGB", (256, 128), PAPER)
    font = ImageFont.load_default(size=size)
    ImageDraw.Draw(image).text((128, 64), word, font=font, fill=INK, anchor="mm")
    return image


def damage(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """Return a copy of a sign that is damaged at a random place of its ink."""
    ys, xs = np.nonzero((np.asarray(image) < 128).all(-1))
    at = rng.integers(len(xs))
    x, y = int(xs[at]), int(ys[at])
    image = image.copy()
    pen = ImageDraw.Draw(image)
    if kind == "erased":
        pen.rectangle((x - 6, y - 6, x + 5, y + 5), fill=PAPER)
    elif kind == "stroke":
        pen.line((x - 9, y - 9, x + 9, y + 9), fill=INK, width=3)
    else:
        pen.rectangle((x, y - 2, x + 21, y + 1), fill=INK)
    return image


def auc(clean: list[float], damaged: list[float]) -> float:
    """Return the share of pairs in which the clean sign has the higher value; ties count half."""
    a, b = np.array(clean)[:, None], np.array(damaged)[None]
    return float(((a > b) + 0.5 * (a == b)).mean())


def main(_) -> None:
    """Draw, damage, read, and print the table."""
    rng = np.random.default_rng(0)
    readers = [make_engine(name, characters=True) for name in ("rapidocr", flags.FLAGS.reader_two)]

    def values(image: Image.Image, word: str) -> dict[str, float]:
        lines = [reader(np.array(image)) for reader in readers]
        plain = [spelling(found, (word,)) for found in lines]
        sure = [confident_spelling(found, (word,)) for found in lines]
        return {
            "spelling": plain[0],
            "spelling, two readers": min(plain),
            "confident": sure[0],
            "confident, two readers": min(sure),
        }

    clean, damaged = [], {kind: [] for kind in DAMAGES}
    for i in range(flags.FLAGS.signs):
        word = WORDS[i % len(WORDS)]
        image = draw(word, SIZES[i // len(WORDS) % len(SIZES)])
        clean.append(values(image, word))
        for kind in DAMAGES:
            damaged[kind].append(values(damage(image, kind, rng), word))
    clean = [row for row in clean if row["spelling"] == 1]
    kept = {kind: [r for r in rows if r["spelling"] == 1] for kind, rows in damaged.items()}
    print(f"{len(clean)} clean signs; damaged and read right:")
    print(f"{'':24}" + "".join(f"{kind} ({len(kept[kind])})".rjust(14) for kind in DAMAGES))
    for name in clean[0]:
        column = [row[name] for row in clean]
        cells = [auc(column, [row[name] for row in kept[kind]]) for kind in DAMAGES]
        print(f"{name:24}" + "".join(f"{cell:14.2f}" for cell in cells))


if __name__ == "__main__":
    flags.DEFINE_integer("signs", 96, "number of clean signs", lower_bound=1)
    flags.DEFINE_enum("reader_two", "rapidocr_v4", tuple(ENGINES), "the second reader")
    app.run(main)
