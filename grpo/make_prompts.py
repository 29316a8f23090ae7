"""Writes prompts for training a video model to spell: something that carries a text, where, and how
the camera moves.

    python -m grpo.make_prompts --count=20000 --heldout=1000 --out=prompts --seed=0

OUT gets train and heldout, each as .txt (one prompt a line) and .jsonl, whose lines have the
prompt, its targets, text, surface, scene, light and camera. Everything is ASCII, the text stands in
straight double quotes. The words of held-out texts, random ones too, occur in no training text. One
seed gives one pair of sets, and a longer set begins with the shorter one. The files are read back
as `grpo.train` reads them before the command ends.
"""

import dataclasses
import json
import pathlib
import re
import string
from collections.abc import Sequence

import numpy as np
from absl import flags

from grpo.data.prompts import load_prompts
from grpo.data.vocabulary import CAMERAS, LIGHTS, SCENES, SURFACES, WORDS
from grpo.records.run_log import write_atomically
from rewards.ocr.targets import parse_targets
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import define_path
from wan_jax.errors import UserError

CASES = {"upper": str.upper, "title": str.title, "lower": str.lower}
HELDOUT_SHARE = 8  # one word of so many is kept for held-out texts
TRIES = 200  # texts drawn for one prompt before lengths and characters are said to leave no choice


@dataclasses.dataclass(frozen=True)
class TextStyle:
    """What texts look like. Raises `UserError` on limits that cannot be met."""

    words: tuple[int, int] = (1, 4)  # least and most
    characters: tuple[int, int] = (2, 24)  # of the text without its spaces
    cases: tuple[str, ...] = tuple(CASES)
    numbers: float = 0.1  # share of texts with a number of up to three digits
    punctuation: float = 0.1  # share of texts with one of ! ? & -
    random: float = 0.0  # share of words that are random letters, for spelling without a dictionary

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


