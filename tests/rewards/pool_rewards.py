"""Rewards for the tests, importable by worker processes. Most give the mean of the frames, and
misbehave in a way of their own.
"""

import dataclasses
import os
import pathlib
import signal
import sys
import time

import numpy as np

from rewards.base import Score


class Mean:
    """The mean of the frames. If the first pixel is 1, a subclass may do something else.

    folder: for the file that "once" needs.
    """

    def __init__(self, folder="."):
        self.marks = pathlib.Path(folder)

    def score(self, frames, record):
        if frames.flat[0] == 1 and record is not None and self.misbehaves(record):
            return self.misbehave()
        return Score(float(frames.mean()), f"record {record}")

    def misbehaves(self, record):
        """Always, or with the record "once" at the first attempt only; a file remembers it across
        processes.
        """
        if record != "once":
            return True
        try:
            (self.marks / "tried").touch(exist_ok=False)
            return True
        except FileExistsError:
            return False

    def misbehave(self):
        raise ValueError("this video cannot be judged")


class Broken(Mean):
    def score(self, frames, record):
        return self.misbehave()


class Brightness:
    """A sum in which every pixel counts, so that equal values mean equal videos."""

    def score(self, frames, record):
        weights = 1 + np.arange(frames.size).reshape(frames.shape) % 251
        return Score(float((frames * weights).sum() / (255 * weights.sum())), str(frames.flat[0]))


class Boxed(Brightness):
    """Its boxes grow with the brightness; every third frame has none."""

    def score(self, frames, record):
        score, judged = super().score(frames, record), tuple(range(0, len(frames), 2))
        side = 0.25 + score.value / 2
        boxes = tuple(() if i % 3 == 2 else ((0.0, 0.0, side, 0.5),) for i in judged)
        return dataclasses.replace(score, frames=judged, boxes=boxes)


class Reader:
    """Gives its record as the text of every frame."""

    def score(self, frames, record):
        return Score(1.0, record, frame_texts=(record,) * len(frames))


class Targets:
    """Gives the targets as its text."""

    def score(self, frames, record):
        return Score(1.0, " ".join(record))


class Dies(Mean):
    def misbehave(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Hangs(Mean):
    def misbehave(self):
        time.sleep(60)


class NotFinite(Mean):
    def misbehave(self):
        return Score(float("nan"))


class Unpicklable(Mean):
    def misbehave(self):
        return Score(1.0, text=lambda: None)


class Interrupted(Mean):
    def misbehave(self):
        os.kill(os.getpid(), signal.SIGINT)
        return Score(7.0)


class Slow(Mean):
    def score(self, frames, record):
        time.sleep(0.5)
        return Score(1.0)


class SlowToBuild(Mean):
    def __init__(self):
        print("building", flush=True)
        time.sleep(3)


class Environment:
    """Reports the id, the imported packages and the environment of its process."""

    def score(self, frames, record):
        loaded = [name for name in ("jax", "jaxlib", "flax", "torch") if name in sys.modules]
        return Score(float(os.getpid()), f"{loaded} OMP={os.environ.get('OMP_NUM_THREADS')}")


def broken_factory():
    raise OSError("the model file is missing")
