"""How far a run is, and how long it will still take."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from grpo.records.clock import duration
from grpo.settings.video_sizes import relative_cost

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

    An epoch takes the median of the last ones, with the time to save it; so does an evaluation. Where
    schedules change the size of the videos, the time of an epoch is proportional to its tokens.
    Evaluations of further sizes are not counted.

    epochs, evaluations: records of metrics.jsonl and evals.jsonl, oldest first. config: nested, of
    the recipe. What it lacks is not counted.
    """
    newest = [record for record in epochs[-RECENT:] if _total(record) > 0]
    epoch = epochs[-1]["epoch"] if epochs else 0
    # 1 a budget may end the run before its last epoch
    steps: dict[str, tuple[float, float]] = {}
    for name in (config.get("budget") or {}) if newest else ():
        values = [_number(record, f"spent_{name}") for record in newest]
        values = [value for value in values if value > 0]
        if values:
            steps[name] = values[-1], _median(np.diff(values)) or values[-1] / epoch
    last = _last(epoch, config, steps)
    if not newest:
        return Progress(epoch, last, None)
    # 2 the time of the rest
    of_one = _median([_total(r) / relative_cost(r["epoch"], config) for r in newest])
    left = sum(relative_cost(e, config) for e in range(epoch + 1, last + 1))
    return _rest(epoch, last, of_one * left, evaluations, config)


def forecast(
    epoch_in_evaluations: float,
    evaluations_of_epoch: int,
    evaluations: Sequence[Mapping],
    config: Mapping,
) -> Progress:
    """Estimate a run before its first epoch, from the time that its first evaluation took.

    epoch_in_evaluations: mean cost of an epoch, in evaluations. evaluations_of_epoch: of the model in an
    epoch's sampling, for a budget. evaluations, config: as in `estimate`.
    """
    seconds = epoch_in_evaluations * _median([_evaluation(r) for r in evaluations[-RECENT:]])
    steps = {"seconds": (0.0, seconds), "evaluations": (0.0, float(evaluations_of_epoch))}
    last = _last(0, config, steps)
    return (
        _rest(0, last, last * seconds, evaluations, config) if seconds else Progress(0, last, None)
    )


def _last(epoch: int, config: Mapping, steps: Mapping[str, tuple[float, float]]) -> int:
    """Return the last epoch. steps: what is spent of each budget, and what an epoch spends."""
    last = config.get("epochs") or epoch
    for name, limit in (config.get("budget") or {}).items():
        spent, each = steps.get(name, (0.0, 0.0))
        if limit is not None and each > 0:
            last = min(last, epoch + max(0, math.ceil((limit - spent) / each)))
    return last


def _rest(
    epoch: int, last: int, seconds: float, evaluations: Sequence[Mapping], config: Mapping
) -> Progress:
    """Return the progress where all epochs to come take `seconds`."""
    every = (config.get("eval") or {}).get("every") or last
    due = last // every - epoch // every + (last % every > 0)
    evaluation = _median([_evaluation(record) for record in evaluations[-RECENT:]])
    return Progress(epoch, last, max(0.0, seconds + due * evaluation))


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
