"""Program of one reward worker: `python -m rewards.worker_process FD [FRAMES]`.

`rewards.scorers` starts it. FD is the inherited end of a socket pair that carries pickled objects,
one request and its replies at a time. With FRAMES, a descriptor of shared memory, requests have the
places of videos there (`rewards.shared_frames`) instead of the videos:

    request                                      replies
    first: (the parent's sys.path, factory)      ("ready", Traits) or ("failed", error)
    then:  ("score", frames, record)             ("score", Score) or ("failed", error);
                                                 before it, ("partial", Score) after each part of a
                                                 composite reward
           ("score_group", videos, record)       ("score", a Score or an error for each video) or
           ("score_batch", videos, records)      ("failed", error)

An error is the message of a `RewardError`, or else a traceback.

The process ends when the parent closes its end of the pair.
"""

import functools
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rewards.base import Traits, describe
from rewards.shared_frames import SharedFrames


def build_reward(paths: list[str], factory: bytes) -> Any:
    """Build this worker's reward. The pickled `factory` is loaded after `sys.path` is set, so that
    its module can be imported.
    """
    sys.path[:] = paths
    try:
        import cv2
    except ImportError:  # the reward does not use OpenCV
        pass
    else:
        cv2.setNumThreads(1)
    return pickle.loads(factory)()


def score_videos(
    parent: Connection,
    shared: SharedFrames | None,
    reward: Any,
    method: str,
    videos: Any,
    record: Any,
) -> Any:
    """Return what a method of the reward returns. videos: one or several, or their places in the
    shared memory. A composite reward that scores one video also
    sends the parent a partial score after each of its parts.
    """
    if shared is not None:
        videos = shared.get(videos)
    if method != "score" or not hasattr(reward, "scores"):
        return getattr(reward, method)(videos, record)
    for score in reward.scores(videos, record):
        parent.send(("partial", score))
    return score


def answer(
    parent: Connection, work: Callable, reply: str, result_of: Callable = lambda result: result
) -> Any:
    """Receive one request, run `work(*request)`, send (reply, result_of(result)) and return the
    result; None if `work` raised an error.
    """
    try:
        request = parent.recv()
    except (EOFError, OSError):
        # The parent closed the pool or died. Finalisers are skipped: there is nothing to save, and
        # those of native libraries may hang or print errors (PaddlePaddle's "FatalError:
        # Termination signal").
        os._exit(0)
    try:
        result = work(*request)
        parent.send((reply, result_of(result)))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except Exception as error:  # of the reward, or of pickling its score; the parent reports it
        parent.send(("failed", describe(error)))
        return None
    return result


def main() -> None:
    """Build the reward, then score videos until the parent closes the socket pair."""
    # A signal to the whole job is for the parent to handle; the parent then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = Connection(int(sys.argv[1]))
    shared = SharedFrames(int(sys.argv[2])) if len(sys.argv) > 2 else None
    reward = answer(parent, build_reward, "ready", Traits.of)
    while reward is not None:
        answer(parent, functools.partial(score_videos, parent, shared, reward), "score")


if __name__ == "__main__":
    main()
