"""Several reward pools that score the same videos, each with rewards of its own: one of this machine
and one for each set of servers. Their scores are merged, so that a failure in one pool leaves the
values of the others.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from rewards.base import Score, Traits
from rewards.batch_scores import BatchScores, PendingScores
from rewards.pool import RewardPool

# names of pools of composites, whose parts are named as they are; no rewards have such names
BUILT_IN_POOL, OWN_POOL, IN_PROCESS_POOL = "*built-in", "*own", "*in this process"


@dataclasses.dataclass(frozen=True)
class PendingSet:
    """The future of one batch in all pools, as `PendingScores`."""

    pending: Mapping[str, PendingScores]
    main: str
    owner: str

    def result(self) -> BatchScores:
        """Wait for all pools and return the merged scores. A video without the main value is
        masked, with the error of that value's pool.
        """
        scores = {name: pending.result() for name, pending in self.pending.items()}
        owner = self.owner
        parts: dict[str, np.ndarray] = {}
        part_errors: dict[str, list[str]] = {}
        part_retries: dict[str, int] = {}
        for name, batch in scores.items():
            own = parts_of(name, batch)
            parts |= own
            part_retries |= batch.part_retries
            if not is_composite(name) and name != owner:
                part_retries[name] = batch.retries
            for part in own.keys() - {self.main}:
                failed = int(np.isnan(own[part]).sum())
                errors = batch.part_errors.get(part) or [error for error in batch.errors if error]
                if failed:
                    part_errors[part] = errors or [f"reward {part} is not finite"] * failed
        values = parts.get(self.main, np.full(len(scores[owner].values), np.nan))
        valid = np.isfinite(values)
        reading = scores.get(BUILT_IN_POOL, scores[owner])
        return BatchScores(
            values=values,
            valid=valid,
            texts=[text if ok else "" for ok, text in zip(valid, reading.texts)],
            parts=parts,
            scores=[Score(float(v)) if ok else None for ok, v in zip(valid, values)],
            errors=[
                "" if ok else error or f"reward {self.main} is not finite"
                for ok, error in zip(valid, scores[owner].errors)
            ],
            failures=int((~valid).sum()),
            retries=scores[owner].retries,
            seconds=max(batch.seconds for batch in scores.values()),
            part_errors=part_errors,
            part_retries=part_retries,
            boxes=[found if ok else {} for ok, found in zip(valid, reading.boxes)],
        )


def is_composite(pool: str) -> bool:
    """Return whether the name is that of a pool of a composite."""
    return pool in (BUILT_IN_POOL, OWN_POOL, IN_PROCESS_POOL)


def parts_of(pool: str, batch: BatchScores) -> dict[str, np.ndarray]:
    """Return the values of each reward of a pool, float64 [B]; nan where it failed. A pool of
    servers, `pool`, has a value of its own name and POOL.PART for each part.
    """
    if is_composite(pool):
        return batch.parts
    return {pool: batch.values} | {f"{pool}.{part}": v for part, v in batch.parts.items()}


class PoolSet:
    """Several pools that are used as one `RewardPool`.

    pools: by name: `BUILT_IN_POOL`, `OWN_POOL` or `IN_PROCESS_POOL`, or the name of the reward of
        its servers. main: the
        name of the main value. owner: the name of its pool. Attribute `traits`: groupwise if one of
        the pools is.
    """

    def __init__(self, pools: Mapping[str, RewardPool], main: str, owner: str):
        self.pools, self.main, self.owner = dict(pools), main, owner
        self.traits = Traits(groupwise=any(pool.traits.groupwise for pool in pools.values()))

    def submit(
        self,
        videos: np.ndarray,
        records: Sequence[Any],
        groups: Sequence[Hashable] | None = None,
        group_size: int = 1,
    ) -> PendingSet:
        """Queue a batch in all pools, as `RewardPool.submit`."""
        return PendingSet(
            {
                name: pool.submit(videos, records, groups, group_size)
                for name, pool in self.pools.items()
            },
            self.main,
            self.owner,
        )

    def close(self) -> None:
        """Close all pools."""
        for pool in self.pools.values():
            pool.close()

    def __enter__(self) -> "PoolSet":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


Pool = RewardPool | PoolSet
