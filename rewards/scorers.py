"""Scorers: the places where a `RewardPool` scores videos, in this process or in a subprocess.

Why not `multiprocessing` or `ProcessPoolExecutor`: fork is unsafe once an accelerator runtime is
loaded, and spawn and forkserver import the parent's main module in every child. For a trainer that
means importing JAX: seconds, hundreds of MB, and possibly the use of the device. A worker here is a
plain subprocess, `python -m rewards.worker_process`, which imports this package and the module of
the reward's factory and nothing else. It ends by itself when its parent does, also when the parent
is killed. Measured: a worker with RapidOCR is ready after 1.2 s and uses 190 MB.
"""

import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from typing import Any, Protocol

import numpy as np

from rewards.base import CompositeScore, Reward, RewardError, Score, Traits
from rewards.shared_frames import SharedFrames

_START_TIMEOUT = 300.0  # seconds to import and to load the models, also from a slow network disk
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Scorer(Protocol):
    """Scores one video at a time, or several where the reward's traits allow it."""

    traits: Traits

    def score(self, frames: np.ndarray, record: Any, /) -> Score:
        """Score one video, as `Reward.score`."""
        ...

    def score_group(self, videos: Sequence[np.ndarray], record: Any, /) -> list[Score | Exception]:
        """Score the videos of one prompt: a score or an error for each."""
        ...

    def score_batch(
        self, videos: Sequence[np.ndarray], records: Sequence[Any], /
    ) -> list[Score | Exception]:
        """Score videos of any prompts: a score or an error for each."""
        ...

    def close(self) -> None:
        """Release the scorer, and end a `score` that is under way where that is possible."""
        ...


class WorkerLost(RewardError):
    """A worker process that died or was killed while it scored.

    partial: the score of the composite's parts that were complete, or None.
    """

    def __init__(self, message: str, partial: CompositeScore | None):
        super().__init__(message)
        self.partial = partial


class LocalScorer:
    """A reward in this process. A reward that waits for other machines has a `close` of its own,
    which ends the waiting.
    """

    def __init__(self, make_reward: Callable[[], Reward]):
        reward: Any = make_reward()
        self.traits = Traits.of(reward)
        self.score, self.close = reward.score, getattr(reward, "close", lambda: None)
        if self.traits.groupwise:
            self.score_group = reward.score_group
        if self.traits.batched:
            self.score_batch = reward.score_batch


class ProcessScorer:
    """A reward in a subprocess, which is replaced when it dies.

    factory: the pickled factory of the reward. timeout: seconds for one video, after which the
    subprocess is killed. Raises `RewardError` when the reward cannot be built.
    """

    def __init__(self, factory: bytes, timeout: float):
        self._factory, self._timeout, self._closed = factory, timeout, False
        self._process: subprocess.Popen | None = None
        self._frames = SharedFrames.create()
        self._lock = threading.Lock()  # starting and closing exclude each other
        self.traits = Traits()
        self._start()

    def score(self, frames: np.ndarray, record: Any) -> Score:
        """Score one video. Raises `RewardError`, or `WorkerLost` when the subprocess ended."""
        return self._score("score", frames, record, 1)

    def score_group(self, videos: Sequence[np.ndarray], record: Any) -> list[Score | Exception]:
        """Score the videos of one prompt, in as many times the timeout. Raises as `score` does."""
        return self._score("score_group", videos, record, len(videos))

    def score_batch(
        self, videos: Sequence[np.ndarray], records: Sequence[Any]
    ) -> list[Score | Exception]:
        """Score videos of any prompts, in as many times the timeout. Raises as `score` does."""
        return self._score("score_batch", videos, records, len(videos))

    def _score(self, method: str, videos: Any, record: Any, count: int) -> Any:
        assert self._process is not None  # `_start` set it
        if self._process.poll() is not None:
            self._start()
        if self._frames is not None:
            videos = self._frames.put(videos)
        purpose = "score one video" if method == "score" else f"score {count} videos"
        return self._request((method, videos, record), count * self._timeout, purpose)

    def close(self) -> None:
        """Kill the subprocess. A `score` in another thread raises at once."""
        with self._lock:
            self._closed = True
            self._kill()

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise RewardError("the reward pool is closed")
            self._kill()
            self._socket, child_socket = Pipe()  # dropping the previous socket closes it
            package_parent = str(pathlib.Path(__file__).resolve().parent.parent)
            path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
            fds = [child_socket.fileno()] + ([self._frames.fd] if self._frames else [])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rewards.worker_process", *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what libraries print must not mix with the trainer's own output
                start_new_session=True,  # Ctrl-C in the terminal reaches the trainer only
                env=os.environ | _ONE_THREAD | {"PYTHONPATH": path},
            )
            child_socket.close()
        paths = [os.path.abspath(entry) for entry in sys.path]
        try:
            self.traits = self._request((paths, self._factory), _START_TIMEOUT, "start")
        except RewardError:
            self._kill()  # useless without a reward; the next video starts a new one
            raise

    def _kill(self) -> None:
        """Kill the subprocess, which also ends a `send` or `recv` that blocks another thread."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _request(self, request: tuple, timeout: float, purpose: str) -> Any:
        """Send a request and wait for the answer. Every failure is a `RewardError` that names its
        cause. purpose: completes "could not ..." in messages. Only the wait for the answer is timed:
        with shared frames a request is smaller than what the socket holds.
        """
        process, expired = self._process, False
        assert process is not None  # `_start` set it
        kind, answer, partial = "partial", None, None
        deadline = time.monotonic() + timeout
        try:
            self._socket.send(request)
            while kind == "partial":
                partial = answer
                expired = not self._socket.poll(max(0.0, deadline - time.monotonic()))
                if expired:
                    raise TimeoutError
                kind, answer = self._socket.recv()
        except (EOFError, OSError) as error:
            process.kill()
            code = process.wait()
            if expired:
                cause = f"took longer than {timeout} s"
            else:
                cause = f"died with exit code {code}"
            raise WorkerLost(
                f"reward worker {process.pid} {cause} and could not {purpose}", partial
            ) from error
        if kind == "failed":
            raise RewardError(f"reward worker {process.pid} failed to {purpose}:\n{answer}")
        return answer
