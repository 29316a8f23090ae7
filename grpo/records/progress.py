"""How far a run is, and how long it will still take."""

import dataclasses
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

    An epoch takes the median of the last ones, with the time to save it; so does an evaluation.
    Evaluations at further lengths are not counted.

    epochs, evaluations: records of metrics.jsonl and evals.jsonl, oldest first. config: nested, of
    the recipe. What it lacks is not counted.
    """
    newest = [record for record in epochs[-RECENT:] if _total(record) > 0]
    epoch = epochs[-1]["epoch"] if epochs else 0
    last = config.get("epochs") or epoch
    # 1 a budget may end the run before its last epoch
    if newest:
        for name, limit in (config.get("budget") or {}).items():
            values = [_number(record, f"spent_{name}") for record in newest]
            values = [value for value in values if value > 0]
            if limit is not None and values:
                spent = values[-1]
                each = _median(np.diff(values)) or spent / epoch
                last = min(last, epoch + max(0, math.ceil((limit - spent) / each)))
    if not newest:
        return Progress(epoch, last, None)
    # 2 the time of the rest
    every = (config.get("eval") or {}).get("every") or last
    due = last // every - epoch // every + (last % every > 0)
    evaluation = _median([_evaluation(record) for record in evaluations[-RECENT:]])
    seconds = (last - epoch) * _median([_total(record) for record in newest]) + due * evaluation
    return Progress(epoch, last, max(0.0, seconds))


def _number(record: object, key: str) -> float:
    """Return record[key] if it is a finite number, else 0: lines may be damaged."""
    value = record.get(key) if isinstance(record, Mapping) else None
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return 0.0


def _total(record: Mapping) -> float:
    seconds = record.get("seconds")
    total = _number(seconds, "total")
    return total + _number(seconds, "save") if total > 0 else 0.0


def _evaluation(record: Mapping) -> float:
    return _number(record, "seconds") + _number(record.get("unguided"), "seconds")


def _median(values) -> float:
    return float(np.median(values)) if len(values) else 0.0
