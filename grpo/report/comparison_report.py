"""What runs of several methods under one budget achieved: their curves over seeds, a table, and a
page.

A run's curve is its held-out reward at every evaluation, over what the run had spent by then
(`grpo.settings.budget`). Seeds are averaged at the same spending, on straight lines between a run's
evaluations, up to what all of them spent; bands are Student's intervals over seeds.
"""

import dataclasses
import html
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from grpo.records import run_log
from grpo.records.statistics import t_interval
from grpo.report.charts import chart
from grpo.report.page import COLORS, page, table
from wan_jax.errors import UserError

SURE = "95\N{NO-BREAK SPACE}%"
AXES = {"evaluations": "evaluations of the model", "seconds": "seconds of training"}
DASHES = ("-", "--", ":")
# what the held-out reward depends on beside the weights
HELDOUT = (
    "model.path",
    "prompts.heldout",
    "prompts.negative",
    "sample.frames",
    "sample.height",
    "sample.width",
    "sample.shift",
    "reward.rule",
    "reward.engine",
    "reward.max_frames",
    "eval.",
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run's held-out evaluations, [E] each."""

    epochs: np.ndarray
    evaluations: np.ndarray
    seconds: np.ndarray
    rewards: np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
    methods: Mapping[str, str]  # name: recipe and settings
    runs: Mapping[str, Mapping[int, Curve]]  # name, seed: the finished runs
    budget: tuple[str, float]  # unit, amount
    reach: float  # the gain to which is told what it took
    failures: Mapping[str, str]  # run: its last words
    parallel: int  # runs at the same time
    command: str
    differing: Sequence[str]  # settings of the held-out evaluation that the methods do not share


def read_curve(folder) -> Curve:
    """Of a run's folder, without evaluations that have no result. Raises `UserError` where these
    are the first or the last, which tell what the run gained, and where an evaluation has no record
    of its epoch.
    """
    spent = {0: (0, 0.0)}
    for m in run_log.read_metrics(folder):
        both = tuple(run_log.number(m, f"spent_{name}") for name in AXES)
        if None not in both:
            spent[m["epoch"]] = both
    records = run_log.read_evaluations(folder)
    if not records:
        raise UserError(
            f"{folder}: {run_log.EVALUATIONS} has no evaluation; remove the folder to run it again"
        )
    if missing := [r["epoch"] for r in records if r["epoch"] not in spent]:
        raise UserError(
            f"{folder}: {run_log.METRICS} has no record of epoch {missing[0]}, which was "
            "evaluated; remove the folder to run it again"
        )
    if lost := [
        r["epoch"] for r in (*records[:1], *records[-1:]) if not math.isfinite(r["reward"])
    ]:
        raise UserError(
            f"the evaluation after epoch {lost[0]} scored fewer than two videos; remove {folder} "
            "to run it again"
        )
    records = [r for r in records if math.isfinite(r["reward"])]
    evaluations, seconds = zip(*(spent[r["epoch"]] for r in records))
    return Curve(
        np.array([r["epoch"] for r in records]),
        np.array(evaluations),
        np.array(seconds),
        np.array([r["reward"] for r in records]),
    )


def differing(configs: Mapping[str, Mapping]) -> list[str]:
    """Keys of `HELDOUT` with unlike values in flat configs."""
    first, *others = configs.values()
    return [
        key
        for key in sorted(first)
        if any(key == h or (h.endswith(".") and key.startswith(h)) for h in HELDOUT)
        and key not in ("eval.every", "eval.previews")
        and any(other[key] != first[key] for other in others)
    ]


def mean_curve(curves: Sequence[Curve], axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, half the width of the interval over seeds), [P] each; the half-width is NaN for one
    seed.
    """
    xs = [getattr(c, axis).astype(np.float64) for c in curves]
    grid = np.unique(np.concatenate(xs))
    grid = grid[grid <= min(x[-1] for x in xs)]
    at = np.stack([np.interp(grid, x, c.rewards) for x, c in zip(xs, curves)])  # [seeds, P]
    mean, half = zip(*(t_interval(column) for column in at.T))
    return grid, np.array(mean), np.array(half)


def first_reached(curve: Curve, axis: str, gain: float) -> float:
    """What the run had spent when its reward was first `gain` above its start, on straight lines
    between evaluations; NaN if it never was.
    """
    x, above = (
        getattr(curve, axis).astype(np.float64),
        curve.rewards - curve.rewards[0] - gain + 1e-9,
    )
    i = int(np.argmax(above >= 0))
    if not above[i] >= 0:
        return math.nan
    return float(
        x[i] if i == 0 else x[i - 1] + (x[i] - x[i - 1]) * above[i - 1] / (above[i - 1] - above[i])
    )


def summary(curves: Sequence[Curve], gain: float) -> dict:
    """A method's row: (mean, half the width) over seeds of each figure, and how many seeds reached
    the gain.
    """
    row = {
        "start": t_interval([c.rewards[0] for c in curves]),
        "end": t_interval([c.rewards[-1] for c in curves]),
        "gain": t_interval([c.rewards[-1] - c.rewards[0] for c in curves]),
    }
    for axis in AXES:
        reached = [x for c in curves if not math.isnan(x := first_reached(c, axis, gain))]
        row |= {f"{axis}_to_reach": t_interval(reached), "reached": len(reached)}
    return row | {
        name: t_interval([getattr(c, name)[-1] for c in curves]) for name in ("epochs", *AXES)
    }


def write(result: Comparison, out: pathlib.Path) -> list[str]:
    """Writes comparison.json, .md and .html into `out`; returns lines to print."""
    rows = {
        name: summary(list(runs.values()), result.reach)
        for name, runs in result.runs.items()
        if runs
    }
    known = dataclasses.asdict(result) | {"summary": rows}
    files = {
        "json": json.dumps(run_log.plain(known), indent=1, allow_nan=False) + "\n",
        "md": "\n".join(_markdown(result, rows)) + "\n",
        "html": _page(result, rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    for suffix, text in files.items():
        run_log.write_atomically(out / f"comparison.{suffix}", text.encode(errors="replace"))
    return [*_markdown(result, rows), "", f"report: {out / 'comparison.html'}"]


def _head(result: Comparison) -> list[str]:
    to = f"to +{result.reach:g}"
    return [
        "method",
        "seeds",
        "start",
        "end",
        "gain",
        f"evaluations {to}",
        f"seconds {to}",
        "epochs",
        "evaluations",
        "seconds",
    ]


def _cells(name: str, result: Comparison, row: dict) -> list[str]:
    seeds, reached = len(result.runs[name]), row["reached"]
    to = [
        _figure(*row[f"{axis}_to_reach"], ".3g")
        + (f" ({reached} of {seeds})" if 0 < reached < seeds else "")
        if reached
        else "not reached"
        for axis in AXES
    ]
    return [
        name,
        str(seeds),
        *(_figure(*row[k], ".3f") for k in ("start", "end")),
        _figure(*row["gain"], "+.3f"),
        *to,
        *(_figure(row[k][0], math.nan, ",.0f") for k in ("epochs", *AXES)),
    ]


def _figure(mean: float, half: float, form: str) -> str:
    wide = form.lstrip("+")
    if form.endswith("g"):  # three digits, without an exponent
        form = wide = ",.0f" if abs(mean) >= 100 else ".1f"
    return f"{mean:{form}}" + ("" if math.isnan(half) else f" ± {half:{wide}}")


def _notes(result: Comparison) -> list[str]:
    unit, amount = result.budget
    seeds = max(map(len, result.runs.values()), default=0)
    notes = [
        f"Budget of each run: {amount:,g} {AXES.get(unit, unit)}; a run ends after the epoch that "
        "reaches it. Evaluations are the model's while sampling, one a video and step; the "
        "update's passes are not counted. Seconds are sampling, decoding, scoring and update, "
        "without start, compilation, evaluation and checkpoints"
        + (
            f", with {result.parallel} runs at the same time on one machine."
            if result.parallel > 1
            else "."
        ),
        f"± and bands: Student's {SURE} intervals over seeds, which begin with the same model on "
        "the same held-out prompts and noise."
        if seeds > 1
        else "One seed says nothing about how runs differ: no bands.",
    ]
    if result.differing:
        notes.append(
            "The methods were not evaluated alike, so their rewards do not compare: they differ in "
            f"{', '.join(result.differing)}."
        )
    return notes + [
        f"{run} failed and is left out: {error}" for run, error in result.failures.items()
    ]


def _markdown(result: Comparison, rows: dict) -> list[str]:
    head = _head(result)
    return [
        "| " + " | ".join(head) + " |",
        "|---|" + "--:|" * (len(head) - 1),
        *("| " + " | ".join(_cells(name, result, row)) + " |" for name, row in rows.items()),
        "",
        *(f"- {note}" for note in _notes(result)),
    ]


def _headline(result: Comparison, rows: dict) -> tuple[str, str]:
    """(who ended highest, or equal to whom; the same with figures): one sentence each."""
    if not rows:
        return "no run was finished", "No run was finished."
    ranked = sorted(rows, key=lambda name: -rows[name]["end"][0])
    best, seeds = rows[ranked[0]], len(result.runs[ranked[0]])
    equal = [
        name for name in ranked if math.isclose(rows[name]["end"][0], best["end"][0], abs_tol=1e-9)
    ]
    if len(rows) == 1:
        who = f"{ranked[0]} alone was run"
    elif len(equal) == len(rows):
        who = f"{_listed(equal)} ended equal"
    elif len(equal) > 1:
        who = f"{_listed(equal)} ended equal and highest of {len(rows)}"
    else:
        who = f"{ranked[0]} ended highest of {len(rows)}"
    text = (
        f"{who}: held-out OCR reward {best['start'][0]:.2f} → {_figure(*best['end'], '.2f')} over "
        f"{seeds} seed{'s' if seeds > 1 else ''}."
    )
    alike = [
        name
        for name in ranked
        if name not in equal and sum(rows[name]["end"]) >= best["end"][0] - best["end"][1]
    ]
    if not alike:
        return who, text
    return f"{who}, intervals overlap", (
        f"{text} The {SURE} interval of {ranked[0]} overlaps with "
        f"{'that' if len(alike) == 1 else 'those'} of {_listed(alike)}: these seeds "
        "do not tell them apart."
    )


def _listed(names: Sequence[str]) -> str:
    """'a', 'a and b' or 'a, b and c'."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _page(result: Comparison, rows: dict) -> str:
    look = {name: (f"s{i % 6}", DASHES[i // 6 % len(DASHES)]) for i, name in enumerate(rows)}

    def reward_over(axis: str):
        def draw(ax):
            for name, (color, dash) in look.items():
                x, mean, half = mean_curve(list(result.runs[name].values()), axis)
                ax.fill_between(x, mean - half, mean + half, color=COLORS[color], alpha=0.15, lw=0)
                ax.plot(x, mean, dash, color=COLORS[color], lw=1.8, marker="o", ms=3.5, label=name)
            rewards = np.concatenate(
                [c.rewards for runs in result.runs.values() for c in runs.values()]
            )
            # intervals of few seeds are wider than all that was seen
            margin = np.ptp(rewards) / 2 + 0.01
            ax.set_ylim(rewards.min() - margin, rewards.max() + margin)
            ax.set_xlabel(AXES[axis])
            ax.set_ylabel("held-out OCR reward")

        return draw

    caption = (
        f"Mean over seeds; the band is the {SURE} interval, cut off where it leaves the chart."
    )
    charts = (
        [
            chart(reward_over(axis), caption, f"held-out reward over {AXES[axis]}", columns=4)
            for axis in AXES
        ]
        if rows
        else []
    )
    cells = []
    for name, row in rows.items():
        first, *others = map(html.escape, _cells(name, result, row))
        cells.append([f'<i class="dot {look[name][0]}"></i>{first}', *others])
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in _notes(result))
    who, headline = _headline(result, rows)
    sections = [
        ("", f'<p class="lead">{html.escape(headline)}</p>{notes}'),
        ("Reward by evaluations", charts[0] if charts else ""),
        ("Reward by time", charts[1] if charts else ""),
        ("Figures", table(_head(result), cells, escape=False) if rows else ""),
        (
            "Methods",
            table(["method", "recipe and settings"], [[*m] for m in result.methods.items()]),
        ),
        ("Run it again", f"<pre>{html.escape(result.command)}</pre>"),
    ]
    return page(
        "Comparison of methods",
        html.escape(f"Comparison of methods: {who}"),
        [s for s in sections if s[1]],
    )
