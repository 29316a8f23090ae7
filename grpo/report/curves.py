"""Small curves of everything that a run records by epoch, as inline SVG without a library."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from grpo.records.run_log import number
from grpo.report.run_records import RunRecords
from grpo.report.training_tables import HEALTH

WIDTH, HEIGHT, MARGIN = 240, 56, 5  # of a curve, in its own units
POINTS = 200  # of a line; more epochs are averaged
# records that count something, and are no curves
COUNTS = """
epoch frames evaluations evaluations_saved updates videos_trained videos spent_evaluations spent_seconds
retried_scores reward_std peak_memory
""".split()
LABELS: dict[str, str] = {
    "reward_mean": "reward",
    "kl_share": "KL's share of the loss",
    "kl_weight": "weight of the KL",
    "update_norm": "norm of the update",
    "grad_rms": "RMS of the clipped gradient",
    "log_ratio": "change of log-probs",
    "weak_groups": "groups below the least spread",
    "learning_rate": "learning rate",
    "idle_share": "share of an epoch in which the device waits",
    "ratio_mean": "mean importance ratio",
} | {key: metric.label for key, metric in HEALTH.items()}
FIRST = ("reward_mean", "kl", "grad_norm", "kl_share", "policy_loss")  # on the page

Points = Sequence[tuple[float, float]]  # (epoch, value)


@dataclasses.dataclass(frozen=True)
class SmallCurve:
    """A curve as the page shows it.

    Attributes:
        label: what is drawn.
        last: the newest value.
        range: the least and the largest value.
        line: path of the epochs' values, as the attribute d of an SVG path.
        dots: x and y of the held-out evaluations.
        description: for screen readers.
    """

    label: str
    last: str
    range: str
    line: str
    dots: Sequence[tuple[float, float]]
    description: str


def small_curves(run: RunRecords) -> dict[str, list[SmallCurve]]:
    """Return the curves under their headings: what training optimises and watches of itself, and each
    reward and measure. Those that are 0 throughout are left out.
    """
    last = max([run.last_epoch, *(e["epoch"] for e in run.evaluations)], default=0)
    keys: list[str] = [k for record in run.metrics for k in record if number(record, k) is not None]
    keys = [k for k in dict.fromkeys(keys) if k not in COUNTS and not k.endswith(("_min", "_max"))]
    keys = [*(k for k in FIRST if k in keys), *(k for k in keys if k not in FIRST)]
    training = [
        _curve(LABELS.get(key, key), _points(run.metrics, key), _heldout(run, key), last)
        for key in keys
    ]
    means: list[dict] = [{"epoch": m["epoch"]} | _dict(m, "rewards") for m in run.metrics]
    measured: list[dict] = [
        {"epoch": e["epoch"]} | {k: v[0] for k, v in _dict(e, "measures").items() if v}
        for e in run.evaluations
    ]
    names = dict.fromkeys(k for record in (*means, *measured) for k in record if k != "epoch")
    measures = [_curve(name, _points(means, name), _points(measured, name), last) for name in names]
    steps = [{"epoch": m["epoch"]} | _dict(m, "log_ratio_by_step") for m in run.metrics]
    numbers = sorted({k for record in steps for k in record if k.isdigit()}, key=int)
    by_step = [_curve(f"step {k}", _points(steps, k), [], last) for k in numbers]
    groups = {
        "Training": training,
        "Change of log-probs by denoising step": by_step,
        "Rewards and measures of the videos": measures,
    }
    return {
        heading: [curve for curve in curves if curve is not None]
        for heading, curves in groups.items()
        if any(curves)
    }


def _dict(record: dict, key: str) -> dict:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _points(records: Sequence[dict], key: str) -> Points:
    found = [(r["epoch"], number(r, key)) for r in records]
    return [(epoch, v) for epoch, v in found if v is not None and math.isfinite(v)]


def _heldout(run: RunRecords, key: str) -> Points:
    return _points(run.evaluations, "reward") if key == "reward_mean" else []


def _curve(label: str, line: Points, dots: Points, last: int) -> SmallCurve | None:
    """Return a curve over the epochs 0 to `last`; None if it is 0 throughout or has no points."""
    values = [value for _, value in (*line, *dots)]
    if not any(values):
        return None
    low, high = min(values), max(values)
    newest = (line or dots)[-1]
    first = (line or dots)[0]

    def place(points: Points) -> list[tuple[float, float]]:
        return [
            (
                round(MARGIN + (WIDTH - 2 * MARGIN) * epoch / max(last, 1), 1),
                round(
                    HEIGHT / 2
                    if high == low
                    else HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / (high - low),
                    1,
                ),
            )
            for epoch, value in points
        ]

    placed = place(_thinned(line))
    path = " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(placed))
    if len(placed) == 1:
        path += " h0"  # with round ends a dot
    return SmallCurve(
        label,
        f"{newest[1]:.3g}",
        f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}",
        path,
        place(dots),
        f"{label}: {first[1]:.3g} after epoch {first[0]}, {newest[1]:.3g} after epoch {newest[0]}, "
        f"between {low:.3g} and {high:.3g}",
    )


def _thinned(points: Points) -> Points:
    """Return at most `POINTS` points: means of as many neighbours as needed."""
    if len(points) <= POINTS:
        return points
    parts = np.array_split(np.asarray(points, float), POINTS)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]
