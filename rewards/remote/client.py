"""A reward that servers compute (`python -m rewards.server`), on one machine or many.

    reward = RemoteReward(["http://cpu1:8080", "http://cpu2:8080"], token=os.environ["REWARD_TOKEN"])
    with RewardPool(lambda: reward, workers=16, mode="thread") as pool:     # 16 videos in flight
        pending = pool.submit(videos, targets)                              # returns at once

Values are those of the same reward in this process, bit for bit. What happens when servers are
slow, die and come back is described in rewards/remote/endpoints.py; a video that no server could
score is a RewardError, which the pool counts and masks.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rewards.base import RewardError, Score, check_frames
from rewards.remote.endpoints import Endpoints, log
from rewards.remote.wire import (
    CONTENT_TYPE,
    HEALTH_PATH,
    MAX_VALUE,
    SCORE_PATH,
    decode_scores,
    encode_request,
)


class RemoteReward:
    """The reward of one or more servers. Thread-safe: share one object between the threads of a
    pool.

    urls: of the servers. expect: settings that each server's reward must have, as its health page
    shows them under
        "reward"; without it, the others must be as the first that answered. A restarted server is
        checked as well.
    select: T -> indices of the frames to send, where the reward reads no others and would choose
    the same among
        them, as `spelling` does with `even_frames`: 9 of 81 frames are a ninth of the traffic. None
        sends all.
    bounds: lowest and highest value that the reward can have; a score outside is an error of its
    video. others: of `Endpoints`: token, timeout, retries, patience, first_pause, seed.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        expect: Mapping[str, Any] | None = None,
        select: Callable[[int], Sequence[int]] | None = None,
        bounds: tuple[float, float] = (-MAX_VALUE, MAX_VALUE),
        **others,
    ):
        self._expected = dict(expect) if expect is not None else None
        self._versions: dict[str, str] | None = None
        self._select, self._bounds, self._starting = select, bounds, True
        self.workers = 0  # of the servers that answered at the start, together
        self._endpoints = Endpoints(urls, HEALTH_PATH, self._check, **others)
        self._starting = False

    def score(self, frames: np.ndarray, record: Any) -> Score:
        """As `Reward.score`. Raises RewardError when no server could score the video."""
        check_frames(frames)
        score = self.score_batch(frames[None], [record])[0]
        if isinstance(score, RewardError):
            raise score
        return score

    def score_batch(self, videos: np.ndarray, records: Sequence[Any]) -> list[Score | RewardError]:
        """uint8 [B, T, H, W, 3] in one request; B scores, or why there is none. Raises RewardError
        for all.
        """
        frames = None if self._select is None else [int(i) for i in self._select(videos.shape[1])]
        sent = videos if frames is None else videos[:, frames]
        answer = self._endpoints.post(SCORE_PATH, encode_request(sent, records), CONTENT_TYPE)
        scores = decode_scores(answer, *sent.shape[:2], self._bounds)
        return scores if frames is None else [_renumbered(score, frames) for score in scores]

    def close(self) -> None:
        """Ends what waits, in all threads."""
        self._endpoints.close()

    def _check(self, health: Any) -> None:
        """Raises RewardError if a server's health page is not that of the reward expected."""
        if not isinstance(health, dict) or not isinstance(health.get("reward"), dict):
            raise RewardError("is no reward server: its health page names no reward")
        reward, versions, workers = (
            health["reward"],
            health.get("versions", {}),
            health.get("workers", 0),
        )
        if type(workers) is not int or workers < 0:
            raise RewardError(
                f"is no reward server: its health page has workers={repr(workers)[:100]}, not a "
                "number"
            )
        self._expected = reward if self._expected is None else self._expected
        other = [
            f"{key}={repr(reward.get(key))[:100]} instead of {value!r}"
            for key, value in self._expected.items()
            if reward.get(key) != value
        ]
        if other:
            raise RewardError(f"scores with {', '.join(other)}: start it with the same settings")
        self.workers += workers if self._starting else 0
        self._versions = versions if self._versions is None else self._versions
        if versions != self._versions:
            log.warning(
                "reward servers differ in versions, so their scores may, too: %.500r and %.500r",
                versions,
                self._versions,
            )


def _renumbered(score: Score | RewardError, frames: Sequence[int]) -> Score | RewardError:
    """The score with its frame numbers among those sent turned into those of the video."""
    if isinstance(score, RewardError):
        return score
    return dataclasses.replace(score, frames=tuple(frames[i] for i in score.frames))
