"""Compares the text that was read with the text that was asked for: normalisation and edit
distance.
"""

import dataclasses
import re
import unicodedata

from rapidfuzz.distance import Levenshtein

# Typographic characters that look the same as an ASCII one to a reader, and to OCR.
_LOOKALIKES = str.maketrans("‘’`´“”–—−", "''''\"\"---")


# These change the look of the character before them, and show nothing themselves.
_VARIATION_SELECTOR = re.compile("[\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def visible(text: str) -> str:
    """Return `text` without the characters that cannot be seen: those of Unicode's category Cf
    (zero-width spaces, soft hyphens, marks of direction) and variation selectors.
    """
    if text.isascii():
        return text
    return "".join(c for c in _VARIATION_SELECTOR.sub("", text) if unicodedata.category(c) != "Cf")


@dataclasses.dataclass(frozen=True)
class Normaliser:
    """What is disregarded when two texts are compared: what cannot be seen, and never punctuation,
    as in Flow-GRPO.
    """

    case: bool = True  # upper and lower case are the same
    whitespace: bool = True  # spaces, tabs and line breaks are removed
    unicode: bool = True  # NFKC (full-width = normal width, ligature = letters) and _LOOKALIKES

    def __call__(self, text: str) -> str:
        text = visible(text)
        if self.unicode:
            # Before NFKC, which would turn the accent ´ into a space and a combining mark.
            text = unicodedata.normalize("NFKC", text.translate(_LOOKALIKES))
        if self.whitespace:
            text = "".join(text.split())
        return text.lower() if self.case else text


def flow_grpo_normalise(text: str) -> str:
    """Flow-GRPO's own normalisation: lower case, and the space character (no other whitespace)
    removed; and here what cannot be seen.
    """
    return visible(text).replace(" ", "").lower()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of one character
    from `a` to `b`.
    """
    return Levenshtein.distance(a, b)


def similarity(a: str, b: str) -> float:
    """1 - distance / length of the longer text, in [0, 1]; 1 iff equal. Two empty texts are equal."""
    return Levenshtein.normalized_similarity(a, b)


@dataclasses.dataclass(frozen=True)
class Window:
    """The part text[start:end] of a longer text, and its similarity to what was looked for."""

    start: int
    end: int
    similarity: float


def best_window(target: str, text: str) -> Window:
    """The part of `text` most similar to `target`; the longest, then the first, of equals.

    Parts of half to twice the target's length are tried, since only such a part can be more right
    than wrong (similarity <= shorter / longer); a `text` shorter than that is tried whole. Cost:
    about 1.5 |target| |text| comparisons of 0.2 us.
    """
    at = text.find(target)
    if at >= 0:
        return Window(at, at + len(target), 1.0)
    best = Window(0, 0, 0.0)
    shortest, longest = min(len(text), max(1, len(target) // 2)), min(len(text), 2 * len(target))
    for length in range(longest, shortest - 1, -1):
        for start in range(len(text) - length + 1):
            value = similarity(target, text[start : start + length])
            if value > best.similarity:
                best = Window(start, start + length, value)
    return best
