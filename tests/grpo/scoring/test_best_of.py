"""The best of N videos of a prompt: which one is chosen, and whose number is reported."""

import math

import numpy as np
import pytest

from grpo.scoring.best_of import best_candidate, curve, format_best, report_best
from grpo.scoring.scores import GatheredScores

NAN = math.nan
# two prompts, three candidates each; video n is of prompt n % 2
VALUES = np.array([0.1, 0.9, 0.7, NAN, 0.7, 0.2])
SECOND = np.array([0.2, 0.3, 0.5, 0.6, 0.9, 0.8])


def scores(**parts):
    return GatheredScores(
        values=VALUES,
        valid=np.isfinite(VALUES),
        texts=[f"text {n}" for n in range(6)],
        failures=1,
        retries=0,
        error="",
        parts=parts,
        finite=np.ones(6, bool),
        part_retries={},
    )


def test_the_first_of_the_best_is_chosen_and_never_nan():
    values = np.array([[NAN, 0.5, 0.5], [0.2, NAN, 0.1], [NAN, NAN, NAN]])
    assert best_candidate(values).tolist() == [1, 0, 0]


def test_the_second_reader_is_reported():
    chosen, entry, rows = report_best(scores(ocr=VALUES, second_reader=SECOND), 2)
    assert rows.tolist() == [2, 1] and chosen.main == "second_reader"
    assert chosen.values.tolist() == [0.5, 0.3] and chosen.texts == ["text 2", "text 1"]
    assert chosen.parts["ocr"].tolist() == [0.7, 0.9] and chosen.failures == 0
    assert (entry["chosen_by"], entry["judged_by"]) == ("ocr", "second_reader")
    assert (entry["candidates"], entry["failed_candidates"]) == (3, 1)
    assert "chosen by ocr" in format_best(entry)


def test_with_one_reader_the_record_says_that_it_chose():
    chosen, entry, _ = report_best(scores(), 2)
    assert chosen.values.tolist() == [0.7, 0.9] and chosen.main == "ocr"
    assert entry["judged_by"] == entry["chosen_by"] == "ocr"
    assert "the same reader (ocr) chose" in format_best(entry)


def test_the_curve_takes_the_first_candidates():
    values, judged = VALUES.reshape(3, 2).T, SECOND.reshape(3, 2).T
    points = curve(values, judged)
    assert [p["candidates"] for p in points] == [1, 2, 3]
    assert [p["chooser"] for p in points] == pytest.approx([0.5, 0.8, 0.8])
    assert [p["judge"] for p in points] == pytest.approx([0.25, 0.4, 0.4])
    sizes = [p["candidates"] for p in curve(np.zeros((1, 8)), np.zeros((1, 8)))]
    assert sizes == [1, 2, 4, 8]
    assert math.isnan(curve(np.full((1, 1), NAN), np.zeros((1, 1)))[0]["chooser"])
