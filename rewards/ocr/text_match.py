"""Comparison of the text that was read with the text that was asked for: normalisation, edit
distance, the most similar part of a text, and how sure the reader is of its characters.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

# typographic characters that readers and OCR cannot tell from an ASCII one
_LOOKALIKES = str.maketrans("‘’`´“”–—−", "''''\"\"---")

# characters that only change the look of the one before them
_VARIATION_SELECTOR = re.compile("[\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def visible(text: str) -> str:
    """Return `text` without invisible characters: those of Unicode's category Cf (zero-width
    spaces, soft hyphens, direction marks) and variation selectors.
    """
    if text.isascii():
        return text
    text = _VARIATION_SELECTOR.sub("", text)
    return "".join(char for char in text if unicodedata.category(char) != "Cf")


def normalise(text: str) -> str:
    """Remove the differences that do not count when two texts are compared: invisible characters,
    case, whitespace, and forms of the same character (NFKC and `_LOOKALIKES`).

    Punctuation always counts, as in Flow-GRPO. Normalising twice changes nothing more.
    """
    # before NFKC, which would turn the accent ´ into a space and a combining mark
    text = visible(text).translate(_LOOKALIKES)
    return "".join(unicodedata.normalize("NFKC", text).split()).lower()


def flow_grpo_normalise(text: str) -> str:
    """Normalise as Flow-GRPO does: lower case, without the space character (other whitespace
    stays). Invisible characters are removed as well.
    """
    return visible(text).replace(" ", "").lower()


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: the smallest number of insertions, deletions and
    substitutions of one character that turn `a` into `b`.
    """
    return Levenshtein.distance(a, b)


def similarity(a: str, b: str) -> float:
    """Return 1 - distance / length of the longer text, in [0, 1]; 1 if and only if the texts are
    equal, also for two empty ones.
    """
    return Levenshtein.normalized_similarity(a, b)


def confident_similarity(target: str, text: str, confidences: Sequence[float]) -> float:
    """Return `similarity`, in which each character of `text` that is right counts as much as the
    reader is sure of it: less the sum of 1 - confidence over these, over the longer length; at
    least 0. With confidences of 1 it is `similarity`.

    confidences: of the characters of `text`, in [0, 1].
    """
    doubt = sum(
        1.0 - confidences[at]
        for block in Levenshtein.editops(target, text).as_matching_blocks()
        for at in range(block.b, block.b + block.size)
    )
    if not doubt:
        return similarity(target, text)
    return max(0.0, similarity(target, text) - doubt / max(len(target), len(text)))


def normalised_confidences(
    text: str, confidences: Sequence[float], confidence: float
) -> list[float]:
    """Return the confidences of the characters of `normalise(text)`, in [0, 1].

    confidences: of those of `text`; () where the reader gives none. confidence: of the whole text,
    which counts for each character where there are none, or where normalisation joins characters.
    """
    known = confidences if len(confidences) == len(text) else [confidence] * len(text)
    parts = [normalise(char) for char in text]
    whole = normalise(text)
    if "".join(parts) != whole:
        parts, known = list(whole), [confidence] * len(whole)
    return [min(1.0, max(0.0, c)) for part, c in zip(parts, known) for _ in part]


@dataclasses.dataclass(frozen=True)
class Window:
    """The part text[start:end] of a longer text, and its similarity to a target."""

    start: int
    end: int
    similarity: float


def best_window(target: str, text: str) -> Window:
    """Return the part of `text` that is most similar to `target`; of equal parts the longest, then
    the first.

    Parts of half to twice the target's length are compared, because only those can be more right
    than wrong (similarity <= shorter / longer). A shorter `text` is compared as a whole. Cost:
    about 1.5 |target| |text| comparisons of 0.2 us.
    """
    exact = text.find(target)
    if exact >= 0:
        return Window(exact, exact + len(target), 1.0)
    best = Window(0, 0, 0.0)
    shortest, longest = min(len(text), max(1, len(target) // 2)), min(len(text), 2 * len(target))
    for length in range(longest, shortest - 1, -1):
        for start in range(len(text) - length + 1):
            value = similarity(target, text[start : start + length])
            if value > best.similarity:
                best = Window(start, start + length, value)
    return best