def split_words(seed: int) -> tuple[list[str], list[str]]:
    """(words of training texts, words of held-out texts), without a common one."""
    words = np.random.default_rng([seed, 0x307D]).permutation(sorted(set(WORDS))).tolist()
    return words[len(words) // HELDOUT_SHARE :], words[: len(words) // HELDOUT_SHARE]


def random_word(rng: np.random.Generator, letters: str) -> str:
    """3 to 7 letters that are none of `WORDS`."""
    while True:
        word = "".join(rng.choice(list(string.ascii_lowercase), rng.integers(2, 7))) + str(
            rng.choice(list(letters))
        )
        if word not in WORDS:
            return word


def draw_text(
    rng: np.random.Generator, words: Sequence[str], style: TextStyle, letters: str
) -> str:
    """One text, whatever its length. letters: what random words end with, so that those of two sets
    differ.
    """
    low, high = style.words
    parts = [str(rng.choice(words)) for _ in range(rng.integers(low, high + 1))]
    for i in range(len(parts)):
        if rng.random() < style.random:
            parts[i] = random_word(rng, letters)
    if rng.random() < style.numbers:
        parts.insert(int(rng.integers(len(parts) + 1)), str(rng.integers(1, 1000)))
    text = CASES[str(rng.choice(style.cases))](" ".join(parts))
    if rng.random() < style.punctuation:
        text = (
            text + str(rng.choice(["!", "?"]))
            if " " not in text or rng.random() < 0.5
            else text.replace(" ", str(rng.choice([" & ", "-"])), 1)
        )
    return text


def draw_prompts(
    rng: np.random.Generator, count: int, words: Sequence[str], style: TextStyle, letters: str
) -> list[dict]:
    """`count` different prompts, as the lines of a .jsonl. Raises `UserError` where the style
    leaves no text.
    """
    found: dict[str, dict] = {}
    low, high = style.characters
    while len(found) < count:
        for _ in range(TRIES):
            text = draw_text(rng, words, style, letters)
            if low <= len(text.replace(" ", "")) <= high:
                break
        else:
            raise UserError(
                f"no text of {low} to {high} characters and {style.words[0]} to {style.words[1]} "
                f"words in {TRIES} tries: change --characters or --words"
            )
        surface, scene, light, camera = (
            str(rng.choice(list(names))) for names in (SURFACES, SCENES, LIGHTS, CAMERAS)
        )
        carrier = SURFACES[surface].format(text=f'"{text}"')
        place = f"{SCENES[scene]} {LIGHTS[light]}".strip()
        prompt = f"{carrier[0].upper()}{carrier[1:]}, {place}. {CAMERAS[camera]}"
        found.setdefault(
            prompt,
            {
                "prompt": prompt,
                "targets": [text],
                "text": text,
                "surface": surface,
                "scene": scene,
                "light": light,
                "camera": camera,
            },
        )
    return list(found.values())


def words_of(lines: Sequence[dict]) -> set[str]:
    """The words of all texts, in lower case; numbers are none."""
    return {word for line in lines for word in re.findall("[a-z]+", line["text"].lower())}


def make(count: int, heldout: int, seed: int, style: TextStyle) -> dict[str, list[dict]]:
    """{'train': lines, 'heldout': lines}. Raises `UserError` where they share a word."""
    train_words, heldout_words = split_words(seed)
    made = {
        "train": draw_prompts(
            np.random.default_rng([seed, 1]), count, train_words, style, "aeioubcdfghjklm"
        ),
        "heldout": draw_prompts(
            np.random.default_rng([seed, 2]), heldout, heldout_words, style, "npqrstvwxyz"
        ),
    }
    if common := words_of(made["train"]) & words_of(made["heldout"]):
        raise UserError(
            f"{len(common)} words are in both sets, e.g. {min(common)!r}; choose another --seed"
        )
    return made


def write(path: pathlib.Path, lines: Sequence[dict]) -> None:
    """`path`.txt and .jsonl, read back as training reads them. Raises `UserError` where that gives
    something else.
    """
    texts = {
        ".txt": [line["prompt"] for line in lines],
        ".jsonl": [json.dumps(line) for line in lines],
    }
    for suffix, rows in texts.items():
        file = path.with_name(path.name + suffix)
        write_atomically(file, ("\n".join(rows) + "\n").encode("ascii"))
        back = load_prompts(file, parse_targets)
        if back.prompts != tuple(line["prompt"] for line in lines) or back.targets != tuple(
            (line["text"],) for line in lines
        ):
            raise UserError(f"{file} is not read back as it was written")


def main(_):
    f = flags.FLAGS
    try:
        limits = {name: tuple(map(int, getattr(f, name))) for name in ("words", "characters")}
    except ValueError as error:
        raise UserError(
            f"--words={','.join(f.words)} --characters={','.join(f.characters)}: {error}"
        ) from None
    style = TextStyle(
        **limits,
        cases=tuple(f.cases),
        numbers=f.numbers,
        punctuation=f.punctuation,
        random=f.random,
    )
    out = pathlib.Path(f.out)
    made = make(f.count, f.heldout, f.seed, style)
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in made.items():
        write(out / name, lines)
        lengths = [len(line["text"].replace(" ", "")) for line in lines]
        print(
            f"{out / name}.jsonl, .txt: {len(lines)} prompts, "
            f"{len({line['text'] for line in lines})} texts of {min(lengths)} to {max(lengths)} "
            f"characters, {np.median(lengths):.0f} in the middle, {len(words_of(lines))} words"
        )


if __name__ == "__main__":
    default = TextStyle()
    flags.DEFINE_integer("count", 20_000, "training prompts", lower_bound=1)
    flags.DEFINE_integer("heldout", 1000, "held-out prompts", lower_bound=1)
    define_path("out", "folder to write", required=True)
    flags.DEFINE_integer("seed", 0, "one seed gives one pair of sets", lower_bound=0)
    flags.DEFINE_list("words", [str(n) for n in default.words], "least and most words of a text")
    flags.DEFINE_list(
        "characters", [str(n) for n in default.characters], "the same, without its spaces"
    )
    flags.DEFINE_list("cases", list(CASES), "upper, title, lower")
    flags.DEFINE_float("numbers", default.numbers, "share of texts with a number")
    flags.DEFINE_float("punctuation", default.punctuation, "share of texts with one of ! ? & -")
    flags.DEFINE_float("random", default.random, "share of words that are random letters")
    cli.run(main)
