"""Scores and frames that are malformed, and the texts of errors."""

import numpy as np
import pytest

from rewards.base import (
    RewardError,
    Score,
    check_frames,
    check_score,
    describe,
    import_problem,
    last_line,
)


@pytest.mark.parametrize(
    "score",
    [
        None,
        0.5,
        Score("0.5"),
        Score(float("inf")),
        Score(0.5, text=b"x"),
        Score(0.5, parts=5),
        Score(0.5, parts=(("a", 1, 2),)),
        Score(0.5, parts=(("a", "1"),)),
        Score(np.zeros(2)),
    ],
)
def test_malformed_scores_are_refused(score):
    with pytest.raises(RewardError):
        check_score(score)


def test_scores_of_numpy_are_taken():
    check_score(Score(np.float32(0.5), parts=(("a", np.float64("nan")), ("b", 1))))


def test_an_error_is_never_empty():
    assert (
        describe(RewardError("")) == "RewardError"
        and last_line(describe(ValueError())) == "ValueError"
    )


def test_an_unexpected_error_is_described_by_its_traceback():
    try:
        raise ValueError("no frames")
    except ValueError as error:
        text = describe(error)
    assert "test_base.py" in text and last_line(text) == "ValueError: no frames"
    assert describe(RewardError("no frames")) == "no frames"


@pytest.mark.parametrize(
    "frames, value",
    [
        ([[0]], "list"),
        (np.zeros((1, 2, 2, 3), np.float32), "float32"),
        (np.zeros((2, 2, 3), np.uint8), r"\[2, 2, 3\]"),
        (np.zeros((1, 2, 2, 4), np.uint8), r"\[1, 2, 2, 4\]"),
        (np.zeros((0, 2, 2, 3), np.uint8), r"\[0, 2, 2, 3\]"),
    ],
)
def test_malformed_frames_are_refused(frames, value):
    check_frames(np.zeros((1, 2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match=value):
        check_frames(frames)


@pytest.mark.parametrize(
    "error, text",
    [
        (ModuleNotFoundError("No module named 'rapidocr'"), "is missing (No module"),
        (ImportError("/x/state.so: failed to map segment from shared object"), "not enough memory"),
        (
            ImportError("libx.so: cannot create shared object descriptor: Cannot allocate memory"),
            "not enough memory",
        ),
        (
            ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
            "cannot be loaded (libgomp",
        ),
        (ImportError("libGL.so.1: cannot open shared object file"), "cannot be loaded (libGL"),
    ],
)
def test_import_problem(error, text):
    problem = import_problem("OCR engine 'x'", error, "pip install x")
    assert problem.startswith("OCR engine 'x' ") and text in problem and str(error) in problem
    assert ("pip install x" in problem) != ("ulimit -v" in problem)
