"""The scores of a batch of videos, and the future of them."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np

from rewards.base import Box, CompositeScore, RewardError, Score


@dataclasses.dataclass(frozen=True)
class BatchScores:
    """Scores of B videos. A video that could not be scored is masked: a value of 0 would teach the
    model that the video was bad.
    """

    values: np.ndarray  # float64 [B], nan where not valid
    valid: np.ndarray  # bool [B]
    texts: list[str]  # B texts that were read; "" where not valid
    # values of each reward of a composite, float64 [B]; nan where that reward failed
    parts: dict[str, np.ndarray]
    scores: list[Score | None]  # B complete scores; None where not valid
    errors: list[str]  # B texts, `base.describe` of the last attempt; "" where valid
    failures: int  # number of videos that are not valid
    retries: int  # number of second attempts, successful or not
    seconds: float  # from submit until the last score
    # of each secondary reward of a composite: its errors, and how often it was computed again
    part_errors: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    part_retries: dict[str, int] = dataclasses.field(default_factory=dict)
    # of each of B videos {judged frame: boxes of its text}; {} where the reward keeps none
    boxes: list[Mapping[int, tuple[Box, ...]]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one video: a score or an error text."""

    score: Score | None
    error: str
    retries: int
    finished: float  # time.monotonic()


class PendingScores:
    """The future of one submitted batch.

    futures: one per video, for other ways of waiting, or to cancel videos that are still queued.
    """

    def __init__(
        self,
        futures: list[concurrent.futures.Future],
        submitted: float,
        start: Callable[[], None] = lambda: None,
    ):
        self.futures, self._submitted, self._start = futures, submitted, start

    def done(self) -> bool:
        """Return whether every video of the batch is scored."""
        return all(future.done() for future in self.futures)

    def result(self, timeout: float | None = None) -> BatchScores:
        """Wait for the batch. Raises `TimeoutError` after `timeout` seconds, `RewardError` if the
        pool was closed first.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._start()  # groups that were not filled
        try:
            # Not concurrent.futures.wait: it waits for ever for a future that a shutdown cancelled.
            outcomes: list[Outcome] = [
                future.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
                for future in self.futures
            ]
        except concurrent.futures.CancelledError:
            raise RewardError(
                "the reward pool was closed before this batch was scored: take the result first"
            ) from None
        except TimeoutError:
            late = sum(not future.done() for future in self.futures)
            raise TimeoutError(
                f"{late} of {len(self.futures)} videos not scored within {timeout} s; "
                f"use more workers, fewer frames, or wait longer"
            ) from None
        return self._collect(outcomes)

    def _collect(self, outcomes: list[Outcome]) -> BatchScores:
        scores = [outcome.score for outcome in outcomes]
        values = np.array([score.value if score else np.nan for score in scores], np.float64)
        parts = [dict(score.parts) if score else {} for score in scores]
        part_errors: dict[str, list[str]] = {}
        part_retries: dict[str, int] = {}
        for score in scores:
            if isinstance(score, CompositeScore):
                for name, error in score.failed:
                    part_errors.setdefault(name, []).append(error)
                for name in score.retried:
                    part_retries[name] = part_retries.get(name, 0) + 1
        return BatchScores(
            values=values,
            valid=np.isfinite(values),
            texts=[score.text if score else "" for score in scores],
            parts={
                name: np.array([part.get(name, np.nan) for part in parts], np.float64)
                for name in dict.fromkeys(name for part in parts for name in part)
            },
            scores=scores,
            errors=[outcome.error for outcome in outcomes],
            failures=int(np.isnan(values).sum()),
            retries=sum(outcome.retries for outcome in outcomes),
            seconds=max(outcome.finished for outcome in outcomes) - self._submitted,
            part_errors=part_errors,
            part_retries=part_retries,
            boxes=[dict(zip(score.frames, score.boxes)) if score else {} for score in scores],
        )
