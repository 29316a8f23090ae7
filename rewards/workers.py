"""Scores batches of videos in worker processes while the accelerator does something else.

    with RewardPool(functools.partial(OCRReward, rule="spelling"), workers=4) as pool:
        pending = pool.submit(videos, targets)      # returns at once
        ...                                         # sample the next batch
        scores = pending.result()                   # scores.values[scores.valid] can be trusted

Why not `multiprocessing` or `ProcessPoolExecutor`: fork is unsafe once an accelerator runtime is
loaded, and spawn and forkserver import the parent's main module in every child, which for a trainer
means importing JAX (seconds, hundreds of MB, and perhaps a grab at the device). A worker here is a
plain subprocess, `python -m rewards.worker_main`, that imports this package and the module of the
reward factory and nothing else; it survives or dies alone, and ends by itself when the trainer
does, however that dies. Measured: a worker with RapidOCR is ready after 1.2 s and holds 190 MB.
"""

import concurrent.futures
import dataclasses
import logging
import os
import pathlib
import pickle
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from typing import Any, Protocol

import numpy as np

from rewards.base import (
    NOT_REACHED,
    CombinedScore,
    Reward,
    RewardError,
    Score,
    check_frames,
    check_score,
    describe,
    last_line,
)

log = logging.getLogger("rewards.workers")
MODES = ("process", "thread", "inline")
_START_TIMEOUT = 300.0  # seconds to import and load the models, on a busy network disk too
_MOST_SHOWN = 20  # kinds of failures that a pool logs
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


@dataclasses.dataclass(frozen=True)
class BatchScores:
    """Scores of B videos. A video that could not be scored is masked: a value of 0 would teach that
    it was bad.
    """

    values: np.ndarray  # float64 [B], nan where not valid
    valid: np.ndarray  # bool [B]
    texts: list[str]  # B, what was read; "" where not valid
    parts: dict[str, np.ndarray]  # of several rewards, float64 [B] each; nan where that one failed
    scores: list[Score | None]  # B, the whole scores; None where not valid
    errors: list[str]  # B, `base.describe` of the last attempt; "" where valid
    failures: int  # videos that are not valid
    retries: int  # second attempts, successful or not
    seconds: float  # from submit until the last score
    # of several rewards, what each one beside the main one failed with, and how often it was tried
    # again
    part_errors: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    part_retries: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    score: Score | None
    error: str
    retries: int
    finished: float  # time.monotonic()


