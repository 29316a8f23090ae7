"""Best of N: of N videos of a prompt, the one with the best main reward counts.

The maximum of N readings is too high, because it also chooses the errors of the reader. So the number
that is reported comes from `second_reader` (`reward.second_engine`), which does not choose; without
one the result says that the same reader chose.
"""

import dataclasses
from typing import Any

import numpy as np

from grpo.scoring.scores import GatheredScores
from grpo.settings.schema import SECOND_READER


def best_candidate(values: np.ndarray) -> np.ndarray:
    """Return the candidate with the highest value of each prompt, the first of equal ones: int [P].

    values: float64 [P, N]. A candidate that is nan is never chosen unless all are; then the first is.
    """
    return np.where(np.isnan(values), -np.inf, values).argmax(axis=1)


def curve(chosen_by: np.ndarray, judged_by: np.ndarray) -> list[dict[str, float]]:
    """Return the mean values for 1, 2, 4, ... and N candidates, the first ones of each prompt.

    chosen_by, judged_by: float64 [P, N], the values that choose and those that are reported. Each
    entry has `candidates`, `chooser` and `judge`: the means over the prompts that have the value, nan
    without any.
    """
    total = chosen_by.shape[1]
    sizes = [2**k for k in range(total.bit_length()) if 2**k < total]
    rows = np.arange(len(chosen_by))
    points = []
    for size in (*sizes, total):
        best = best_candidate(chosen_by[:, :size])
        points.append(
            {
                "candidates": size,
                "chooser": finite_mean(chosen_by[rows, best]),
                "judge": finite_mean(judged_by[rows, best]),
            }
        )
    return points


def finite_mean(values: np.ndarray) -> float:
    """Return the mean of the finite values, nan without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def report_best(
    scores: GatheredScores, prompts: int
) -> tuple[GatheredScores, dict[str, Any], np.ndarray]:
    """Choose a video of each prompt by the main reward.

    scores: of N x P videos; video n is of prompt n % P. prompts: P.

    Returns the scores of the chosen videos, with the values of the second reader as the main ones
    where there is one; the entry `best_of` of an evaluation's record; and the numbers of the chosen
    videos, int [P].
    """
    values = scores.values.reshape(-1, prompts).T
    judge = SECOND_READER if SECOND_READER in scores.parts else scores.main
    judged = scores.parts[judge] if judge != scores.main else scores.values
    rows = best_candidate(values) * prompts + np.arange(prompts)
    valid = np.isfinite(judged[rows])
    chosen = dataclasses.replace(
        scores,
        values=judged[rows],
        valid=valid,
        texts=[scores.texts[row] for row in rows],
        failures=int((~valid).sum()),
        parts={name: part[rows] for name, part in scores.parts.items()},
        finite=scores.finite[rows],
        main=judge,
    )
    entry = {
        "candidates": values.shape[1],
        "chosen_by": scores.main,
        "judged_by": judge,
        "failed_candidates": scores.failures,
        "curve": curve(values, judged.reshape(-1, prompts).T),
    }
    return chosen, entry, rows


def format_best(entry: dict[str, Any]) -> str:
    """Return the end of an evaluation's line about its choice of the best of N."""
    points = ", ".join(f"{p['candidates']}: {p['judge']:.3f}" for p in entry["curve"])
    chooser = f"chosen by {entry['chosen_by']}"
    if entry["judged_by"] == entry["chosen_by"]:
        chooser = f"the same reader ({entry['chosen_by']}) chose, so the numbers are too high"
    return f"; best of {points}; {chooser}"
