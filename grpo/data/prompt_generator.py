"""Generates prompts for training a video model to spell: something that carries a text, where, and
how the camera moves.

`grpo.make_prompts` is its command. The words, phrases and looks come from a `Vocabulary`, so the
same code writes other sets of prompts (`examples/ocr_prompts.py`).
"""

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence

import numpy as np

from grpo.data.vocabulary import CAMERAS, LIGHTS, SCENES, SURFACES, WORDS
from wan_jax.errors import UserError

CASES = {"upper": str.upper, "title": str.title, "lower": str.lower}
HELDOUT_PART = 8  # one word in 8 is for held-out texts
TRIES = 2000  # texts drawn for one prompt before the limits are reported as impossible
# last letters of random words, so that training and held-out texts never share one
TRAIN_ENDINGS, HELDOUT_ENDINGS = "aeioubcdfghjklm", "npqrstvwxyz"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What prompts are made of. The mappings go from short names to phrases.

    Attributes:
      words: words of the texts.
      surfaces: phrases with {text}, for example "a neon sign that says {text}".
      scenes: where the surface is.
      lights: follow the scene; may be empty.
      cameras: sentences about the camera; may be empty.
    """

    words: Sequence[str]
    surfaces: Mapping[str, str]
    scenes: Mapping[str, str]
    lights: Mapping[str, str]
    cameras: Mapping[str, str]


DEFAULT = Vocabulary(WORDS, SURFACES, SCENES, LIGHTS, CAMERAS)


@dataclasses.dataclass(frozen=True)
class TextStyle:
    """What the texts look like.

    Attributes:
      words: least and most words of a text.
      characters: least and most characters of a text, without its spaces.
      cases: keys of `CASES`.
      numbers: share of texts with a number of up to three digits.
      punctuation: share of texts with one of ! ? & -
      random: share of words that are random letters, for spelling without a dictionary.
      word_shares: share of texts with each number of words; None: equal shares.

    Raises:
      UserError: limits or shares that are impossible.
    """

    words: tuple[int, int] = (1, 4)
    characters: tuple[int, int] = (2, 24)
    cases: tuple[str, ...] = tuple(CASES)
    numbers: float = 0.1
    punctuation: float = 0.1
    random: float = 0.0
    word_shares: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("words", "characters"):
            limits = getattr(self, name)
            if len(limits) != 2 or not 1 <= limits[0] <= limits[1]:
                raise UserError(
                    f"--{name}={','.join(map(str, limits))}: give the least and the most, from 1 on"
                )
        for name in ("numbers", "punctuation", "random"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name}={getattr(self, name)} must lie between 0 and 1")
        if not self.cases or not set(self.cases) <= set(CASES):
            raise UserError(f"--cases={','.join(self.cases)}: choose from {', '.join(CASES)}")


def generate(count: int, heldout: int, seed: int, style: TextStyle) -> dict[str, list[dict]]:
    """Generate a training set and a held-out set that share no word.

    Args:
      count: number of training prompts. A larger set begins with the smaller one.
      heldout: number of held-out prompts.
      seed: determines both sets.
      style: what the texts look like.

    Returns:
      {'train': lines, 'heldout': lines}, the lines as from `draw_prompts`.

    Raises:
      UserError: no text meets the style.
    """
    train_words, heldout_words = split_words(seed)
    sets = {}
    for name, stream, number, words, endings in (
        ("train", 1, count, train_words, TRAIN_ENDINGS),
        ("heldout", 2, heldout, heldout_words, HELDOUT_ENDINGS),
    ):
        rng = np.random.default_rng([seed, stream])
        parts = dataclasses.replace(DEFAULT, words=words)
        sets[name] = draw_prompts(rng, number, parts, style, endings)
    return sets


def split_words(seed: int) -> tuple[list[str], list[str]]:
    """Return the words of training texts and those of held-out texts."""
    words = np.random.default_rng([seed, 0x307D]).permutation(sorted(WORDS)).tolist()
    return words[len(words) // HELDOUT_PART :], words[: len(words) // HELDOUT_PART]


def draw_prompts(
    rng: np.random.Generator, count: int, parts: Vocabulary, style: TextStyle, endings: str
) -> list[dict]:
    """Draw `count` different prompts.

    Args:
      rng: source of all draws.
      count: number of prompts.
      parts: words and phrases.
      style: what the texts look like.
      endings: last letters of random words.

    Returns:
      A dict for each prompt: prompt, targets, text, and the names of its surface, scene, light and
      camera.

    Raises:
      UserError: `TRIES` texts in a row did not meet `style.characters`.
    """
    lines: dict[str, dict] = {}
    while len(lines) < count:
        # 1 the text
        text = draw_limited_text(rng, parts.words, style, endings)
        # 2 what carries it, and where
        surface, scene, light, camera = draw_looks(rng, parts)
        # 3 the sentence
        carrier = parts.surfaces[surface].format(text=f'"{text}"')
        prompt = f"{capitalised(carrier)}, {place_of(parts, scene, light)}. {parts.cameras[camera]}".strip()
        line = {"prompt": prompt, "targets": [text], "text": text, "surface": surface}
        lines.setdefault(prompt, line | {"scene": scene, "light": light, "camera": camera})
    return list(lines.values())


def draw_looks(rng: np.random.Generator, parts: Vocabulary) -> tuple[str, str, str, str]:
    """Draw the names of a surface, a scene, a light and a camera."""
    surface, scene, light, camera = (
        str(rng.choice(list(names)))
        for names in (parts.surfaces, parts.scenes, parts.lights, parts.cameras)
    )
    return surface, scene, light, camera


def place_of(parts: Vocabulary, scene: str, light: str) -> str:
    """Return the phrases of a scene and a light by their names."""
    return f"{parts.scenes[scene]} {parts.lights[light]}".strip()


def capitalised(phrase: str) -> str:
    """Return a phrase with its first letter in upper case."""
    return f"{phrase[0].upper()}{phrase[1:]}"


def draw_limited_text(
    rng: np.random.Generator, words: Sequence[str], style: TextStyle, endings: str
) -> str:
    """Draw one text of as many characters as the style allows. Raises `UserError` where `TRIES` in a
    row have too few or too many.
    """
    low, high = style.characters
    for _ in range(TRIES):
        text = draw_text(rng, words, style, endings)
        if low <= len(text.replace(" ", "")) <= high:
            return text
    raise UserError(
        f"no text of {low} to {high} characters and {style.words[0]} to {style.words[1]} "
        f"words in {TRIES} tries: change --characters or --words"
    )


def draw_text(
    rng: np.random.Generator, words: Sequence[str], style: TextStyle, endings: str
) -> str:
    """Draw one text, of any number of characters. What has the share 0 takes no draw from `rng`."""

    def happens(share: float) -> bool:
        return share > 0 and rng.random() < share

    # 1 words
    low, high = style.words
    count = int(rng.choice(np.arange(low, high + 1), p=style.word_shares))
    chosen = rng.choice(words, count, replace=count > len(words)).tolist()
    chosen = [draw_random_word(rng, endings) if happens(style.random) else w for w in chosen]
    # 2 a number
    if happens(style.numbers):
        chosen.insert(int(rng.integers(len(chosen) + 1)), str(rng.integers(1, 1000)))
    # 3 case
    text = CASES[str(rng.choice(style.cases))](" ".join(chosen))
    # 4 punctuation, at the end or instead of the first space
    if happens(style.punctuation):
        if " " not in text or rng.random() < 0.5:
            return text + str(rng.choice(["!", "?"]))
        return text.replace(" ", str(rng.choice([" & ", "-"])), 1)
    return text


def draw_random_word(rng: np.random.Generator, endings: str) -> str:
    """Draw 3 to 7 letters that are no word of the vocabulary and end with one of `endings`."""
    while True:
        letters = rng.choice(list(string.ascii_lowercase), rng.integers(2, 7))
        word = "".join(letters) + str(rng.choice(list(endings)))
        if word not in WORDS:
            return word


def words_of(lines: Sequence[dict]) -> set[str]:
    """Return the words of all texts in lower case, without numbers."""
    return {word for line in lines for word in re.findall("[a-z]+", line["text"].lower())}
