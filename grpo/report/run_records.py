"""Reads what the report needs from a run's folder."""

import dataclasses
import functools
import math
import pathlib

import numpy as np

from grpo.records import run_log
from grpo.records.progress import Progress, estimate
from grpo.scoring import guard

BETWEEN = 3  # evaluations between the first and the last one that the report shows


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """What a run's folder holds."""

    folder: pathlib.Path
    config: dict  # {} if it cannot be read
    metrics: list[dict]  # one record per epoch, oldest first
    recorded: list[dict]  # every held-out evaluation, oldest first
    starts: list[dict]  # entries of provenance.json, oldest first

    @classmethod
    def read(cls, folder: pathlib.Path) -> "RunRecords":
        return cls(
            folder,
            run_log.read_config(folder),
            run_log.read_metrics(folder),
            run_log.read_evaluations(folder),
            run_log.read_starts(folder),
        )

    def until(self, epoch: int) -> "RunRecords":
        """Return what was recorded up to an epoch."""
        first = {"metrics": self.metrics, "recorded": self.recorded}
        first = {k: [r for r in v if r["epoch"] <= epoch] for k, v in first.items()}
        starts = [s for s in self.starts if (run_log.number(s, "epoch") or 0) < max(epoch, 1)]
        return dataclasses.replace(self, **first, starts=starts)

    @functools.cached_property
    def evaluations(self) -> list[dict]:
        """The evaluations that the report compares."""
        return comparable(self.recorded)

    @functools.cached_property
    def limits(self) -> guard.Limits:
        """What the guard watches."""
        return guard.Limits.of(self.config)

    @functools.cached_property
    def verdicts(self) -> list[guard.Verdict]:
        """What the guard says of the evaluations."""
        return guard.judge(self.recorded, self.limits, self.metrics)

    @property
    def ends(self) -> list[dict]:
        """The first and the last of `evaluations`; fewer if there are not two."""
        return self.evaluations[:1] + self.evaluations[1:][-1:]

    @property
    def trained(self) -> bool:
        """Whether this is a run of training, maybe before its first epoch, and no evaluation alone."""
        return bool(self.metrics) or (self.folder / "checkpoints").is_dir()

    @functools.cached_property
    def progress(self) -> Progress:
        """How far the run is."""
        return estimate(self.metrics, self.recorded, self.config)

    @functools.cached_property
    def between(self) -> list[tuple[dict, np.ndarray]]:
        """Some evaluations between `ends` that have previews: the best one, and others evenly."""
        inner = self.evaluations[1:-1]
        even = np.linspace(-1, len(inner), BETWEEN + 2).round()[1:-1].astype(int).tolist()
        best = guard.best(self.verdicts)
        chosen = {inner[i]["epoch"] for i in even if 0 <= i < len(inner)}
        if best is not None and best.epoch in [e["epoch"] for e in inner]:
            chosen.add(best.epoch)
        return self._with_previews([e for e in inner if e["epoch"] in chosen])

    @functools.cached_property
    def previews(self) -> list[tuple[dict, np.ndarray]]:
        """Those of `ends` that have previews, each with its videos uint8 [n, T, H, W, 3]."""
        return self._with_previews(self.ends)

    def _with_previews(self, evaluations: list[dict]) -> list[tuple[dict, np.ndarray]]:
        read = [(e, run_log.read_previews(self.folder, e["epoch"])) for e in evaluations]
        return [(evaluation, videos) for evaluation, videos in read if videos is not None]

    @property
    def last_epoch(self) -> int:
        """The last epoch of the log, 0 if there is none."""
        return self.metrics[-1]["epoch"] if self.metrics else 0


def comparable(evaluations: list[dict]) -> list[dict]:
    """Return the evaluations that have a result on the prompts of the newest one with a result.

    A resumed run may have been given other prompts.
    """
    scored = [e for e in evaluations if math.isfinite(e["reward"])]
    return [e for e in scored if e["prompts"] == scored[-1]["prompts"]]


def without_result(evaluations: list[dict]) -> str:
    """Name the evaluations that scored fewer than two videos; "" if there are none."""
    epochs = [str(e["epoch"]) for e in evaluations if not math.isfinite(e["reward"])]
    if not epochs:
        return ""
    plural = "s" if len(epochs) > 1 else ""
    return (
        f"no result of the evaluation{plural} after epoch{plural} {', '.join(epochs)}: fewer than "
        "two videos could be scored"
    )
