"""Writes the prompts of `assets/prompts/ocr_*.txt`, which the recipes of the published models use.

    python -m examples.ocr_prompts --out train.txt --heldout heldout.txt

Texts have one to four words; the words of held-out texts occur in no training text.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from grpo.data.prompt_generator import TextStyle, Vocabulary, draw_prompts

WORDS: Sequence[str] = """
open closed welcome coffee bakery market garden library museum station harbour bridge island summer winter morning
evening midnight silver golden crystal thunder river mountain forest valley meadow orchard lantern compass anchor
voyage journey ticket platform express local fresh daily special menu today tomorrow never always together hello
goodbye music dance theatre cinema gallery studio workshop factory school college academy hospital pharmacy hotel
motel cafe diner kitchen grill pizza noodle sushi burger salad honey butter cheese apple orange lemon cherry berry
peach mango happy birthday wedding party festival carnival parade victory champion winner finish start speed limit
exit entrance push pull danger caution warning private public parking taxi airport runway rocket planet galaxy comet
eclipse horizon dream believe create imagine explore discover wonder future history science nature energy power water
fire earth wind quality service trust value sale offer discount bargain price cash credit bank office tower castle
palace temple
""".split()
CARRIERS: tuple[str, ...] = (
    "a neon sign that says {text}",
    "a wooden sign with the words {text} carved into it",
    "a chalkboard on which {text} is written",
    "a red banner with the text {text}",
    "a shop window with {text} painted on the glass",
    "a poster with the headline {text}",
    "a street sign that reads {text}",
    "a T-shirt printed with {text}",
    "a birthday cake with {text} in icing",
    "a book whose cover says {text}",
    "a billboard that shows {text} in large letters",
    "a coffee cup labelled {text}",
    "a metal plate engraved with {text}",
    "a paper note with {text} written by hand",
    "a screen that displays {text}",
    "a flag with {text} on it",
)
SCENES: tuple[str, ...] = (
    "on a rainy city street at night",
    "in a sunny village square",
    "inside a small cafe",
    "on a snowy mountain pass",
    "at the edge of a quiet harbour",
    "in a busy railway station",
    "next to an old stone bridge",
    "in a garden full of flowers",
    "on a desk beside a window",
    "in front of a brick wall",
    "at a seaside fair",
    "in a library with tall shelves",
    "under a clear blue sky",
    "in a foggy forest clearing",
    "in a bright modern office",
    "at dusk beside a country road",
)
MOVES: tuple[str, ...] = (
    "The camera moves slowly closer.",
    "The camera stays still.",
    "The camera pans to the right.",
    "Light plays over the letters.",
    "People walk past in the background.",
    "",
)
STYLE = TextStyle(
    word_shares=(0.3, 0.4, 0.2, 0.1), characters=(1, 100), numbers=0.0, punctuation=0.0
)


def split_words() -> tuple[list[str], list[str]]:
    """Return the words of training texts and those of held-out texts."""
    words = sorted(WORDS)
    return [word for i, word in enumerate(words) if i % 6], words[::6]


def prompts(words: list[str], count: int, seed: int) -> list[str]:
    """Return `count` different prompts."""
    surfaces, scenes, cameras = (dict(zip(x, x)) for x in (CARRIERS, SCENES, MOVES))
    parts = Vocabulary(words, surfaces, scenes, {"": ""}, cameras)
    lines = draw_prompts(np.random.default_rng(seed), count, parts, STYLE, endings="")
    return [line["prompt"] for line in lines]


def main(_):
    train_words, heldout_words = split_words()
    for path, words, count, seed in (
        (flags.FLAGS.out, train_words, 4096, 0),
        (flags.FLAGS.heldout, heldout_words, 256, 1),
    ):
        text = "\n".join(prompts(words, count, seed)) + "\n"
        pathlib.Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "training prompts to write", required=True)
    flags.DEFINE_string("heldout", None, "held-out prompts to write", required=True)
    app.run(main)
