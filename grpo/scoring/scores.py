"""The scores of an epoch or of an evaluation, gathered from all processes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from grpo.scoring.reward_combination import MAIN
from rewards.base import Box, last_line
from rewards.batch_scores import BatchScores, PendingScores
from rewards.pool_set import PendingSet, Pool
from wan_jax.distributed import multihost
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.inference.pipeline import NOT_FINITE, Videos

# --- Scores of one process ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PendingBatch:
    """A batch of n videos of this process whose scores are being computed."""

    numbers: np.ndarray  # int [n], of the videos among those of all processes
    finite: np.ndarray  # bool [n]; the other videos have no pixels to score
    scores: PendingScores | PendingSet | None  # of the finite videos; None if there are none


def submit(
    pool: Pool,
    numbers: np.ndarray,
    videos: Videos,
    records: Sequence,
    group_size: int = 1,
) -> PendingBatch:
    """Start to score the finite ones of n videos. numbers, records: one per video. group_size: the
    videos with the numbers 0 to group_size - 1 are a group, and so on.
    """
    finite = np.flatnonzero(videos.finite)
    scores = None
    if len(finite):
        scores = pool.submit(
            videos.frames[finite],
            [records[int(i)] for i in finite],
            (np.asarray(numbers)[finite] // group_size).tolist(),
            group_size,
        )
    return PendingBatch(numbers, videos.finite, scores)


@dataclasses.dataclass(frozen=True)
class ScoredBatch:
    """The scores of a batch of n videos of one process, as it sends them to the others."""

    numbers: np.ndarray  # int [n], of the videos among those of all processes
    finite: np.ndarray  # bool [n]
    scores: BatchScores | None  # of the finite videos, without details; None if there are none
    error: str  # the last line of the last error, or ""

    @classmethod
    def of(cls, batch: PendingBatch) -> "ScoredBatch":
        """Wait for the scores of a batch."""
        if batch.scores is None:
            return cls(batch.numbers, batch.finite, None, "")
        scores = batch.scores.result()
        errors = [
            f"{name}: {last_line(error)}"
            for name, failed in scores.part_errors.items()
            for error in failed
        ]
        errors += [last_line(error) for error in scores.errors if error]
        compact = dataclasses.replace(scores, scores=[], errors=[], part_errors={})
        return cls(batch.numbers, batch.finite, compact, errors[-1] if errors else "")


# --- Scores of all processes ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GatheredScores:
    """The scores of N videos of all processes; the same bits on every process."""

    values: np.ndarray  # float64 [N], nan where not valid
    valid: np.ndarray  # bool [N]
    texts: list[str]  # N texts that were read; "" where not valid
    failures: int  # number of videos that are not valid
    retries: int  # number of second attempts
    error: str  # the last line of one error, or ""
    # of several rewards: the values of each, float64 [N]; nan where that reward failed
    parts: dict[str, np.ndarray]
    finite: np.ndarray  # bool [N]; the other videos were not scored, and are not valid
    part_retries: dict[str, int]  # number of second attempts of each reward but the main one
    main: str = MAIN  # the name of the main reward
    # of each of N videos {judged frame: boxes of its text}, {} without; [] where none are kept
    boxes: list[Mapping[int, tuple[Box, ...]]] = dataclasses.field(default_factory=list)

    @property
    def nonfinite(self) -> int:
        """Number of videos that are not finite."""
        return int((~self.finite).sum())

    @property
    def part_failures(self) -> dict[str, int]:
        """Number of scored videos for which each reward but the main one failed."""
        return {
            name: int((self.valid & np.isnan(values)).sum())
            for name, values in self.parts.items()
            if name != self.main
        }

    def counts(self) -> dict:
        """Return the counts of failures and retries that a record of the run log contains, next to
        `failed_scores`.
        """
        counts: dict[str, Any] = {
            "nonfinite_videos": self.nonfinite,
            "retried_scores": self.retries,
        }
        if self.parts:
            counts["failed_rewards"] = self.part_failures
            counts["retried_rewards"] = {
                name: self.part_retries.get(name, 0) for name in self.part_failures
            }
        return counts

    def why(self) -> str:
        """Explain why videos have no score, for messages. Never empty."""
        reasons = []
        if self.nonfinite:
            reasons.append(
                f"{self.nonfinite} of {len(self.finite)} videos are not finite numbers (NaN or "
                f"infinite). {NOT_FINITE}"
            )
        if self.error:
            reasons.append(f"the last error was: {self.error}")
        return "; ".join(reasons) or "no error was reported"


def format_failures(failed: int, counts: dict) -> str:
    """Return a log line's text about `failed` masked videos and `GatheredScores.counts`; "" if
    nothing failed.
    """
    texts = [f"{failed} scores failed"] if failed else []
    if counts.get("nonfinite_videos"):
        texts.append(f"{counts['nonfinite_videos']} videos not finite")
    for name, number in counts.get("failed_rewards", {}).items():
        if number:
            texts.append(f"{name} failed for {number}")
    return ", ".join(texts)


def gather_rows(batches: Sequence[jax.Array], sharding: jax.sharding.NamedSharding) -> np.ndarray:
    """Concatenate batches [K, B] on the devices along B: [K, N] on every process.

    sharding: of the axis B; each process contributes the rows that are its own under it. All
    processes must call this at the same point.
    """
    size = batches[0].shape[1]
    rows = multihost.my_rows(sharding, size)
    own = [
        (index * size + rows, multihost.my_part(sharding_lib.place(batch.T, sharding)).T)
        for index, batch in enumerate(batches)
    ]
    gathered = np.full((len(batches[0]), len(batches) * size), np.nan)
    for process in multihost.gather(own):
        for numbers, values in process:
            gathered[:, numbers] = values
    return gathered


def gather_scores(pending: Sequence[PendingBatch], total: int, main: str = MAIN) -> GatheredScores:
    """Wait for this process's batches and exchange their scores with the other processes.

    All processes must call this at the same point. pending: batches of this process; total: number
    of videos of all processes; main: the name of the main reward. Raises `ValueError` when a video is
    in no batch of any process.
    """
    own = [ScoredBatch.of(batch) for batch in pending]
    batches = [batch for process in multihost.gather(own) for batch in process]
    values, valid, texts = np.full(total, np.nan), np.zeros(total, bool), [""] * total
    present, finite = np.zeros(total, bool), np.zeros(total, bool)
    boxes: list[Mapping[int, tuple[Box, ...]]] = [{}] * total
    parts: dict[str, np.ndarray] = {}
    part_retries: dict[str, int] = {}
    retries, error = 0, ""
    for batch in batches:
        present[batch.numbers] = True
        finite[batch.numbers] = batch.finite
        error = batch.error or error
        if (scores := batch.scores) is None:
            continue
        scored = batch.numbers[batch.finite]
        values[scored] = scores.values
        valid[scored] = scores.valid
        for number, text in zip(scored, scores.texts):
            texts[number] = text
        for number, found in zip(scored, scores.boxes):
            boxes[number] = found
        for name, part in scores.parts.items():
            parts.setdefault(name, np.full(total, np.nan))[scored] = part
        retries += scores.retries
        for name, count in scores.part_retries.items():
            part_retries[name] = part_retries.get(name, 0) + count
    if not present.all():
        raise ValueError(f"{(~present).sum()} of {total} videos were scored by no process")
    return GatheredScores(
        values=values,
        valid=valid,
        texts=texts,
        failures=int((~valid).sum()),
        retries=retries,
        error=error,
        parts=parts,
        finite=finite,
        part_retries=part_retries,
        main=main,
        boxes=boxes,
    )
