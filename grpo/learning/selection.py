"""Selection of the videos that a method trains on, with their weights, from the rewards of their
groups.

NumPy on the host, the same on every process. A video or pair that does not count is masked, never
removed, so that batches have one shape.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Selection:
    """R videos, or pairs of videos, that an epoch trains on; or a batch of them, [M, B] each.

    Attributes:
        videos: int [R], numbers in the epoch; in pairs those of the better videos.
        worse: int [R], the other video of each pair; None: videos, not pairs.
        weight: float32 [R].
        valid: bool [R], whether the row counts.
    """

    videos: np.ndarray
    worse: np.ndarray | None
    weight: np.ndarray
    valid: np.ndarray

    @property
    def numbers(self) -> np.ndarray:
        """The numbers of the videos that count, in any order."""
        videos = self.videos if self.worse is None else np.stack([self.videos, self.worse], -1)
        return videos[self.valid].ravel()

    def batches(self, updates: int, batch: int, shards: int) -> list["Selection"]:
        """Return a Selection for each of the epoch's updates, with arrays [M, B] of `layout`. Rows
        that fill up the last micro-batch are not valid.
        """
        each = len(self.videos) // updates
        micro, size = layout(len(self.videos), updates, batch, shards)
        place = np.arange(micro * size)
        filled = place < each

        def batched(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return values[rows].reshape(micro, size)

        selections = []
        for update in range(updates):
            rows = update * each + place % each
            selections.append(
                Selection(
                    videos=batched(self.videos, rows),
                    worse=None if self.worse is None else batched(self.worse, rows),
                    weight=batched(self.weight, rows),
                    valid=batched(self.valid, rows) & filled.reshape(micro, size),
                )
            )
        return selections


def layout(rows: int, updates: int, batch: int, shards: int) -> tuple[int, int]:
    """Return (M, B) for rows / updates rows: the fewest micro-batches of at most `batch` rows, and
    the smallest size that contains them and is a multiple of `shards`.
    """
    each = rows // updates
    micro = -(-each // batch)
    return micro, -(-each // (micro * shards)) * shards


def best_and_worst(
    rewards: np.ndarray, valid: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers of each group's best and worst valid videos, int [G] each, and whether their
    rewards differ, bool [G]. Of equal videos the first one is taken.

    rewards [N] float, valid [N] bool: of groups of `size` videos, one after the other.
    """
    high = np.where(valid, rewards, -np.inf).reshape(-1, size)
    low = np.where(valid, rewards, np.inf).reshape(-1, size)
    first = np.arange(len(high)) * size
    return (
        first + high.argmax(axis=1),
        first + low.argmin(axis=1),
        high.max(axis=1) > low.min(axis=1),
    )
