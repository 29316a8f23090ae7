"""Which videos a method trains on, and with what weight, from the rewards of their groups.

Host-side NumPy, the same on every process. Nothing is removed: a video or pair that does not count
is masked, so that batches keep their shape.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Selection:
    """What an epoch trains on: R videos or, with `worse`, pairs; or batches of them, [M, B]."""

    videos: np.ndarray  # [R] int, numbers in the epoch; of a pair the better one
    worse: np.ndarray | None  # [R] int, the other one of each pair
    weight: np.ndarray  # [R] float32
    valid: np.ndarray  # [R] bool

    @property
    def numbers(self) -> np.ndarray:
        """The videos that count, in any order."""
        videos = self.videos if self.worse is None else np.stack([self.videos, self.worse], -1)
        return videos[self.valid].ravel()

    def batches(self, updates: int, batch: int, shards: int) -> list["Selection"]:
        """One Selection for each of the epoch's updates, arrays [M, B] of `layout`. What fills up
        the last batch is not valid.
        """
        each = len(self.videos) // updates
        micro, size = layout(len(self.videos), updates, batch, shards)
        place = np.arange(micro * size)

        def batched(part, values):
            return None if values is None else values[part].reshape(micro, size)

        parts = [update * each + place % each for update in range(updates)]
        return [
            Selection(
                batched(part, self.videos),
                batched(part, self.worse),
                batched(part, self.weight),
                batched(part, self.valid) & (place < each).reshape(micro, size),
            )
            for part in parts
        ]


def layout(rows: int, updates: int, batch: int, shards: int) -> tuple[int, int]:
    """(M, B): the fewest micro-batches of at most `batch` rows for rows / updates rows, and the
    smallest size that holds them and divides over `shards`.
    """
    each = rows // updates
    micro = -(-each // batch)
    return micro, -(-each // (micro * shards)) * shards


def best_and_worst(
    rewards: np.ndarray, valid: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of each group's best and worst valid video, the first of equals, int [G], and whether
    they differ, [G].
    """
    high, low = (np.where(valid, rewards, end).reshape(-1, size) for end in (-np.inf, np.inf))
    first = np.arange(len(high)) * size
    return (
        first + high.argmax(axis=1),
        first + low.argmin(axis=1),
        high.max(axis=1) > low.min(axis=1),
    )
