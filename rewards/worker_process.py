"""Program of one reward worker: `python -m rewards.worker_process FD`.

`rewards.scorers` starts it. FD is the inherited end of a socket pair that carries pickled objects,
one request and its replies at a time:

    request                                      replies
    first: (the parent's sys.path, factory)      ("ready", None) or ("failed", traceback)
    then:  (frames, record)                      ("score", Score) or ("failed", traceback);
                                                 before it, ("partial", Score) after each part of a
                                                 composite reward

The process ends when the parent closes its end of the pair.
"""

import functools
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


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


def score_video(parent: Connection, reward: Any, frames: Any, record: Any) -> Any:
    """Return the reward's score of a video. A composite reward also sends the parent a partial
    score after each of its parts.
    """
    if not hasattr(reward, "scores"):
        return reward.score(frames, record)
    for score in reward.scores(frames, record):
        parent.send(("partial", score))
    return score


def answer(parent: Connection, work: Callable, reply: str, send_result: bool) -> Any:
    """Receive one request, run `work(*request)`, send the reply and return the result; None if
    `work` raised an error.
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
        parent.send((reply, result if send_result else None))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except Exception:  # of the reward, or of pickling its score; the parent reports the traceback
        parent.send(("failed", traceback.format_exc()))
        return None
    return result


def main() -> None:
    """Build the reward, then score videos until the parent closes the socket pair."""
    # A signal to the whole job is for the parent to handle; the parent then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = Connection(int(sys.argv[1]))
    reward = answer(parent, build_reward, "ready", send_result=False)
    while reward is not None:
        answer(parent, functools.partial(score_video, parent, reward), "score", send_result=True)


if __name__ == "__main__":
    main()
