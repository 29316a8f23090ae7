"""The guard against reward hacking: judges every evaluation of a run, and names the best checkpoint.

A reward is a proxy of what the user wants, and training finds its gaps. Three things (panel, judges,
fall) are watched in the held-out evaluations, which all have the same prompts and the same noise, and
one (spread) in the epochs:

    panel   measures of quality that training does not optimise (`reward.panel`). One of them is
            outside where its mean m differs from the base model's m_0 by more than `tolerance`
            standard deviations s_0 of the base model's videos: |m - m_0| > tolerance s_0.
    judges  rewards without a weight, such as a second reader. One of them has fallen where its
            interval lies below that of its best evaluation.
    spread  how different the videos of a group are (`group_spread`), relative to the first epoch,
            which the starting model samples. It is too small below a floor. A change of the videos' size
            or length is not counted.
    fall    the main reward has fallen where its interval lies below that of the best evaluation.

Each raises the alarm. The best checkpoint has the highest lower bound of the main reward among those
without an alarm of the first three kinds; the base model is a candidate too. The prompts of even
number choose and the others report (`halves`), since a mean that was chosen for its height is too
high.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from grpo.records.statistics import LEAST_VALUES, bootstrap_interval
from grpo.scoring.reward_combination import BAD_SIDE, against_base
from grpo.settings.named import pairs

CONFIDENCE = 1.96  # standard errors on each side of a mean, 95 %
SIZE = ("frames", "height", "width", "shift")  # keys of an epoch's record
CHOOSE, REPORT = "choose", "report"  # keys of an evaluation's record, and names of the halves


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the guard says of one evaluation.

    Attributes:
        epoch: after which it was made.
        low: lower bound of the main reward's interval on the prompts that choose.
        outside: of each measure outside, how many standard deviations it moved, with sign.
        fallen: epoch of the best evaluation before, if the reward has fallen since; else None.
        judges: of each reward without a weight that has fallen, the epoch of its best evaluation.
        spread: the spread of the groups as a share of the first epoch's, if it is too small.
    """

    epoch: int
    low: float
    outside: Mapping[str, float]
    fallen: int | None
    judges: Mapping[str, int] = dataclasses.field(default_factory=dict)
    spread: float | None = None

    @property
    def inside(self) -> bool:
        """Whether the checkpoint may be the best one."""
        return not self.outside and not self.judges and self.spread is None

    @property
    def alarm(self) -> str:
        """The reason of an alarm in words; "" where there is none."""
        reasons = [
            f"{name} moved by {moved:+.1f} standard deviations of the base model's videos"
            for name, moved in sorted(self.outside.items())
        ]
        reasons += [
            f"{name} has fallen below that of epoch {epoch}"
            for name, epoch in sorted(self.judges.items())
        ]
        if self.spread is not None:
            reasons.append(f"the videos of a group differ by {self.spread:.0%} of what they did")
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


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the guard watches, and when it raises the alarm.

    Attributes:
        panel: names of measures of quality.
        tolerance: of the panel, in standard deviations.
        spread: floor of the relative spread of the groups; 0: none.
        trained: names of the rewards with a weight. The others are judges, but measures of quality.
    """

    panel: Sequence[str]
    tolerance: float
    spread: float = 0.0
    trained: Sequence[str] = ()

    @classmethod
    def of(cls, config: Mapping) -> "Limits":
        """Return the limits of a run's settings, nested. Those that a run of an earlier version did
        not have are off.
        """
        train, reward = (config.get(section, {}) for section in ("train", "reward"))
        tolerance = train.get("alarm_tolerance")
        weights = reward.get("weights", {}) | dict(pairs(reward.get("own_weights"), float))
        return cls(
            panel=tuple(reward.get("panel", ())),
            tolerance=math.inf if tolerance is None else tolerance,
            spread=train.get("alarm_spread", 0.0),
            trained=[name for name, weight in weights.items() if weight],
        )


def judge(
    evaluations: Sequence[Mapping], limits: Limits, epochs: Sequence[Mapping] = ()
) -> list[Verdict]:
    """Return the verdict on each evaluation that has a result, oldest first.

    evaluations: records of evals.jsonl, oldest first. The first one with a result is the base.
    Evaluations on other prompts than the newest one's are left out, and so are records without
    halves, of earlier versions. Where the main reward is a measure of quality, they are judged by the
    penalty that training uses. epochs: records of metrics.jsonl, oldest first.
    """
    usable = [e for e in evaluations if math.isfinite(e.get(CHOOSE, {}).get("low", math.nan))]
    usable = [e for e in usable if e["prompts"] == usable[-1]["prompts"]]
    shares = relative_spreads(epochs)
    verdicts: list[Verdict] = []
    for number, evaluation in enumerate(usable):
        epoch, chosen = evaluation["epoch"], chosen_by(usable[0], evaluation)
        outside = {
            name: moved
            for name, moved in movements(usable[0], evaluation, limits.panel).items()
            if abs(moved) > limits.tolerance
        }
        before = best(verdicts)
        fallen = before.epoch if before is not None and chosen["high"] < before.low else None
        since = usable[number - 1]["epoch"] if number else epoch
        newest = [share for at, share in shares.items() if since < at <= epoch]
        spread = float(np.mean(newest)) if newest else math.inf
        verdicts.append(
            Verdict(
                epoch,
                chosen["low"],
                outside,
                fallen,
                judges=fallen_judges(usable[: number + 1], limits.trained),
                spread=spread if spread < limits.spread else None,
            )
        )
    return verdicts


def chosen_by(base: Mapping, evaluation: Mapping) -> Mapping[str, float]:
    """Return the mean and the interval by which an evaluation chooses. A measure of quality as the
    main reward is neither good nor bad where it is high: its `reward_combination.against_base` counts.
    base: the first evaluation.
    """
    name = evaluation.get("main")
    mean, deviation = base.get("measures", {}).get(name) or (math.nan,) * 2
    if name not in BAD_SIDE or not math.isfinite(mean):
        return evaluation[CHOOSE]
    penalties = against_base(name, evaluation["rewards"], mean, deviation)
    return halves(penalties, seed=0)[CHOOSE]


def relative_spreads(epochs: Sequence[Mapping]) -> dict[int, float]:
    """Return the spread of the groups of each epoch as a share of the first epoch's; {} where that one
    is not known. Latents of another size differ by another amount, so the first epoch of a size has the
    share of the epoch before it. epochs: records of metrics.jsonl, oldest first.
    """
    known = [e for e in epochs if math.isfinite(e.get("group_spread", math.nan))]
    if not known or known[0]["epoch"] != 1 or not known[0]["group_spread"] > 0:
        return {}
    shares, size, whole, last = {}, None, math.nan, 1.0
    for record in known:
        spread, own = record["group_spread"], tuple(map(record.get, SIZE))
        if own != size and spread > 0:
            size, whole = own, spread / last
        shares[record["epoch"]] = spread / whole
        last = shares[record["epoch"]] or last
    return shares


def fallen_judges(evaluations: Sequence[Mapping], trained: Sequence[str]) -> dict[str, int]:
    """Return the rewards without a weight whose interval in the last evaluation lies below that of
    their best one, with the epoch of that one. The best one has the highest lower bound. trained:
    names of the rewards with a weight, which are left out with their parts.

    Intervals are mean +- 1.96 standard errors. They ignore that all evaluations have the same prompts
    and noise, so they are too wide, and a small fall is no alarm.
    """
    fallen = {}
    for name in evaluations[-1].get("measures", {}):
        if name in BAD_SIDE or name.partition(".")[0] in trained:
            continue
        bounds = {}
        for evaluation in evaluations:
            mean, deviation = evaluation.get("measures", {}).get(name) or (math.nan,) * 2
            half = CONFIDENCE * deviation / math.sqrt(max(evaluation["num"], 1))
            if math.isfinite(mean):
                bounds[evaluation["epoch"]] = mean - half, mean + half
        last = evaluations[-1]["epoch"]
        if last in bounds:
            best_epoch = max(bounds, key=lambda epoch: bounds[epoch][0])
            if bounds[last][1] < bounds[best_epoch][0]:
                fallen[name] = best_epoch
    return fallen


def kl_is_raised(verdicts: Sequence[Verdict], calm: int) -> bool:
    """Return whether the weight of the KL is raised after the last verdict (train.on_alarm=kl): from an
    alarm on, until `calm` evaluations in a row have none.

    It is a function of the evaluations alone, so a run that continues has the weight that it had.
    """
    return any(verdict.alarm for verdict in verdicts[-calm:])


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
    """Return the verdict with the highest lower bound among those that are `inside`, the earliest of
    equal ones; None without any verdict.
    """
    inside = [verdict for verdict in verdicts if verdict.inside]
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
    higher = [v for v in verdicts if not v.inside and v.low > chosen.low]
    if higher:
        top = max(higher, key=lambda verdict: verdict.low)
        return f"{sentence}. Epoch {top.epoch} has a higher reward, but {top.alarm}."
    if last.fallen is not None:
        return f"{sentence}. The reward has fallen since, to epoch {last.epoch}."
    return f"{sentence}. No later one has a higher lower bound on those that choose."
