"""Scores batches of videos in worker processes while the accelerator works on something else.

    with RewardPool(functools.partial(OCRReward, rule="spelling"), workers=4) as pool:
        pending = pool.submit(videos, targets)      # returns at once
        ...                                         # sample the next batch
        scores = pending.result()                   # use scores.values[scores.valid]

`RewardPool` documents what happens to videos that cannot be scored. The worker processes are in
`rewards.scorers`.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import pickle
import queue
import re
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from rewards.base import (
    NOT_REACHED,
    Reward,
    RewardError,
    Score,
    check_frames,
    check_score,
    describe,
    last_line,
)
from rewards.batch_scores import Outcome, PendingScores
from rewards.scorers import LocalScorer, ProcessScorer, Scorer

log = logging.getLogger("rewards.pool")
MODES = ("process", "thread")
_MAX_LOGGED_KINDS = 20  # kinds of failures that a pool logs


@dataclasses.dataclass(frozen=True)
class _Video:
    """A video that waits for its score."""

    frames: np.ndarray
    record: Any
    future: concurrent.futures.Future


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
    batch: largest number of videos that a worker scores together, where the reward is batched.

    A score that raises, is not finite, takes too long or kills its worker is tried once more, on a
    new worker if the worker died. Then the video is masked and counted. If a secondary reward of a
    composite (`rewards.composite`) fails, its own part is nan and the main score stays, also where
    it kills its worker. The first failure of each kind is logged. A reward that cannot be built
    raises `RewardError` here, at once. Values do not depend on the mode or on the number of
    workers, as long as the reward itself is deterministic.

    With a groupwise reward the videos of a group are scored by one worker, in `group_size` times the
    timeout; a worker that dies twice masks its group.

    Attribute `traits`: those of the reward.
    """

    def __init__(
        self,
        make_reward: Callable[[], Reward],
        workers: int = 0,
        mode: str = "process",
        timeout: float = 120.0,
        batch: int = 1,
    ):
        if mode not in MODES:
            raise ValueError(
                f"unknown mode {mode!r} of the reward pool: choose one of {', '.join(MODES)}"
            )
        if workers < 0:
            raise ValueError(f"workers={workers}: must be 0 or more")
        self.workers, self._closed, self._batch = workers, False, batch
        self._jobs: collections.deque[list[_Video]] = collections.deque()
        self._groups: dict[Hashable, list[_Video]] = {}  # that wait for further videos
        self._lock = threading.Lock()  # of a worker that takes a job
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
        self.traits = self._scorers[0].traits
        self._batches = batch > 1 and self.traits.batched and not self.traits.groupwise
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

    def submit(
        self,
        videos: np.ndarray,
        records: Sequence[Any],
        groups: Sequence[Hashable] | None = None,
        group_size: int = 1,
    ) -> PendingScores:
        """Queue a batch for scoring and return its future.

        videos: uint8 [B, T, H, W, 3] RGB; do not write to it before the result is there. records: B
        records of the reward, for `OCRReward` the targets of each prompt: [("OPEN",), ...].
        groups: B names of the groups of the videos, which one worker scores together if the reward
        is groupwise: once `group_size` videos of a group were submitted, also in several batches, or
        else when the first result is asked for. Without it, each video is a group. Raises
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
        for i, (frames, record) in enumerate(zip(videos, records)):
            futures.append(concurrent.futures.Future())
            video = _Video(frames, record, futures[-1])
            if not self.traits.groupwise:
                self._start([video])
                continue
            key = object() if groups is None else groups[i]
            group = self._groups.setdefault(key, [])
            group.append(video)
            if len(group) >= (1 if groups is None else group_size):
                self._start(self._groups.pop(key))
        return PendingScores(futures, submitted, self._start_groups)

    def _start_groups(self) -> None:
        """Score the groups that wait for further videos."""
        while self._groups:
            self._start(self._groups.popitem()[1])

    def _start(self, job: "list[_Video]") -> None:
        """Queue videos that one worker scores together."""
        self._jobs.append(job)
        if self._executor:
            self._executor.submit(self._work)
        else:
            self._work()

    def _next_job(self) -> "list[_Video]":
        """Take the first job from the queue; with a batched reward also the next ones, as long as
        their videos have the same shape and there are at most `batch` videos. [] without any.
        """
        with self._lock:
            job = self._jobs.popleft() if self._jobs else []
            while (
                self._batches
                and self._jobs
                and len(job) + len(self._jobs[0]) <= self._batch
                and self._jobs[0][0].frames.shape == job[0].frames.shape
            ):
                job = job + self._jobs.popleft()
        return [video for video in job if video.future.set_running_or_notify_cancel()]

    def _work(self) -> None:
        """Score the next job, in at most two attempts, and set its futures."""
        job = self._next_job()
        if not job:
            return
        scorer = self._idle.get()  # never waits: there are as many scorers as threads
        try:
            if self.traits.groupwise or (self._batches and len(job) > 1):
                outcomes = self._score_together(scorer, job)
            else:
                outcomes = [self._score(scorer, job[0].frames, job[0].record)]
            for video, outcome in zip(job, outcomes):
                video.future.set_result(outcome)
        except BaseException as error:  # also CancelledError: whoever waits has to learn of it
            for video in job:
                if not video.future.done():
                    video.future.set_exception(error)
        finally:
            self._idle.put(scorer)

    def _score(self, scorer: Scorer, frames: np.ndarray, record: Any) -> Outcome:
        """Score one video, in at most two attempts."""
        error, partial = "", None
        for retries in (0, 1):
            try:
                score = scorer.score(frames, record)
                check_score(score)
                self._log_failed_parts(score)
                return Outcome(score, "", retries, time.monotonic())
            # Any error concerns this video alone: the batch goes on.
            except (Exception, SystemExit) as failure:
                error = self._describe(failure)
                partial = getattr(failure, "partial", None) or partial
        # The main reward has a score: a secondary reward ended the worker twice.
        if partial is not None:
            failed = tuple(
                (name, error if text == NOT_REACHED else text) for name, text in partial.failed
            )
            partial = dataclasses.replace(partial, failed=failed)
        return Outcome(partial, "" if partial else error, 1, time.monotonic())

    def _score_together(self, scorer: Scorer, job: "list[_Video]") -> list[Outcome]:
        """Score a group or a batch of videos. If any of them fails, all are scored once more, since
        the scores of a group depend on each other.
        """
        videos, records = [video.frames for video in job], [video.record for video in job]
        outcomes: list[Outcome] = []
        for retries in (0, 1):
            results: Sequence[Score | Exception]
            try:
                if self.traits.groupwise:
                    results = scorer.score_group(videos, records[0])
                else:
                    results = scorer.score_batch(videos, records)
            except (Exception, SystemExit) as failure:  # it concerns these videos alone
                results = [RewardError(self._describe(failure))] * len(job)
            outcomes = []
            for result in results:
                try:
                    if isinstance(result, Exception):
                        raise result
                    check_score(result)
                    self._log_failed_parts(result)
                    outcomes.append(Outcome(result, "", retries, time.monotonic()))
                except Exception as failure:  # of this video
                    outcomes.append(Outcome(None, self._describe(failure), 1, time.monotonic()))
            if all(outcome.score is not None for outcome in outcomes):
                break
        return outcomes

    def _describe(self, failure: BaseException) -> str:
        """Return the error text of a failed score, and log it. Raises `CancelledError` if the pool
        was closed, which is why the score failed.
        """
        if self._closed:
            raise concurrent.futures.CancelledError from None
        error = describe(failure)
        self._log_once("the reward", error)
        return error

    def _log_failed_parts(self, score: Score) -> None:
        for name, failure in getattr(score, "failed", ()):
            self._log_once(f"reward {name}", failure)

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
        with self._lock:
            waiting = [*self._jobs, *self._groups.values()]
            self._jobs.clear()
            self._groups.clear()
        for job in waiting:
            for video in job:
                video.future.cancel()
        for scorer in self._scorers:
            scorer.close()
        if self._executor:
            self._executor.shutdown(wait=True)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
