"""Scores batches of videos in worker processes while the accelerator works on something else.

    with RewardPool(functools.partial(OCRReward, rule="spelling"), workers=4) as pool:
        pending = pool.submit(videos, targets)      # returns at once
        ...                                         # sample the next batch
        scores = pending.result()                   # use scores.values[scores.valid]

`RewardPool` documents what happens to videos that cannot be scored. The worker processes are in
`rewards.scorers`.
"""

import concurrent.futures
import dataclasses
import logging
import pickle
import queue
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rewards.base import (
    NOT_REACHED,
    CompositeScore,
    Reward,
    RewardError,
    Score,
    check_frames,
    check_score,
    describe,
    last_line,
)
from rewards.scorers import LocalScorer, ProcessScorer, Scorer

log = logging.getLogger("rewards.pool")
MODES = ("process", "thread")
_MAX_LOGGED_KINDS = 20  # kinds of failures that a pool logs


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


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """The result of one video: a score or an error text."""

    score: Score | None
    error: str
    retries: int
    finished: float  # time.monotonic()


class PendingScores:
    """The future of one submitted batch.

    futures: one per video, for other ways of waiting, or to cancel videos that are still queued.
    """

    def __init__(self, futures: list[concurrent.futures.Future], submitted: float):
        self.futures, self._submitted = futures, submitted

    def done(self) -> bool:
        """Return whether every video of the batch is scored."""
        return all(future.done() for future in self.futures)

    def result(self, timeout: float | None = None) -> BatchScores:
        """Wait for the batch. Raises `TimeoutError` after `timeout` seconds, `RewardError` if the
        pool was closed first.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            # Not concurrent.futures.wait: it waits for ever for a future that a shutdown cancelled.
            outcomes: list[_Outcome] = [
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

    def _collect(self, outcomes: list[_Outcome]) -> BatchScores:
        scores = [outcome.score for outcome in outcomes]
        valid = np.array([score is not None for score in scores], bool)
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
            values=np.array([score.value if score else np.nan for score in scores], np.float64),
            valid=valid,
            texts=[score.text if score else "" for score in scores],
            parts={
                name: np.array([part.get(name, np.nan) for part in parts], np.float64)
                for name in dict.fromkeys(name for part in parts for name in part)
            },
            scores=scores,
            errors=[outcome.error for outcome in outcomes],
            failures=int((~valid).sum()),
            retries=sum(outcome.retries for outcome in outcomes),
            seconds=max(outcome.finished for outcome in outcomes) - self._submitted,
            part_errors=part_errors,
            part_retries=part_retries,
        )


class RewardPool:
    """A pool of `workers` copies of a reward, each of which scores one video at a time.

    Close the pool, or use it in a `with` statement. Otherwise Python scores everything that is
    queued before it exits.

    make_reward: builds the reward. With mode="process" it must be picklable and importable without
        JAX, like `functools.partial(OCRReward, rule="spelling")`; functions of the main script are
        not.
    workers: number of workers; 0 scores in the calling thread, inside `submit`.
    mode: "process" (next to a trainer) or "thread" (as fast for OCR, which releases the interpreter
        lock, and without processes; for tests, CPU runs and rewards of other machines).
    timeout: seconds for one video, after which its worker is killed; mode "process" only.

    A score that raises, is not finite, takes too long or kills its worker is tried once more, on a
    new worker if the worker died. Then the video is masked and counted. If a secondary reward of a
    composite (`rewards.composite`) fails, its own part is nan and the main score stays, also where
    it kills its worker. The first failure of each kind is logged. A reward that cannot be built
    raises `RewardError` here, at once. Values do not depend on the mode or on the number of
    workers, as long as the reward itself is deterministic.
    """

    def __init__(
        self,
        make_reward: Callable[[], Reward],
        workers: int = 0,
        mode: str = "process",
        timeout: float = 120.0,
    ):
        if mode not in MODES:
            raise ValueError(
                f"unknown mode {mode!r} of the reward pool: choose one of {', '.join(MODES)}"
            )
        if workers < 0:
            raise ValueError(f"workers={workers}: must be 0 or more")
        self.workers, self._closed = workers, False
        self._idle: queue.SimpleQueue[Scorer] = queue.SimpleQueue()
        self._logged_kinds: set[tuple[str, ...]] = set()
        self._executor = (
            concurrent.futures.ThreadPoolExecutor(workers, "reward") if workers else None
        )
        if mode == "process" and self._executor is not None:
            factory = self._pickle(make_reward)
            self._scorers = self._build(
                self._executor, [lambda: ProcessScorer(factory, timeout)] * workers
            )
        else:
            self._scorers = [LocalScorer(make_reward) for _ in range(max(workers, 1))]
        for scorer in self._scorers:
            self._idle.put(scorer)

    @staticmethod
    def _pickle(make_reward: Callable[[], Reward]) -> bytes:
        try:
            factory = pickle.dumps(make_reward)
        except Exception as error:  # pickling runs code of the factory, which may raise anything
            raise RewardError(
                f"reward factory {make_reward!r} cannot be sent to a worker process ({error}): "
                f"use a class, a module-level function or functools.partial of one, or "
                f"mode='thread'"
            ) from error
        if b"__main__" in factory:
            raise RewardError(
                f"reward factory {make_reward!r} is defined in the main script, which workers "
                f"do not import: move it to a module of its own, or use mode='thread'"
            )
        return factory

    @staticmethod
    def _build(
        executor: concurrent.futures.Executor, builders: list[Callable[[], Scorer]]
    ) -> list[Scorer]:
        """Start all workers at the same time. If one fails, stop the others and raise its error."""
        futures = [executor.submit(builder) for builder in builders]
        concurrent.futures.wait(futures)
        errors = [future.exception() for future in futures]
        failed = next(filter(None, errors), None)
        if failed is not None:
            for future, error in zip(futures, errors):
                if error is None:
                    future.result().close()
            executor.shutdown()
            raise failed
        return [future.result() for future in futures]

    def submit(self, videos: np.ndarray, records: Sequence[Any]) -> PendingScores:
        """Queue a batch for scoring and return its future.

        videos: uint8 [B, T, H, W, 3] RGB; do not write to it before the result is there. records: B
        records of the reward, for `OCRReward` the targets of each prompt: [("OPEN",), ...]. Raises
        `RewardError` if the pool is closed, `ValueError` for malformed arguments.
        """
        if self._closed:
            raise RewardError("the reward pool is closed: build a new one")
        if not isinstance(videos, np.ndarray) or videos.ndim != 5 or not len(videos):
            raise ValueError(
                f"videos must be a numpy array [B, T, H, W, 3] with B >= 1, got "
                f"{type(videos).__name__} {list(np.shape(videos))}"
            )
        check_frames(videos[0])
        if len(records) != len(videos):
            raise ValueError(
                f"{len(videos)} videos but {len(records)} records: give one for each video"
            )
        submitted = time.monotonic()
        futures = []
        for frames, record in zip(videos, records):
            if self._executor:
                futures.append(self._executor.submit(self._score, frames, record))
            else:
                futures.append(concurrent.futures.Future())
                futures[-1].set_result(self._score(frames, record))
        return PendingScores(futures, submitted)

    def _score(self, frames: np.ndarray, record: Any) -> _Outcome:
        """Score one video, in at most two attempts."""
        scorer = self._idle.get()  # never waits: there are as many scorers as threads
        error, partial = "", None
        try:
            for retries in (0, 1):
                try:
                    score = scorer.score(frames, record)
                    check_score(score)
                    for name, failure in getattr(score, "failed", ()):
                        self._log_once(f"reward {name}", failure)
                    return _Outcome(score, "", retries, time.monotonic())
                # Any error concerns this video alone: the batch goes on.
                except (Exception, SystemExit) as failure:
                    error = describe(failure)
                    if self._closed:
                        raise concurrent.futures.CancelledError from None
                    self._log_once("the reward", error)
                    partial = getattr(failure, "partial", None) or partial
            # The main reward has a score: a secondary reward ended the worker twice.
            if partial is not None:
                failed = tuple(
                    (name, error if text == NOT_REACHED else text) for name, text in partial.failed
                )
                partial = dataclasses.replace(partial, failed=failed)
            return _Outcome(partial, "" if partial else error, 1, time.monotonic())
        finally:
            self._idle.put(scorer)

    def _log_once(self, name: str, error: str) -> None:
        """Log the first failure of each kind. Failures are of one kind if they have the reward and
        the line of code, or else the message, in common.
        """
        places = re.findall(r'File "(.*)", line (\d+)', error)[-1:]
        kind = (
            name,
            *(places[0] if places else ()),
            re.sub(r"\d+", "", last_line(error)).partition(":")[0],
        )
        if kind not in self._logged_kinds and len(self._logged_kinds) < _MAX_LOGGED_KINDS:
            self._logged_kinds.add(kind)
            log.warning(
                "%s failed for a video; further failures like this are counted and not shown:\n%s",
                name,
                error,
            )

    def close(self) -> None:
        """Stop the workers. Videos that are still queued are dropped. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        if self._executor:
            self._executor.shutdown(wait=False, cancel_futures=True)
        for scorer in self._scorers:
            scorer.close()
        if self._executor:
            self._executor.shutdown(wait=True)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
