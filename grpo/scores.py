"""The reward pool of a recipe, and the scores of an epoch or an evaluation from every process's own."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from grpo import reward_servers
from grpo.combine import MAIN
from grpo.prompts import PromptSet
from rewards.base import Asked, RewardError
from rewards.clip import KINDS, ClipReward
from rewards.ocr import OCRReward
from rewards.quality import QualityReward
from rewards.several import DERIVED, SeveralRewards
from rewards.workers import PendingScores, RewardPool
from wan_jax import hosts
from wan_jax import mesh as mesh_lib
from wan_jax.cli import UserError


def open_pool(c, weights: dict[str, float]) -> RewardPool:
    """The scoring processes, or the threads that ask servers. Raises `UserError` when the reward cannot be built, e.g.
    for a missing package."""
    measures = {name: None if name in DERIVED else
                functools.partial(ClipReward, c[f"{name}_model"], name, c.max_frames) if name in KINDS else
                functools.partial(QualityReward, name) for name in weights if name != MAIN}
    try:
        reward = (reward_servers.connect(c) if c.servers else
                  functools.partial(OCRReward, rule=c.rule, engine=c.engine, max_frames=c.max_frames))
        if measures:
            reward = functools.partial(SeveralRewards, {MAIN: reward} | measures)
        return RewardPool(reward, workers=c.workers, mode="thread" if c.servers else "process")
    except (RewardError, ImportError, ValueError) as error:
        raise UserError(f"the reward cannot be built: {str(error).strip().splitlines()[-1]}") from error


def for_rewards(prompts: PromptSet, weights: dict[str, float]) -> PromptSet:
    """The set with the prompt beside its targets where a reward asks for it."""
    if not set(weights) & set(KINDS):
        return prompts
    return dataclasses.replace(prompts, targets=tuple(map(Asked, prompts.targets, prompts.prompts)))


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


def gather_rows(batches: Sequence[jax.Array], sharding: jax.sharding.Sharding) -> np.ndarray:
    """Batches [K, B] on the devices, end to end: [K, N] on every process, which all call this at the same point.
    sharding: of B; each process gives the rows that are then its own."""
    size = batches[0].shape[1]
    rows = hosts.my_rows(sharding, size)
    mine = [(b * size + rows, np.stack([hosts.my_part(mesh_lib.place(x[k], sharding)) for k in range(len(x))]))
            for b, x in enumerate(batches)]
    whole = np.full((len(batches[0]), len(batches) * size), np.nan)
    for numbers, values in (piece for pieces in hosts.gather(mine) for piece in pieces):
        whole[:, numbers] = values
    return whole


def gather_scores(pending: Sequence[tuple[np.ndarray, PendingScores]], total: int) -> Scores:
    """Waits for this process's batches, and exchanges the results: all processes call it at the same point.

    pending: (numbers int [n] of the videos among all `total`, their scores). Raises ValueError when a video has none.
    """
    mine = []
    for numbers, batch in pending:
        result = batch.result()
        errors = [error.strip().splitlines()[-1] for error in result.errors if error]
        mine.append((numbers, result.values, result.valid, result.texts, result.retries, errors[-1:], result.parts))
    values, valid, texts = np.full(total, np.nan), np.zeros(total, bool), [""] * total
    scored, retries, last, parts = np.zeros(total, bool), 0, [], {}
    for numbers, *arrays, read, again, errors, several in (piece for pieces in hosts.gather(mine) for piece in pieces):
        values[numbers], valid[numbers] = arrays
        for name, some in several.items():
            parts.setdefault(name, np.full(total, np.nan))[numbers] = some
        scored[numbers], retries, last = True, retries + again, errors or last
        for number, text in zip(numbers, read):
            texts[number] = text
    if not scored.all():
        raise ValueError(f"{(~scored).sum()} of {total} videos were scored by no process")
    return Scores(values, valid, texts, int((~valid).sum()), retries, last[0] if last else "", parts)
