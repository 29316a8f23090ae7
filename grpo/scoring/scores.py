"""The reward pool of a recipe, and the scores of an epoch or an evaluation from every process's
own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from grpo.data.prompts import PromptSet
from grpo.scoring import reward_servers
from grpo.scoring.reward_combination import MAIN
from rewards.base import Asked, RewardError, last_line
from rewards.clip import KINDS, ClipReward
from rewards.composite import DERIVED, SeveralRewards
from rewards.ocr.rules import OCRReward, make_readable_check
from rewards.quality import QualityReward
from rewards.workers import PendingScores, RewardPool
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import multihost
from wan_jax.errors import UserError
from wan_jax.inference.pipeline import NOT_FINITE, Videos


def open_pool(c, weights: dict[str, float]) -> RewardPool:
    """The scoring processes, or the threads that ask servers. Raises `UserError` when the reward
    cannot be built, e.g. for a missing package.
    """
    measures = {
        name: None
        if name in DERIVED
        else functools.partial(ClipReward, c[f"{name}_model"], name, c.max_frames)
        if name in KINDS
        else functools.partial(QualityReward, name)
        for name in weights
        if name != MAIN
    }
    try:
        reward = (
            reward_servers.connect(c)
            if c.servers
            else functools.partial(OCRReward, rule=c.rule, engine=c.engine, max_frames=c.max_frames)
        )
        if measures:
            reward = functools.partial(SeveralRewards, {MAIN: reward} | measures)
        return RewardPool(reward, workers=c.workers, mode="thread" if c.servers else "process")
    except (RewardError, ImportError, ValueError) as error:
        raise UserError(
            f"the reward cannot be built: {str(error).strip().splitlines()[-1]}"
        ) from error


def targets_check(c) -> Callable[[Sequence[str]], None] | None:
    """Return the check of targets for `grpo.data.prompts.load_prompts`: whether the OCR engine here
    knows their characters.

    c: `config.reward`. None where servers or a judge read, or the spelling is only measured.
    """
    return None if c.servers or not c.weights[MAIN] else make_readable_check(c.engine)


def for_rewards(prompts: PromptSet, weights: dict[str, float]) -> PromptSet:
    """The set with the prompt beside its targets where a reward asks for it."""
    if not set(weights) & set(KINDS):
        return prompts
    return dataclasses.replace(prompts, targets=tuple(map(Asked, prompts.targets, prompts.prompts)))


@dataclasses.dataclass(frozen=True)
class Pending:
    """Some of an epoch's or an evaluation's videos while they are scored."""

    numbers: np.ndarray  # int [n], of the videos among all
    finite: np.ndarray  # bool [n]; the others have no picture to score
    scores: PendingScores | None  # of the finite ones; None where there are none


def submit(pool: RewardPool, numbers: np.ndarray, videos: Videos, records: Sequence) -> Pending:
    """Start scoring the videos that are finite. numbers, records: one a video."""
    kept = np.flatnonzero(videos.finite)
    scores = pool.submit(videos.frames[kept], [records[i] for i in kept]) if len(kept) else None
    return Pending(numbers, videos.finite, scores)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of N videos; the same bits on every process."""

    values: np.ndarray  # float64 [N], nan where not valid
    valid: np.ndarray  # bool [N]
    texts: list[str]  # N, what was read; "" where not valid
    failures: int  # videos that are not valid
    retries: int
    error: str  # the last line of one failure's traceback; "" without
    parts: dict[str, np.ndarray]  # of several rewards, float64 [N] each; nan where that one failed
    finite: np.ndarray  # bool [N]; videos that are not were not scored, and are not valid
    # of several rewards, how often each one beside the main one was tried again
    part_retries: dict[str, int]

    @property
    def nonfinite(self) -> int:
        """Videos that are not finite."""
        return int((~self.finite).sum())

    @property
    def part_failures(self) -> dict[str, int]:
        """Of several rewards, for how many scored videos each one beside the main one failed."""
        return {
            name: int((self.valid & np.isnan(values)).sum())
            for name, values in self.parts.items()
            if name != MAIN
        }

    def counts(self) -> dict:
        """What a record holds of failures, beside `failed_scores`."""
        each = {
            "failed_rewards": self.part_failures,
            "retried_rewards": {
                name: self.part_retries.get(name, 0) for name in self.part_failures
            },
        }
        return {"nonfinite_videos": self.nonfinite, "retried_scores": self.retries} | (
            each if self.parts else {}
        )

    def why(self) -> str:
        """Why videos have no score, for messages. Never empty."""
        reasons = (
            [
                f"{self.nonfinite} of {len(self.finite)} videos are not finite numbers (NaN or "
                f"infinite). {NOT_FINITE}"
            ]
            if self.nonfinite
            else []
        )
        reasons += [f"the last error was: {self.error}"] if self.error else []
        return "; ".join(reasons) or "no error was reported"


