"""A reward that reward servers compute (`python -m rewards.server`), on one machine or many.

    reward = RemoteReward(["http://cpu1:8080", "http://cpu2:8080"], token=os.environ["REWARD_TOKEN"])
    with RewardPool(lambda: reward, workers=16, mode="thread") as pool:  # 16 videos in flight
        pending = pool.submit(videos, targets)                           # returns at once

Values are those of the same reward in this process, bit for bit. `rewards.remote.endpoints` says
what happens when servers are slow, die and come back. A video that no server can score is a
`RewardError`, which the pool counts and masks.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rewards.base import PromptRecord, RewardError, Score, check_frames
from rewards.remote.endpoints import Endpoints, log
from rewards.remote.wire import (
    CONTENT_TYPE,
    HEALTH_PATH,
    MAX_VALUE,
    SCORE_PATH,
    VERSIONS,
    decode_scores,
    encode_request,
)


class RemoteReward:
    """The reward of one or more servers. Thread-safe: share one object between the threads of a
    pool.

    urls: of the servers.
    expect: settings that each server's reward must have, as its health page shows them under
        "reward". Without it, all servers must agree with the first one that answers. A server is
        checked again after a restart.
    select: function from T to the indices of the frames to send; None sends all. Use it where the
        reward reads no other frames and would choose the same ones among those sent, as `spelling`
        does with `even_frames`: 9 of 81 frames are a ninth of the traffic.
    bounds: lowest and highest value of the reward; a score outside is an error of its video.
    options: of `Endpoints`: token, timeout, retries, patience, first_pause, seed.

    Records are sent in version 2 of the wire format if they are `PromptRecord`s and all servers that
    answered at the start know it, else in version 1.

    Attributes `workers`: sum of the workers of the servers that answered at the start; `groupwise`:
    whether they score the videos of a prompt together. Raises
    `ValueError` or `RewardError` as `Endpoints` does.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        expect: Mapping[str, Any] | None = None,
        select: Callable[[int], Sequence[int]] | None = None,
        bounds: tuple[float, float] = (-MAX_VALUE, MAX_VALUE),
        **options,
    ):
        self._expected = dict(expect) if expect is not None else None
        self._versions: dict[str, str] | None = None
        self._select, self._bounds, self._starting = select, bounds, True
        self.workers = 0
        self._version = max(VERSIONS)
        self.groupwise: bool | None = None  # not known before the first server answers
        self._endpoints = Endpoints(urls, HEALTH_PATH, self._check, **options)
        self._starting = False

    def score(self, frames: np.ndarray, record: Any) -> Score:
        """Score a video uint8 [T, H, W, 3]. Raises `RewardError` when no server can."""
        check_frames(frames)
        score = self.score_batch(frames[None], [record])[0]
        if isinstance(score, RewardError):
            raise score
        return score

    def score_group(self, videos: Sequence[np.ndarray], record: Any) -> list[Score | RewardError]:
        """Score the videos of one prompt together. Raises `RewardError` when no server can."""
        return self.score_batch(np.stack(videos), [record] * len(videos), group=True)

    def score_batch(
        self, videos: np.ndarray, records: Sequence[Any], group: bool = False
    ) -> list[Score | RewardError]:
        """Score videos uint8 [B, T, H, W, 3] in one request: B scores or errors. group: whether they
        are one group. Raises `RewardError` when no server answers.
        """
        frames = None if self._select is None else [int(i) for i in self._select(videos.shape[1])]
        sent = videos if frames is None else videos[:, frames]
        version = self._version if isinstance(records[0], PromptRecord) else 1
        body = encode_request(sent, records, version, group)
        answer = self._endpoints.post(SCORE_PATH, body, CONTENT_TYPE)
        scores = decode_scores(answer, sent.shape[0], sent.shape[1], self._bounds, version)
        return scores if frames is None else [_renumber(score, frames) for score in scores]

    def close(self) -> None:
        """End the waiting of all threads, each with a `RewardError`."""
        self._endpoints.close()

    def _check(self, health: Any) -> None:
        """Raise `RewardError` unless a server's health page is that of the expected reward."""
        if not isinstance(health, dict) or not isinstance(health.get("reward"), dict):
            raise RewardError("is not a reward server: its health page names no reward")
        reward = health["reward"]
        versions = health.get("versions", {})
        workers = health.get("workers", 0)
        if type(workers) is not int or workers < 0:
            raise RewardError(
                f"is not a reward server: its health page has workers={repr(workers)[:100]}, not a "
                "number"
            )
        self._expected = reward if self._expected is None else self._expected
        differences = [
            f"{key}={repr(reward.get(key))[:100]} instead of {value!r}"
            for key, value in self._expected.items()
            if reward.get(key) != value
        ]
        if differences:
            raise RewardError(
                f"scores with {', '.join(differences)}: start it with the same settings"
            )
        wire = health.get("wire", [1])
        groupwise = health.get("groupwise") is True
        self.groupwise = groupwise if self.groupwise is None else self.groupwise
        if groupwise != self.groupwise:
            raise RewardError("is groupwise where other servers are not, or the reverse")
        if self._starting and (not isinstance(wire, list) or 2 not in wire):
            self._version = 1
        elif not isinstance(wire, list) or self._version not in wire:
            raise RewardError(
                f"knows versions {wire!r:.100} of the wire format, not {self._version}: update it"
            )
        self.workers += workers if self._starting else 0
        self._versions = versions if self._versions is None else self._versions
        if versions != self._versions:
            log.warning(
                "reward servers differ in versions, so their scores may, too: %.500r and %.500r",
                versions,
                self._versions,
            )


def _renumber(score: Score | RewardError, frames: Sequence[int]) -> Score | RewardError:
    """Replace the indices among the frames that were sent by the indices in the video."""
    if isinstance(score, RewardError):
        return score
    return dataclasses.replace(score, frames=tuple(frames[i] for i in score.frames))
