"""Prompts as people write them: a few words, a long description, two texts, Chinese.

`grpo.make_prompts --styles=short,long,two_texts,chinese` writes them. `standard` is the sentence of
`grpo.data.prompt_generator`. Every style has random draws of its own, determined by the seed, and the
words of held-out texts occur in no training text of any style.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from grpo.data import chinese_vocabulary as chinese
from grpo.data.prompt_generator import (
    DEFAULT,
    HELDOUT_ENDINGS,
    HELDOUT_PART,
    TRAIN_ENDINGS,
    TextStyle,
    Vocabulary,
    capitalised,
    draw_limited_text,
    draw_looks,
    draw_prompts,
    place_of,
    split_words,
)
from grpo.data.vocabulary import LETTERS, LOOKS, MOVEMENTS, SURROUNDINGS
from wan_jax.errors import UserError

LINKS = ("{one} and {two}", "{one}, next to {two}", "{one}, and in front of it {two}")


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of one set of prompts.

    Attributes:
        parts: with the set's English words.
        endings: last letters of random words.
        chinese, others: the Chinese words of this set and of the other one.
    """

    parts: Vocabulary
    endings: str
    chinese: Sequence[str]
    others: Sequence[str]


Draw = Callable[[np.random.Generator, Words, TextStyle], dict]


def short(rng: np.random.Generator, words: Words, style: TextStyle) -> dict:
    """Draw a prompt of a few words, as it is typed: no light, no camera, half of them no scene."""
    text = draw_limited_text(rng, words.parts.words, style, words.endings)
    surface, scene, _, _ = draw_looks(rng, words.parts)
    scene = scene if rng.random() < 0.5 else ""
    carrier = words.parts.surfaces[surface].format(text=f'"{text}"')
    prompt = f"{carrier} {words.parts.scenes[scene]}" if scene else carrier
    return _line(prompt, [text], surface, scene)


def long(rng: np.random.Generator, words: Words, style: TextStyle) -> dict:
    """Draw a description of 60 to 100 words, as prompt editors write it: also the letters, what is
    around, what moves, and the look.
    """
    parts = words.parts
    text = draw_limited_text(rng, parts.words, style, words.endings)
    surface, scene, light, camera = draw_looks(rng, parts)
    letters, surroundings, movement, look = (
        str(rng.choice(sentences)) for sentences in (LETTERS, SURROUNDINGS, MOVEMENTS, LOOKS)
    )
    carrier = parts.surfaces[surface].format(text=f'"{text}"')
    prompt = (
        f"{capitalised(carrier)}, {place_of(parts, scene, light)}. {letters} {surroundings} "
        f"{movement} {parts.cameras[camera]} {look}"
    )
    return _line(prompt, [text], surface, scene, light, camera)


def two_texts(rng: np.random.Generator, words: Words, style: TextStyle) -> dict:
    """Draw a prompt with two different texts on two different surfaces."""
    parts = words.parts
    texts: list[str] = []
    while len(texts) < 2:
        text = draw_limited_text(rng, parts.words, style, words.endings)
        if text.lower() not in [known.lower() for known in texts]:
            texts.append(text)
    surfaces = [str(name) for name in rng.choice(list(parts.surfaces), 2, replace=False)]
    _, scene, light, camera = draw_looks(rng, parts)
    carriers = (
        parts.surfaces[name].format(text=f'"{text}"') for name, text in zip(surfaces, texts)
    )
    both = str(rng.choice(LINKS)).format(**dict(zip(("one", "two"), carriers)))
    prompt = f"{capitalised(both)}, {place_of(parts, scene, light)}. {parts.cameras[camera]}"
    return _line(prompt, texts, ", ".join(surfaces), scene, light, camera)


