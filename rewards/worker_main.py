"""One reward worker process: `python -m rewards.worker_main FD`, started by `rewards.workers`.

FD is the inherited end of a socket pair that carries pickled objects, one request and one reply at
a time:

    first  (sys.path of the parent, pickled factory)  ->  ("ready", None)   or  ("failed",
           traceback)
    then   (frames, record)                           ->  ("score", Score)  or  ("failed",
           traceback),
                                                          before it ("partial", Score) after each of
                                                          several rewards
    end of file                                       ->  the process ends
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


def build(paths: list[str], factory: bytes) -> Any:
    """The reward of this worker. `factory` is unpickled only here, where its module can be found."""
    sys.path[:] = paths
    try:
        import cv2
    except ImportError:  # a reward that does not use OpenCV
        pass
    else:
        cv2.setNumThreads(1)
    return pickle.loads(factory)()


def answer(parent: Connection, work: Callable, done: str, send_result: bool) -> Any:
    """Receives one request, does `work(*request)`, replies and returns the result, None if that
    failed.
    """
    result = None
    try:
        request = parent.recv()
    except (EOFError, OSError):
        # The parent closed the pool or died. Finalisers are skipped: there is nothing to save, and
        # those of native libraries may hang or print errors (PaddlePaddle's "FatalError:
        # Termination signal").
        os._exit(0)
    try:
        result = work(*request)
        parent.send((done, result if send_result else None))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except Exception:  # of the reward, or of pickling what it returned
        parent.send(("failed", traceback.format_exc()))
        return None
    return result


def score(parent: Connection, reward: Any, frames: Any, record: Any) -> Any:
    """The reward's score of a video. What several rewards have found so far is sent at once."""
    if not hasattr(reward, "scores"):
        return reward.score(frames, record)
    for found in reward.scores(frames, record):
        parent.send(("partial", found))
    return found


def main() -> None:
    # the parent's to handle, also where they reach the whole job: it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # closes the socket
    parent = Connection(int(sys.argv[1]))
    reward = answer(parent, build, "ready", send_result=False)
    while reward is not None:
        answer(parent, functools.partial(score, parent, reward), "score", send_result=True)


if __name__ == "__main__":
    main()
