"""Rewards that break at a chosen moment of a run, importable by worker processes."""

import contextlib
import functools
import hashlib
import os
import pathlib
import time

from rewards.base import Score
from rewards.composite import CompositeReward
from tests.rewards.pool_rewards import Brightness

PHASE = "phase"  # file in the test's folder: what the run does now, as `hosts.stage` names it


def enter(folder: pathlib.Path, phase: str) -> None:
    """Write the phase, whole at any time."""
    (folder / f"{PHASE}.part").write_text(phase)
    os.replace(folder / f"{PHASE}.part", folder / PHASE)


def fail(kind: str) -> Score:
    if kind == "raises":
        raise ValueError("the scorer is broken")
    if kind == "hangs":
        time.sleep(60)
    if kind == "dies":
        os._exit(3)
    return Score(float("nan"))  # kind "nan"


class Faulty:
    """`Brightness`, which fails in the way `kind` for all videos of the phases that begin with
    `when`, or with `once` for one of them, at every try.
    """

    def __init__(self, folder: str, kind: str, when: str, once: bool = False):
        self.folder, self.kind, self.when, self.once = pathlib.Path(folder), kind, when, once

    def score(self, frames, record):
        if (self.folder / PHASE).read_text().startswith(self.when) and (
            not self.once or self.chosen(frames)
        ):
            return fail(self.kind)
        return Brightness().score(frames, record)

    def chosen(self, frames) -> bool:
        """Whether it is the video that came first."""
        mine = self.folder / hashlib.sha256(frames.tobytes()).hexdigest()
        mine.touch()
        with contextlib.suppress(FileExistsError):
            os.symlink(mine, self.folder / "chosen")
        return os.readlink(self.folder / "chosen") == str(mine)


def alone(folder: str, kind: str, when: str, once: bool):
    return Faulty(folder, kind, when, once)


def beside(folder: str, kind: str, when: str, once: bool):
    """The main reward is sound, another one is faulty."""
    return CompositeReward(
        {"ocr": Brightness, "sharpness": functools.partial(Faulty, folder, kind, when, once)}
    )