def in_chinese(rng: np.random.Generator, words: Words, style: TextStyle) -> dict:
    """Draw a Chinese prompt with a text of one or two words, whatever the style of English texts."""
    surface, scene, light, camera = draw_looks(rng, chinese.PARTS)
    text = ""
    # two words may form a word of the other set by chance
    while not text or any(other in text for other in words.others):
        text = "".join(rng.choice(words.chinese, rng.integers(1, 3), replace=False))
    parts = chinese.PARTS
    carrier = parts.surfaces[surface].format(text=f"“{text}”")
    prompt = f"{parts.lights[light]}{parts.scenes[scene]}，{carrier}。{parts.cameras[camera]}"
    return _line(prompt, [text], surface, scene, light, camera)


# The position of a style is part of its random draws: append new ones.
STYLES: dict[str, Draw | None] = {
    "standard": None,  # `draw_prompts`
    "short": short,
    "long": long,
    "two_texts": two_texts,
    "chinese": in_chinese,
}


def generate_styles(
    count: int, heldout: int, seed: int, style: TextStyle, names: Sequence[str]
) -> dict[str, list[dict]]:
    """Generate sets of prompts in several styles that share no word of a text with those held out.

    Args:
        count: number of training prompts: of each style in turn. A larger set begins with the smaller
            one.
        heldout: number of held-out prompts of the mixed set, and of each style's own set, whose first
            prompts are those in the mixed set.
        seed: determines all sets.
        style: what the English texts look like.
        names: of `STYLES`.

    Returns:
        'train', 'heldout', and 'heldout_NAME' of each style: lines as of `draw_prompts`, with their
        style; texts that are joined by ", " in "text" are apart in "targets".

    Raises:
        UserError: a name is unknown or given twice; no text meets the style.
    """
    unknown = [name for name in names if name not in STYLES]
    if unknown or len(set(names)) < len(names) or not names:
        raise UserError(
            f"--styles={','.join(names)}: choose from {', '.join(STYLES)}, each at most once"
        )
    drawn: dict[str, dict[str, list[dict]]] = {"train": {}, "heldout": {}}
    train_words, heldout_words = split_words(seed)
    order = np.random.default_rng([seed, 0x307D, 1]).permutation(sorted(chinese.WORDS)).tolist()
    size = len(order) // HELDOUT_PART
    for stream, number, kind, english, endings, own, others in (
        (1, count, "train", train_words, TRAIN_ENDINGS, order[size:], order[:size]),
        (2, heldout, "heldout", heldout_words, HELDOUT_ENDINGS, order[:size], order[size:]),
    ):
        words = Words(dataclasses.replace(DEFAULT, words=english), endings, own, others)
        for name in names:
            # a set of one style alone is as long as the mixed one
            share = number if kind == "heldout" else -(-number // len(names))
            rng = np.random.default_rng([seed, stream, [*STYLES].index(name)])
            drawn[kind][name] = _distinct(rng, share, words, style, name)
    sets = {
        "train": _mixed(drawn["train"], count),
        "heldout": _mixed(drawn["heldout"], heldout),
    }
    return sets | {f"heldout_{name}": lines for name, lines in drawn["heldout"].items()}


def _distinct(
    rng: np.random.Generator, count: int, words: Words, style: TextStyle, name: str
) -> list[dict]:
    """Draw `count` different prompts of a style."""
    draw = STYLES[name]
    if draw is None:
        lines = draw_prompts(rng, count, words.parts, style, words.endings)
        return [line | {"style": name} for line in lines]
    found: dict[str, dict] = {}
    while len(found) < count:
        line = draw(rng, words, style)
        found.setdefault(line["prompt"], line | {"style": name})
    return list(found.values())


def _mixed(lines: dict[str, list[dict]], count: int) -> list[dict]:
    """Return `count` lines, one of each style in turn."""
    return [line for row in zip(*lines.values()) for line in row][:count]


def _line(
    prompt: str, targets: list[str], surface: str, scene: str, light: str = "", camera: str = ""
) -> dict:
    """Return a prompt's line, with the keys of `draw_prompts`."""
    names = {"surface": surface, "scene": scene, "light": light, "camera": camera}
    return {"prompt": prompt, "targets": targets, "text": ", ".join(targets), **names}
