"""Frames in memory that a worker process shares with its parent.

A pickled video is copied five times on its way through a socket, twice by the parent's Python. Here
the parent copies it once into anonymous memory, and the worker copies it once out of it, so that a
reward may keep its frames. The memory is a file without a name (`memfd_create`), not /dev/shm, which containers
limit to 64 MB. Where the system has none, frames are pickled.
"""

import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Place(NamedTuple):
    """The place of a video in the memory. offset: in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class SharedFrames:
    """The memory of one worker, as large as the largest request. It is released with this object.

    fd: its file descriptor.
    """

    def __init__(self, fd: int):
        self.fd = fd
        weakref.finalize(self, os.close, fd)

    @classmethod
    def create(cls) -> "SharedFrames | None":
        """Return new memory; None where the system has no anonymous files."""
        create = getattr(os, "memfd_create", None)
        return cls(create("frames")) if create else None

    def put(self, videos: Any) -> Any:
        """Copy a video, or several, into the memory. Returns its place, or their places."""
        if isinstance(videos, np.ndarray):
            return self._put([videos])[0]
        return self._put(videos)

    def _put(self, videos: Sequence[np.ndarray]) -> list[Place]:
        ends = np.cumsum([video.nbytes for video in videos]).tolist()
        if ends[-1] > os.fstat(self.fd).st_size:
            os.ftruncate(self.fd, ends[-1])
        places = [
            Place(end - video.nbytes, video.shape, video.dtype.str)
            for video, end in zip(videos, ends)
        ]
        with mmap.mmap(self.fd, ends[-1]) as memory:
            for video, place in zip(videos, places):
                _view(memory, place)[...] = video
        return places

    def get(self, places: Any) -> Any:
        """Return copies of the videos that `put` returned the places of."""
        if isinstance(places, Place):
            return self._get([places])[0]
        return self._get(places)

    def _get(self, places: Sequence[Place]) -> list[np.ndarray]:
        with mmap.mmap(self.fd, 0, prot=mmap.PROT_READ) as memory:
            return [_view(memory, place).copy() for place in places]


def _view(memory: mmap.mmap, place: Place) -> np.ndarray:
    return np.ndarray(place.shape, place.dtype, memory, place.offset)