def format_failures(failed: int, counts: dict) -> str:
    """Of `failed` masked videos and `Scores.counts`, what a line of the log says; "" where nothing
    failed.
    """
    said = [f"{failed} scores failed"] if failed else []
    if counts.get("nonfinite_videos"):
        said.append(f"{counts['nonfinite_videos']} videos not finite")
    said += [f"{name} failed for {n}" for name, n in counts.get("failed_rewards", {}).items() if n]
    return ", ".join(said)


def gather_rows(batches: Sequence[jax.Array], sharding: jax.sharding.Sharding) -> np.ndarray:
    """Batches [K, B] on the devices, end to end: [K, N] on every process, which all call this at
    the same point. sharding: of B; each process gives the rows that are then its own.
    """
    size = batches[0].shape[1]
    rows = multihost.my_rows(sharding, size)
    mine = [
        (
            b * size + rows,
            np.stack([multihost.my_part(mesh_lib.place(x[k], sharding)) for k in range(len(x))]),
        )
        for b, x in enumerate(batches)
    ]
    whole = np.full((len(batches[0]), len(batches) * size), np.nan)
    for numbers, values in (piece for pieces in multihost.gather(mine) for piece in pieces):
        whole[:, numbers] = values
    return whole


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one process found of some of the videos."""

    numbers: np.ndarray  # int [n], among all
    finite: np.ndarray  # bool [n]
    values: np.ndarray  # float64 [m], of the finite ones, as what follows
    valid: np.ndarray  # bool [m]
    texts: list[str]  # m
    parts: dict[str, np.ndarray]  # float64 [m] each
    retries: int
    part_retries: dict[str, int]
    errors: list[str]  # the last one, or none

    @classmethod
    def of(cls, batch: Pending) -> "Piece":
        """Wait for the batch's scores."""
        if batch.scores is None:
            return cls(
                batch.numbers, batch.finite, np.zeros(0), np.zeros(0, bool), [], {}, 0, {}, []
            )
        found = batch.scores.result()
        errors = [
            f"{name}: {last_line(error)}"
            for name, failed in found.part_errors.items()
            for error in failed
        ]
        errors += [last_line(error) for error in found.errors if error]
        return cls(
            batch.numbers,
            batch.finite,
            found.values,
            found.valid,
            found.texts,
            found.parts,
            found.retries,
            found.part_retries,
            errors[-1:],
        )


def gather_scores(pending: Sequence[Pending], total: int) -> Scores:
    """Waits for this process's batches, and exchanges the results: all processes call it at the
    same point.

    pending: some of `total` videos each. Raises ValueError when a video is in none, on any process.
    """
    pieces = [
        piece
        for found in multihost.gather([Piece.of(batch) for batch in pending])
        for piece in found
    ]
    values, valid, texts = np.full(total, np.nan), np.zeros(total, bool), [""] * total
    seen, finite, errors = np.zeros(total, bool), np.zeros(total, bool), []
    parts, part_retries = {}, {}
    for piece in pieces:
        scored = piece.numbers[piece.finite]
        seen[piece.numbers], finite[piece.numbers] = True, piece.finite
        values[scored], valid[scored] = piece.values, piece.valid
        for name, some in piece.parts.items():
            parts.setdefault(name, np.full(total, np.nan))[scored] = some
        for name, again in piece.part_retries.items():
            part_retries[name] = part_retries.get(name, 0) + again
        for number, text in zip(scored, piece.texts):
            texts[number] = text
        errors = piece.errors or errors
    if not seen.all():
        raise ValueError(f"{(~seen).sum()} of {total} videos were scored by no process")
    return Scores(
        values,
        valid,
        texts,
        int((~valid).sum()),
        sum(piece.retries for piece in pieces),
        errors[0] if errors else "",
        parts,
        finite,
        part_retries,
    )
