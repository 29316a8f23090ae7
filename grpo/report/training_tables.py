"""Computes the tables about the training itself: where its time went, and whether it is healthy."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from grpo.records.run_log import EXPERTS, number
from grpo.report.charts import SERIES

STAGES = {
    "sample": "sampling",
    "decode": "VAE decoding",
    "score_wait": "waiting for scores",
    "update": "policy update",
    "save": "checkpoints",
}


class HealthMetric(NamedTuple):
    label: str  # on the page
    worst: Callable  # min or max: picks the worst of its values
    expected: str  # in a healthy run


HEALTH = {  # key in an epoch's record: metric
    "ratio_max_error": HealthMetric(
        "first update's |ratio − 1|", max, "0 but for rounding: sampling and update agree"
    ),
    "clip_fraction": HealthMetric(
        "ratios clipped or left out", max, "a share of 0 to 1; near 1 nothing is learnt"
    ),
    "approx_kl": HealthMetric("KL to the sampling policy", max, "small and steady"),
    "kl": HealthMetric("KL to the reference model", max, "grows slowly"),
    "flow_error": HealthMetric(
        "flow-matching error", max, "no jumps; depends on the noise levels drawn"
    ),
    "preferred": HealthMetric(
        "pairs ordered rightly", min, "a share of 0 to 1; rises above 1/2 after the first updates"
    ),
    "agreed": HealthMetric(
        "videos on their side of the median",
        min,
        "a share of 0 to 1; rises above 1/2 after some updates",
    ),
    "data_error": HealthMetric("flow-matching error on the data", max, "no rise"),
    "data_share": HealthMetric(
        "the data's share of the loss", max, "a share of 0 to 1; choose data.weight by it"
    ),
    "old_distance": HealthMetric(
        "distance from the behaviour policy", max, "small and steady: mean square of velocities"
    ),
    "grad_norm": HealthMetric("gradient norm", max, "no jumps; before clipping"),
    "policy_loss": HealthMetric(
        "policy loss", max, "falls on data and labels; no trend where advantages are centred"
    ),
    "group_std": HealthMetric(
        "reward spread within groups", min, "the learning signal; 0 teaches nothing"
    ),
    "group_spread": HealthMetric(
        "difference of a group's latents", min, "no fall to a part of the first value"
    ),
    "zero_std_fraction": HealthMetric(
        "groups without spread", max, "a share of 0 to 1; near 1 nothing is learnt"
    ),
    "failed_scores": HealthMetric("failed scores", max, "0; such videos are masked, not punished"),
    "nonfinite_videos": HealthMetric(
        "videos that are not finite", max, "0; they are among the failed scores"
    ),
}


def timings(metrics: list[dict], evaluations: list[dict]) -> dict | None:
    """Average the seconds of each stage over the epochs after the first, which compiles.

    Args:
      metrics: one record per epoch, oldest first.
      evaluations: records of held-out evaluations.

    Returns:
      What the template shows: `epochs`, the number averaged (0 if the first is the only one); `bar`,
      (name, class of its colour, share of 0 to 1) of each stage; `rows` of the table; `idle_share`,
      the mean share of an epoch in which the device waits for the host, or None; the number of
      `evaluations` and their mean `evaluation_seconds`. None if no epoch recorded its seconds.
    """
    recorded = [m["seconds"] for m in metrics if isinstance(m.get("seconds"), dict)]
    if not recorded:
        return None
    epochs = [
        {k: v for k in seconds if (v := number(seconds, k)) is not None} for seconds in recorded
    ]
    first, steady = epochs[0], epochs[1:] or epochs
    stages = [stage for stage in dict.fromkeys(k for e in epochs for k in e) if stage != "total"]
    means = [float(np.mean([seconds.get(stage, 0.0) for seconds in steady])) for stage in stages]
    total = sum(means) or 1.0
    bar, rows = [], []
    for i, (stage, mean) in enumerate(zip(stages, means)):
        name, share = STAGES.get(stage, stage), mean / total
        bar.append((name, f"s{i % SERIES}", share))
        rows.append([name, f"{mean:.2f}", f"{share:.0%}", f"{first.get(stage, 0.0):.2f}"])
    in_first = sum(first.get(stage, 0.0) for stage in stages)
    rows.append(["all stages", f"{total:.2f}", "100%", f"{in_first:.2f}"])
    idle = [m["idle_share"] for m in metrics if number(m, "idle_share") is not None]
    evaluated = [e["seconds"] for e in evaluations if number(e, "seconds") is not None]
    return {
        "epochs": len(epochs) - 1,
        "bar": bar,
        "rows": rows,
        "idle_share": np.mean(idle[1:] or idle) if idle else None,
        "evaluations": len(evaluated),
        "evaluation_seconds": np.mean(evaluated) if evaluated else None,
    }


def health_rows(metrics: list[dict]) -> list[list[str]]:
    """Return the health table's rows: label, first, last and worst value, what is expected.

    metrics: one record per epoch. Where two experts are trained, a metric's row is followed by one
    row for each of them.
    """
    records: dict[str, list[dict]] = {}  # expert: its part of each epoch's record
    for m in metrics:
        experts = m[EXPERTS] if isinstance(m.get(EXPERTS), dict) else {}
        for expert, values in experts.items():
            if isinstance(values, dict):
                records.setdefault(expert, []).append(values | {"epoch": m["epoch"]})
    rows = []
    for key, metric in HEALTH.items():
        rows += _health_row(metrics, key, metric)
        for expert, own in records.items():
            label = f"{metric.label}, {expert}"
            rows += _health_row(own, key, metric._replace(label=label, expected=""))
    return rows


def _health_row(records: list[dict], key: str, metric: HealthMetric) -> list[list[str]]:
    """Return one row, or none if no record has the metric.

    Where an epoch has several updates, its mean is under `key` and its extremes under `key`_min and
    `key`_max: the worst value is taken from these. A value that is not finite is the worst.
    """
    found = [m for m in records if number(m, key) is not None]
    if not found:
        return []
    bad = [(m[key], m["epoch"]) for m in found if not math.isfinite(m[key])]
    extremes = []
    for m in found:
        extreme = number(m, f"{key}_{metric.worst.__name__}")
        extremes.append((m[key] if extreme is None else extreme, m["epoch"]))
    worst, epoch = bad[0] if bad else metric.worst(extremes, key=lambda pair: pair[0])
    first, last = found[0][key], found[-1][key]
    return [
        [
            metric.label,
            f"{first:.3g}",
            f"{last:.3g}",
            f"{worst:.3g} (epoch {epoch})",
            metric.expected,
        ]
    ]
