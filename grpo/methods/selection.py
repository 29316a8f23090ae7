"""What a group's rewards ask of the methods that train on finished videos
(`grpo.methods.flow_matching`): which, and how much.

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


def select(
    config, rewards: np.ndarray, advantages: np.ndarray, valid: np.ndarray, size: int
) -> Selection:
    """The epoch's videos or pairs. config: `forward.ForwardConfig`; rewards, advantages, valid [N],
    groups of `size` standing together. valid: the videos that may be trained on, which those of
    groups without spread are not.

    'nft': all, weighted by `optimality`; 'rwr': all, by `regression_weights`; 'sft': each group's
    best; 'dpo': each group's best and worst. A group without two different valid rewards has no
    best and is masked.
    """
    everything = np.arange(len(rewards))
    if config.method == "nft":
        return Selection(everything, None, optimality(advantages, config.advantage_clip), valid)
    if config.method == "rwr":
        return Selection(
            everything, None, regression_weights(rewards, valid, size, config.temperature), valid
        )
    best, worst, spread = best_and_worst(rewards, valid, size)
    return Selection(
        best, worst if config.method == "dpo" else None, np.ones(len(best), np.float32), spread
    )


def optimality(advantages: np.ndarray, clip: float) -> np.ndarray:
    """r = clip(A / clip, -1, 1) / 2 + 1/2, float32 (DiffusionNFT, arXiv 2509.16117): how surely a
    video is a good one.
    """
    return (np.clip(advantages / clip, -1.0, 1.0) / 2 + 0.5).astype(np.float32)


def regression_weights(
    rewards: np.ndarray, valid: np.ndarray, size: int, temperature: float
) -> np.ndarray:
    """exp(r / temperature) over its mean in the group, [N] float32; 0 where not valid.

    Flow-RWR (arXiv 2501.13918) weights by exp(r), the solution exp(r / beta) / Z(prompt) of its
    KL-regularised objective without Z. The group's mean is an estimate of Z: the rate of learning
    then does not depend on the level of the rewards. Weighting by the plain reward, as some code
    does, is not this method.
    """
    kept = np.where(valid, rewards, -np.inf).reshape(-1, size).astype(np.float64)  # [G, size]
    highest = kept.max(axis=1, keepdims=True)
    w = np.exp((kept - np.where(np.isfinite(highest), highest, 0.0)) / temperature)
    count = np.maximum(np.isfinite(kept).sum(axis=1, keepdims=True), 1)
    total = w.sum(axis=1, keepdims=True)
    return (w * count / np.where(total > 0, total, 1.0)).reshape(-1).astype(np.float32)


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
