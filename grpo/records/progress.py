"""How far a run is, and how long it will still take."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from grpo.records.clock import duration

RECENT = 20  # epochs by which the rest is estimated


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a run.

    Attributes:
        epoch: the last finished one.
        last: the last one to come, by estimate where a budget ends the run.
        seconds: that it will still take, by estimate; None: unknown.
    """

    epoch: int
    last: int
    seconds: float | None

    @property
    def finished(self) -> bool:
        """Whether no epoch is left."""
        return self.epoch >= self.last

    @property
    def eta(self) -> str:
        """The rest of the run in words; "" if unknown."""
        return "" if self.seconds is None or self.finished else duration(self.seconds)


def estimate(
    epochs: Sequence[Mapping], evaluations: Sequence[Mapping], config: Mapping
) -> Progress:
    """Estimate the rest of a run from its newest records.

    An epoch takes the median of the last ones, with the time to save it; an evaluation, also at
    other lengths and without guidance, that of the evaluations.

    epochs, evaluations: records of metrics.jsonl and evals.jsonl, oldest first. config: nested, of
    the recipe. What it lacks is not counted.
    """
    newest = [record for record in epochs[-RECENT:] if _total(record) is not None]
    epoch = epochs[-1]["epoch"] if epochs else 0
    last = config.get("epochs") or epoch
    # 1 a budget may end the run before its last epoch
    if newest:
        for name, limit in (config.get("budget") or {}).items():
            spent = newest[-1].get(f"spent_{name}", 0)
            if limit is not None and spent > 0:
                each = _median([b - a for a, b in _pairs(newest, f"spent_{name}")]) or spent / epoch
                last = min(last, epoch + max(0, math.ceil((limit - spent) / each)))
    if not newest:
        return Progress(epoch, last, None)
    # 2 the time of the rest
    every = (config.get("eval") or {}).get("every") or last
    due = last // every - epoch // every + (last % every > 0)
    evaluation = _median([_evaluation(record) for record in evaluations[-RECENT:]])
    seconds = (last - epoch) * _median([_total(record) for record in newest]) + due * evaluation
    return Progress(epoch, last, max(0.0, seconds))


def _total(record: Mapping) -> float | None:
    seconds = record.get("seconds")
    if not isinstance(seconds, Mapping) or "total" not in seconds:
        return None
    return seconds["total"] + seconds.get("save", 0.0)


def _evaluation(record: Mapping) -> float:
    return record.get("seconds", 0.0) + record.get("unguided", {}).get("seconds", 0.0)


def _pairs(records: Sequence[Mapping], key: str) -> list[tuple[float, float]]:
    values = [record[key] for record in records if key in record]
    return list(itertools.pairwise(values))


def _median(values: Sequence) -> float:
    return float(np.median(values)) if len(values) else 0.0