class PendingScores:
    """The future of one submitted batch.

    futures: one for each video, to wait for them in another way, or to cancel those that have not
    begun.
    """

    def __init__(self, futures: list[concurrent.futures.Future], submitted: float):
        self.futures, self._submitted = futures, submitted

    def done(self) -> bool:
        return all(future.done() for future in self.futures)

    def result(self, timeout: float | None = None) -> BatchScores:
        """Waits for the batch; `TimeoutError` after `timeout` seconds, `RewardError` if the pool
        was closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            # Not concurrent.futures.wait: it waits for ever for a future that was cancelled by a
            # shutdown.
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
        scores = [outcome.score for outcome in outcomes]
        valid = np.array([score is not None for score in scores], bool)
        found = [dict(score.parts) if score else {} for score in scores]
        part_errors: dict[str, list[str]] = {}
        part_retries: dict[str, int] = {}
        for score in scores:
            if isinstance(score, CombinedScore):
                for name, error in score.failed:
                    part_errors.setdefault(name, []).append(error)
                for name in score.retried:
                    part_retries[name] = part_retries.get(name, 0) + 1
        return BatchScores(
            part_errors=part_errors,
            part_retries=part_retries,
            parts={
                name: np.array([part.get(name, np.nan) for part in found], np.float64)
                for name in dict.fromkeys(name for part in found for name in part)
            },
            values=np.array([score.value if score else np.nan for score in scores], np.float64),
            valid=valid,
            texts=[score.text if score else "" for score in scores],
            scores=scores,
            errors=[outcome.error for outcome in outcomes],
            failures=int((~valid).sum()),
            retries=sum(outcome.retries for outcome in outcomes),
            seconds=max(outcome.finished for outcome in outcomes) - self._submitted,
        )


class _Scorer(Protocol):
    """One place where videos are scored, one at a time."""

    def score(self, frames: np.ndarray, record: Any) -> Score: ...
    def close(self) -> None: ...


class _WorkerLost(RewardError):
    """A worker died or was killed; `partial` is the score as far as it came, or None."""

    def __init__(self, message: str, partial: CombinedScore | None):
        super().__init__(message)
        self.partial = partial


class _LocalScorer:
    """A reward in this process. One that waits for others has a `close` of its own, which ends the
    waiting.
    """

    def __init__(self, make_reward: Callable[[], Reward]):
        reward = make_reward()
        self.score, self.close = reward.score, getattr(reward, "close", lambda: None)


class _ProcessScorer:
    """A reward in a subprocess, which is replaced when it dies."""

    def __init__(self, factory: bytes, timeout: float):
        self._factory, self._timeout, self._closed = factory, timeout, False
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()  # starting and closing exclude each other
        self._start()

    def score(self, frames: np.ndarray, record: Any) -> Score:
        if self._process.poll() is not None:
            self._start()
        return self._ask((frames, record), self._timeout, "score one video")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._kill()

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise RewardError("the reward pool is closed")
            self._kill()
            self._socket, theirs = Pipe()  # dropping the old socket closes it
            package_parent = str(pathlib.Path(__file__).resolve().parent.parent)
            path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rewards.worker_main", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what libraries print must not mix with the trainer's own output
                start_new_session=True,  # Ctrl-C in the terminal reaches the trainer only
                env=os.environ | _ONE_THREAD | {"PYTHONPATH": path},
            )
            theirs.close()
        paths = [os.path.abspath(entry) for entry in sys.path]
        try:
            self._ask((paths, self._factory), _START_TIMEOUT, "start")
        except RewardError:
            self._kill()  # of no use without a reward; the next video starts anew
            raise

    def _kill(self) -> None:
        """Also ends a `send` or `recv` that another thread is blocked in."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: tuple, timeout: float, what: str) -> Any:
        """Sends a request and waits for the answer. Every way to fail is a `RewardError` that says
        how.
        """
        process, expired, partial = self._process, threading.Event(), None

        def expire():
            expired.set()
            process.kill()  # ends a blocked send as well as a blocked receive

        timer = threading.Timer(timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            self._socket.send(request)
            kind, answer = self._socket.recv()
            while kind == "partial":
                partial = answer
                kind, answer = self._socket.recv()
        except (EOFError, OSError) as error:
            process.kill()
            code = process.wait()
            cause = (
                f"took longer than {timeout} s"
                if expired.is_set()
                else f"died with exit code {code}"
            )
            raise _WorkerLost(
                f"reward worker {process.pid} {cause} when it was to {what}", partial
            ) from error
        finally:
            timer.cancel()
            timer.join()
        if kind == "failed":
            raise RewardError(f"reward worker {process.pid} failed to {what}:\n{answer}")
        return answer


class RewardPool:
    """`workers` copies of a reward, each scoring one video at a time. Close it, or use it in a
    `with` statement: otherwise Python scores all that is queued before it exits.

    make_reward: builds the reward. With mode="process" it must be picklable and importable without
    JAX, as
        `functools.partial(OCRReward, rule="spelling")` is; functions of the main script are not.
    workers: 0 scores in the calling thread, inside `submit`. mode: "process" (beside a trainer),
    "thread" (as fast for OCR, which leaves the interpreter lock alone,
        and without processes; for tests and CPU runs), or "inline" (the same as workers=0).
    timeout: seconds for one video, after which its worker is killed; mode "process" only.

    A score that raises, is not finite, takes too long or kills its worker is tried once more, on a
    fresh worker if it died, and then masked and counted. Of several rewards (`rewards.composite`)
    one beside the main one leaves nan in its own part, also where it kills its worker. The first
    failure of a kind is logged. A reward that cannot even be built raises here, at once. Values do
    not depend on the mode or on the number of workers, as long as the reward itself is
    deterministic.
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
        if workers < 0 or (mode == "inline" and workers > 0):
            raise ValueError(
                f"workers={workers} with mode={mode!r}: must be 0 or more, and 0 if inline"
            )
        self.workers, self._closed = workers, False
        self._idle: queue.SimpleQueue[_Scorer] = queue.SimpleQueue()
        self._shown: set[tuple[str, ...]] = set()  # kinds of failures that were logged
        self._executor = (
            concurrent.futures.ThreadPoolExecutor(workers, "reward") if workers else None
        )
        if mode == "process" and workers:
            factory = self._pickle(make_reward)
            self._scorers = self._build([lambda: _ProcessScorer(factory, timeout)] * workers)
        else:
            self._scorers = [_LocalScorer(make_reward) for _ in range(max(workers, 1))]
        for scorer in self._scorers:
            self._idle.put(scorer)

    @staticmethod
    def _pickle(make_reward: Callable[[], Reward]) -> bytes:
        try:
            factory = pickle.dumps(make_reward)
        except Exception as error:
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

    def _build(self, builders: list[Callable[[], _Scorer]]) -> list[_Scorer]:
        """Starts all workers at the same time; if one fails, stops the others and raises."""
        futures = [self._executor.submit(builder) for builder in builders]
        concurrent.futures.wait(futures)
        failed = [future.exception() for future in futures if future.exception()]
        if failed:
            for future in futures:
                if not future.exception():
                    future.result().close()
            self._executor.shutdown()
            raise failed[0]
        return [future.result() for future in futures]

    def submit(self, videos: np.ndarray, records: Sequence[Any]) -> PendingScores:
        """Queues a batch. `videos` uint8 [B, T, H, W, 3] RGB, not to be written to until the result
        is there; `records` B of what the reward takes, for `OCRReward` the targets of each prompt:
        [("OPEN",), ...].
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
        scorer = self._idle.get()  # never waits: there are as many scorers as threads
        error, partial = "", None
        try:
            for retries in (0, 1):
                try:
                    score = scorer.score(frames, record)
                    check_score(score)
                    for name, failure in getattr(score, "failed", ()):
                        self._show(f"reward {name}", failure)
                    return _Outcome(score, "", retries, time.monotonic())
                # whatever it is, it concerns this video alone
                except (Exception, SystemExit) as failure:
                    error = describe(failure)
                    if self._closed:
                        raise concurrent.futures.CancelledError from None
                    self._show("the reward", error)
                    partial = getattr(failure, "partial", None) or partial
            # the main reward has a score: one after it ended the worker twice
            if partial is not None:
                failed = tuple(
                    (name, error if text == NOT_REACHED else text) for name, text in partial.failed
                )
                partial = dataclasses.replace(partial, failed=failed)
            return _Outcome(partial, "" if partial else error, 1, time.monotonic())
        finally:
            self._idle.put(scorer)

    def _show(self, name: str, error: str) -> None:
        """Logs the first failure of each kind: of one reward, raised at one place or with one
        message.
        """
        places = re.findall(r'File "(.*)", line (\d+)', error)[-1:]
        kind = (
            name,
            *(places[0] if places else ()),
            re.sub(r"\d+", "", last_line(error)).partition(":")[0],
        )
        if kind not in self._shown and len(self._shown) < _MOST_SHOWN:
            self._shown.add(kind)
            log.warning(
                "%s failed for a video; further failures like this are counted and not shown:\n%s",
                name,
                error,
            )

    def close(self) -> None:
        """Stops the workers. Videos that wait for one are dropped. Closing twice does nothing."""
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
