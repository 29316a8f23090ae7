"""The guard against reward hacking: judges every evaluation of a run, and names the best checkpoint.

A reward is a proxy of what the user wants, and training finds its gaps. Two things are watched in the
held-out evaluations, which all have the same prompts and the same noise:

    panel   measures of quality that training does not optimise (`reward.panel`). One of them is
            outside where its mean m differs from the base model's m_0 by more than `tolerance`
            standard deviations s_0 of the base model's videos: |m - m_0| > tolerance s_0.
    fall    the main reward has fallen where its interval lies below that of the best evaluation.

The best checkpoint has the highest lower bound of the main reward among those whose panel is inside;
the base model counts. An evaluation chooses by the prompts of even number and reports by the others
(`halves`), since a mean that was chosen for its height is too high.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from grpo.records.statistics import LEAST_VALUES, bootstrap_interval

CHOOSE, REPORT = "choose", "report"  # keys of an evaluation's record, and names of the halves


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the guard says of one evaluation.

    Attributes:
        epoch: after which it was made.
        low: lower bound of the main reward's interval on the prompts that choose.
        outside: of each measure outside, how many standard deviations it moved, with sign.
        fallen: epoch of the best evaluation before, if the reward has fallen since; else None.
    """

    epoch: int
    low: float
    outside: Mapping[str, float]
    fallen: int | None

    @property
    def alarm(self) -> str:
        """The reason of an alarm in words; "" where there is none."""
        reasons = [
            f"{name} moved by {moved:+.1f} standard deviations of the base model's videos"
            for name, moved in sorted(self.outside.items())
        ]
        if self.fallen is not None:
            reasons.append(f"the held-out reward has fallen below that of epoch {self.fallen}")
        return "; ".join(reasons)


def halves(rewards: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """Return {"choose" | "report": {"reward", "low", "high"}}: mean and 95 % interval of the rewards
    of even and of odd prompts; nan where fewer than two are finite.

    rewards: [N], nan without a score. seed: of the bootstrap samples.
    """
    found = {}
    for name, half in ((CHOOSE, rewards[::2]), (REPORT, rewards[1::2])):
        enough = np.isfinite(half).sum() >= LEAST_VALUES
        values = bootstrap_interval(half, seed=seed) if enough else [math.nan] * 3
        found[name] = dict(zip(("reward", "low", "high"), map(float, values), strict=True))
    return found


def judge(evaluations: Sequence[Mapping], panel: Sequence[str], tolerance: float) -> list[Verdict]:
    """Return the verdict on each evaluation that has a result, oldest first.

    evaluations: records of evals.jsonl, oldest first. The first one with a result is the base.
    Evaluations on other prompts than the newest one's are left out, and so are records without
    halves, of earlier versions. panel: names of measures. tolerance: in standard deviations.
    """
    usable = [e for e in evaluations if math.isfinite(e.get(CHOOSE, {}).get("low", math.nan))]
    usable = [e for e in usable if e["prompts"] == usable[-1]["prompts"]]
    verdicts: list[Verdict] = []
    for evaluation in usable:
        epoch, chosen = evaluation["epoch"], evaluation[CHOOSE]
        outside = {
            name: moved
            for name, moved in movements(usable[0], evaluation, panel).items()
            if abs(moved) > tolerance
        }
        before = best(verdicts)
        fallen = before.epoch if before is not None and chosen["high"] < before.low else None
        verdicts.append(Verdict(epoch, chosen["low"], outside, fallen))
    return verdicts


def movements(base: Mapping, evaluation: Mapping, panel: Sequence[str]) -> dict[str, float]:
    """Return by how many of the base's standard deviations the mean of each measure has moved since
    the base; measures that one of the two lacks are left out.

    A measure that did not vary in the base gets a thousandth of its mean as standard deviation.
    """
    before, after = base.get("measures", {}), evaluation.get("measures", {})
    moved = {}
    for name in panel:
        (start, deviation), (now, _) = (m.get(name) or (math.nan,) * 2 for m in (before, after))
        change = (now - start) / max(deviation, 1e-3 * abs(start), 1e-6)
        if math.isfinite(change):
            moved[name] = change
    return moved


def best(verdicts: Sequence[Verdict]) -> Verdict | None:
    """Return the verdict with the highest lower bound among those whose panel is inside, the earliest
    of equal ones; None without any verdict.
    """
    inside = [verdict for verdict in verdicts if not verdict.outside]
    return max(inside, key=lambda verdict: verdict.low, default=None)


def explain(verdicts: Sequence[Verdict], evaluations: Sequence[Mapping]) -> str:
    """Return one sentence that names the best epoch, its reward, and why no later one is better; ""
    without verdicts.
    """
    chosen = best(verdicts)
    if chosen is None:
        return ""
    record = next(e for e in evaluations if e["epoch"] == chosen.epoch and CHOOSE in e)
    report = record[REPORT]
    sentence = (
        f"The best checkpoint is epoch {chosen.epoch}: reward {report['reward']:.2f} "
        f"[{report['low']:.2f}, {report['high']:.2f}] on the held-out prompts that did not choose it"
    )
    last = verdicts[-1]
    if last.epoch == chosen.epoch:
        return f"{sentence}; it is the newest evaluation."
    higher = [v for v in verdicts if v.outside and v.low > chosen.low]
    if higher:
        top = max(higher, key=lambda verdict: verdict.low)
        return f"{sentence}. Epoch {top.epoch} has a higher reward, but {top.alarm}."
    if last.fallen is not None:
        return f"{sentence}. The reward has fallen since, to epoch {last.epoch}."
    return f"{sentence}. Later evaluations are not better."
