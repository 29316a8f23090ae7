"""The program of a worker process, by the messages of its protocol."""

import contextlib
import functools
import os
import pickle
import subprocess
import sys
from multiprocessing import Pipe

import numpy as np

from rewards.base import Score, Traits
from rewards.composite import CompositeReward
from tests.rewards import pool_rewards

FRAMES = np.full((2, 2, 2, 3), 7, np.uint8)


@contextlib.contextmanager
def worker(factory):
    """Run a worker of the reward; gives (the parent's end of the socket pair, the first reply)."""
    parent, child = Pipe()
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", "rewards.worker_process", str(child.fileno())],
        pass_fds=[child.fileno()],
        env=os.environ | {"PYTHONPATH": path},
    )
    child.close()
    try:
        parent.send((sys.path, pickle.dumps(factory)))
        yield parent, parent.recv()
    finally:
        parent.close()
        assert process.wait(timeout=30) == 0


def test_a_video_gets_one_reply():
    with worker(pool_rewards.Mean) as (parent, ready):
        assert ready == ("ready", Traits())
        for _ in range(2):
            parent.send(("score", FRAMES, "a"))
            assert parent.recv() == ("score", Score(7.0, "record a"))


def test_an_error_is_a_reply_and_the_worker_goes_on():
    with worker(pool_rewards.Mean) as (parent, _):
        parent.send(("score", FRAMES // 7, "a"))
        kind, text = parent.recv()
        assert kind == "failed" and "Traceback" in text and "cannot be judged" in text
        parent.send(("score", FRAMES, "a"))
        assert parent.recv()[0] == "score"


def test_a_composite_sends_what_it_has():
    factories = {"main": pool_rewards.Mean, "other": pool_rewards.Mean}
    with worker(functools.partial(CompositeReward, factories)) as (parent, _):
        parent.send(("score", FRAMES, "a"))
        replies = [parent.recv() for _ in range(3)]
    assert [kind for kind, _ in replies] == ["partial", "partial", "score"]
    partial, complete, score = (reply for _, reply in replies)
    assert [name for name, _ in partial.failed] == ["other"]
    assert complete == score and score.failed == ()
    assert score.parts == (("main", 7.0), ("other", 7.0))


def test_a_reward_that_cannot_be_built_is_a_reply():
    with worker(pool_rewards.broken_factory) as (_, (kind, text)):
        assert kind == "failed" and "the model file is missing" in text
