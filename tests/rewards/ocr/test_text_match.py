"""Normalisation, edit distance and the most similar part of a text."""

import random

import pytest

from rewards.ocr.text_match import (
    best_window,
    edit_distance,
    flow_grpo_normalise,
    normalise,
    similarity,
)


def slow_distance(a, b):
    """Levenshtein from its recursive definition, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize(
    "a, b, distance",
    [("", "", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3), ("open", "opne", 2)],
)
def test_known_distances(a, b, distance):
    assert edit_distance(a, b) == slow_distance(a, b) == distance


def test_random_distances_and_similarities():
    rng = random.Random(0)
    for _ in range(500):
        a, b = ("".join(rng.choices("abcé", k=rng.randint(0, 12))) for _ in range(2))
        assert edit_distance(a, b) == slow_distance(a, b)
        longer = max(len(a), len(b))
        assert similarity(a, b) == pytest.approx(
            1 - slow_distance(a, b) / longer if longer else 1.0
        )


def test_paddle_distance_package_agrees():
    other = pytest.importorskip("Levenshtein")
    assert all(
        edit_distance(a, b) == other.distance(a, b) for a, b in [("kitten", "sitting"), ("É", "e")]
    )


@pytest.mark.parametrize(
    "text, normal",
    [
        ("Hello World", "helloworld"),
        (" A\tb\nC\u00a0d\u3000e", "abcde"),
        ("ＯＰＥＮ", "open"),
        ("OP\u200bEN", "open"),
        ("S\u00adO\ufe0f\U000e0100", "so"),
        ("ﬁx", "fix"),
        ("DON’T – “stop”", 'don\'t-"stop"'),
        ("24 H!", "24h!"),
        ("Cafe\u0301", "café"),
        ("don´t", "don't"),
        ("", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal
    assert normalise(normal) == normal


def test_flow_grpo_normalise_removes_spaces_only():
    assert flow_grpo_normalise("Ab C\t’!") == "abc\t’!"


@pytest.mark.parametrize(
    "target, text, part, value",
    [
        ("open", "weareopennow", "open", 1.0),
        ("open", "weareopinnow", "opin", 0.75),
        ("hello", "helo", "helo", 0.8),
        ("hello", "xxheloxx", "helo", 0.8),
        ("sale", "xxsolxx", "solx", 0.5),  # as good as "sol", and longer
        ("hello", "h", "h", 0.2),
        ("hello", "", "", 0.0),
        ("hello", "zzzzzzz", "", 0.0),
    ],
)
def test_best_window(target, text, part, value):
    window = best_window(target, text)
    assert (text[window.start : window.end], window.similarity) == (part, pytest.approx(value))


def test_best_window_is_the_best_of_all_parts_that_are_more_right_than_wrong():
    rng = random.Random(2)
    for _ in range(150):
        target, text = ("".join(rng.choices("abc", k=rng.randint(1, n))) for n in (6, 14))
        parts = [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
        best = max(similarity(target, part) for part in parts)
        window = best_window(target, text)
        if best > 0.5:
            assert window.similarity == best
        assert window.similarity == (
            similarity(target, text[window.start : window.end]) if window.end else 0
        )
