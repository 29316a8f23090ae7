"""Compares what runs of several methods achieved under one budget: figures, a table and a page.

A run's curve is its held-out reward at every evaluation over what the run had spent by then
(`grpo.settings.budget`). Seeds are averaged at equal spending, interpolated linearly between a
run's evaluations, up to what every one of them spent. Bands are Student's intervals over seeds.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from grpo.records import json_lines, run_log
from grpo.records.run_files import write_atomically
from grpo.records.statistics import t_interval
from grpo.report.charts import COLORS, SERIES, Chart, chart
from grpo.report.page import CONFIDENCE, render
from wan_jax.errors import UserError

AXES = {"evaluations": "evaluations of the model", "seconds": "seconds of training"}
DASHES = ("-", "--", ":")
# settings that the held-out reward depends on besides the weights; "eval." names its whole section
EVALUATION_SETTINGS = """
model.path prompts.heldout prompts.negative sample.frames sample.height sample.width sample.shift
reward.rule reward.engine reward.max_frames eval.
""".split()
WITHOUT_EFFECT = ("eval.every", "eval.previews")  # on the held-out reward


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run's held-out evaluations: epoch, what was spent by then, and mean reward, [E] each; and the
    name of that reward.
    """

    epochs: np.ndarray
    evaluations: np.ndarray
    seconds: np.ndarray
    rewards: np.ndarray
    reward: str = "OCR reward"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of a comparison; the fields are the keys of comparison.json.

    Attributes:
      methods: recipe and settings of each method.
      runs: curves of the finished runs by method and seed.
      budget: unit and amount.
      reach: gain of the held-out reward whose cost is reported.
      failures: message of each failed run.
      parallel: number of runs at the same time.
      command: the command line.
      differing: settings of the held-out evaluation in which the methods differ.
    """

    methods: Mapping[str, str]
    runs: Mapping[str, Mapping[int, Curve]]
    budget: tuple[str, float]
    reach: float
    failures: Mapping[str, str]
    parallel: int
    command: str
    differing: Sequence[str]

    @property
    def rewards(self) -> list[str]:
        """Names of the held-out rewards of the runs, each once."""
        return sorted({curve.reward for runs in self.runs.values() for curve in runs.values()})

    @property
    def reward(self) -> str:
        """Name of the held-out reward of all runs; "reward" if it is not one."""
        return self.rewards[0] if len(self.rewards) == 1 else "reward"

    def samples(self, name: str) -> bool:
        """Return whether a method sampled: training on data alone spends seconds and no evaluations."""
        return any(c.evaluations[-1] > 0 or c.seconds[-1] == 0 for c in self.runs[name].values())

    def counted(self, axis: str, names: Sequence[str]) -> list[str]:
        """Return the methods with a figure on an axis of `AXES`; evaluations need samples."""
        return [name for name in names if axis != "evaluations" or self.samples(name)]


def read_curve(folder) -> Curve:
    """Read the curve of a run's folder, without the evaluations that have no result.

    Raises:
      UserError: there are no evaluations; one has no record of its epoch; or the first or the last,
        which give the gain, has no result.
    """
    # 1 read what was spent by each epoch
    spent: dict[int, tuple[float, float]] = {0: (0, 0.0)}
    for record in run_log.read_metrics(folder):
        evaluations, seconds = (run_log.number(record, f"spent_{axis}") for axis in AXES)
        if evaluations is not None and seconds is not None:
            spent[record["epoch"]] = (evaluations, seconds)
    # 2 read the evaluations and check that they make a curve
    records = run_log.read_evaluations(folder)
    if not records:
        raise UserError(
            f"{folder}: {run_log.EVALUATIONS} has no evaluation; remove the folder to run it again"
        )
    for record in records:
        if record["epoch"] not in spent:
            raise UserError(
                f"{folder}: {run_log.METRICS} has no record of epoch {record['epoch']}, which was "
                "evaluated; remove the folder to run it again"
            )
    for record in (records[0], records[-1]):
        if not math.isfinite(record["reward"]):
            raise UserError(
                f"the evaluation after epoch {record['epoch']} scored fewer than two videos; "
                f"remove {folder} to run it again"
            )
    # 3 leave out those without a result
    records = [r for r in records if math.isfinite(r["reward"])]
    evaluations, seconds = zip(*(spent[r["epoch"]] for r in records))
    return Curve(
        np.array([r["epoch"] for r in records]),
        np.array(evaluations),
        np.array(seconds),
        np.array([r["reward"] for r in records]),
        run_log.reward_name(records[-1]),
    )


def differing(configs: Mapping[str, Mapping]) -> list[str]:
    """Return the keys of flat configs that affect the held-out reward and have unlike values."""
    first, *others = configs.values()

    def affects(key: str) -> bool:
        section = key.split(".")[0] + "."
        return key not in WITHOUT_EFFECT and bool({key, section} & set(EVALUATION_SETTINGS))

    return [
        key
        for key in sorted(first)
        if affects(key) and any(other[key] != first[key] for other in others)
    ]


def mean_curve(curves: Sequence[Curve], axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average curves at equal spending.

    Args:
      curves: one for each seed.
      axis: key of `AXES`.

    Returns:
      Spending, mean reward and half the width of its interval over seeds, float64 [P] each. The
      half-width is NaN for one seed.
    """
    spending = [getattr(curve, axis).astype(np.float64) for curve in curves]
    points = np.unique(np.concatenate(spending))
    points = points[points <= min(each[-1] for each in spending)]
    rewards = np.stack(
        [np.interp(points, each, curve.rewards) for each, curve in zip(spending, curves)]
    )  # [seeds, P]
    mean, half = zip(*(t_interval(column) for column in rewards.T))
    return points, np.array(mean), np.array(half)


def first_reached(curve: Curve, axis: str, gain: float) -> float:
    """Return what the run had spent when its reward first was `gain` above its start.

    Interpolates linearly between evaluations; NaN if the reward never was.
    """
    spending = getattr(curve, axis).astype(np.float64)
    above = curve.rewards - curve.rewards[0] - gain + 1e-9
    i = int(np.argmax(above >= 0))
    if not above[i] >= 0:
        return math.nan
    if i == 0:
        return float(spending[0])
    step, rise = spending[i] - spending[i - 1], above[i] - above[i - 1]
    return float(spending[i - 1] - step * above[i - 1] / rise)


def summary(curves: Sequence[Curve], gain: float) -> dict:
    """Return a method's figures as (mean, half-width) over seeds, and `reached`.

    `reached` counts the seeds that reached the gain; the figures of *_to_reach are theirs alone.
    """
    row = {
        "start": t_interval([c.rewards[0] for c in curves]),
        "end": t_interval([c.rewards[-1] for c in curves]),
        "gain": t_interval([c.rewards[-1] - c.rewards[0] for c in curves]),
    }
    for axis in AXES:
        reached = [first_reached(curve, axis, gain) for curve in curves]
        reached = [spending for spending in reached if not math.isnan(spending)]
        row |= {f"{axis}_to_reach": t_interval(reached), "reached": len(reached)}
    for name in ("epochs", *AXES):
        row[name] = t_interval([getattr(curve, name)[-1] for curve in curves])
    return row


def write(result: Comparison, out: pathlib.Path) -> list[str]:
    """Write comparison.json, .md and .html into `out`; return the lines to print."""
    rows = {
        name: summary(list(runs.values()), result.reach)
        for name, runs in result.runs.items()
        if runs
    }
    values = json_lines.plain(dataclasses.asdict(result) | {"summary": rows})
    lines = _markdown(result, rows)
    files = {
        "json": json.dumps(values, indent=1, allow_nan=False) + "\n",
        "md": "\n".join(lines) + "\n",
        "html": _page(result, rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    for suffix, text in files.items():
        write_atomically(out / f"comparison.{suffix}", text.encode(errors="replace"))
    return [*lines, "", f"report: {out / 'comparison.html'}"]


def _head(result: Comparison) -> list[str]:
    """Return the head of the table of figures."""
    to_reach = [f"{axis} to +{result.reach:g}" for axis in AXES]
    return ["method", "seeds", "start", "end", "gain", *to_reach, "epochs", *AXES]


def _cells(name: str, result: Comparison, row: dict) -> list[str]:
    """Return a method's row of the table of figures."""
    seeds, reached = len(result.runs[name]), row["reached"]
    to_reach = ["not reached"] * len(AXES)
    if reached:
        some = f" ({reached} of {seeds})" if reached < seeds else ""
        to_reach = [
            _figure(row[f"{axis}_to_reach"], ".3g") + some if result.counted(axis, [name]) else "–"
            for axis in AXES
        ]
    return [
        name,
        str(seeds),
        _figure(row["start"], ".3f"),
        _figure(row["end"], ".3f"),
        _figure(row["gain"], "+.3f"),
        *to_reach,
        *(_figure((row[key][0], math.nan), ",.0f") for key in ("epochs", *AXES)),
    ]


def _figure(interval: Sequence[float], form: str) -> str:
    """Format "mean ± half-width", without the latter if it is NaN."""
    mean, half = interval
    if form.endswith("g"):  # three digits, without an exponent
        form = ",.0f" if abs(mean) >= 100 else ".1f"
    text = f"{mean:{form}}"
    return text if math.isnan(half) else f"{text} ± {half:{form.lstrip('+')}}"


def _remarks(result: Comparison) -> list[str]:
    """Return what the figures mean, and which runs they lack."""
    unit, amount = result.budget
    parallel = (
        f", with {result.parallel} runs at the same time on one machine"
        if result.parallel > 1
        else ""
    )
    remarks = [
        f"Budget of each run: {amount:,g} {AXES.get(unit, unit)}; a run ends after the epoch that "
        "reaches it. Evaluations are the model's while sampling, one a video and step; the "
        "update's passes are not counted. Seconds are sampling, decoding, scoring and update, "
        f"without start, compilation, evaluation and checkpoints{parallel}.",
    ]
    if max(map(len, result.runs.values()), default=0) > 1:
        remarks.append(
            f"± and bands: Student's {CONFIDENCE} intervals over seeds, which begin with the same "
            "model on the same held-out prompts and noise."
        )
    else:
        remarks.append("One seed says nothing about how runs differ: no bands.")
    without = [name for name, runs in result.runs.items() if runs and not result.samples(name)]
    if without:
        remarks.append(
            f"{_listed(without)} trained on data alone and sampled nothing: the evaluations that made "
            "the data are not counted."
        )
    if result.differing:
        remarks.append(
            "The methods were not evaluated alike, so their rewards do not compare: they differ in "
            f"{', '.join(result.differing)}."
        )
    if len(result.rewards) > 1:
        remarks.append(
            f"The methods' held-out rewards do not compare: they are {_listed(result.rewards)}."
        )
    for run, error in result.failures.items():
        remarks.append(f"{run} failed and is left out: {error}")
    return remarks


def _markdown(result: Comparison, rows: dict) -> list[str]:
    """Return the lines of comparison.md."""
    head = _head(result)
    table = [_cells(name, result, row) for name, row in rows.items()]
    return [
        "| " + " | ".join(head) + " |",
        "|---|" + "--:|" * (len(head) - 1),
        *("| " + " | ".join(cells) + " |" for cells in table),
        "",
        *(f"- {remark}" for remark in _remarks(result)),
    ]


def _headline(result: Comparison, rows: dict) -> tuple[str, str]:
    """Return who ended highest, and the same as a sentence with figures. Where means are equal or
    intervals overlap with the highest one's, nobody did.
    """
    if not rows:
        return "no run was finished", "No run was finished."
    ends = {name: row["end"] for name, row in rows.items()}  # (mean, half-width)
    ranked = sorted(ends, key=lambda name: -ends[name][0])
    first = ranked[0]
    highest, half = ends[first]
    seeds = len(result.runs[first])
    figures = (
        f"held-out {result.reward} {rows[first]['start'][0]:.2f} → {_figure((highest, half), '.2f')} over "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
    )
    equal = [name for name in ranked if math.isclose(ends[name][0], highest, abs_tol=1e-9)]
    close = [name for name in ranked if name in equal or sum(ends[name]) >= highest - half]
    if len(rows) == 1:
        who = f"{first} alone was run"
    elif len(close) > len(equal):
        intervals = _listed([f"{name} ({_figure(ends[name], '.2f')})" for name in close])
        return "no winner, intervals overlap", (
            f"No winner: the {CONFIDENCE} intervals of {intervals} overlap, so these seeds do not tell "
            f"them apart. {first}: {figures}."
        )
    elif len(equal) > 1:
        above = "" if len(equal) == len(rows) else ", above the others"
        return f"no winner, {_listed(equal)} are equal", (
            f"No winner: {_listed(equal)} ended equal{above}: {figures}."
        )
    else:
        who = f"{first} ended highest of {len(rows)}"
    return who, f"{who}: {figures}."


def _listed(names: Sequence[str]) -> str:
    """'a', 'a and b' or 'a, b and c'."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _chart(result: Comparison, axis: str, names: Sequence[str]) -> Chart:
    """Draw the methods' mean rewards over what they spent."""
    drawn = result.counted(axis, names)

    def draw(axes):
        for name in drawn:
            i = names.index(name)  # a method has one colour in all charts
            color, dash = COLORS[f"s{i % SERIES}"], DASHES[i // SERIES % len(DASHES)]
            spending, mean, half = mean_curve(list(result.runs[name].values()), axis)
            axes.fill_between(spending, mean - half, mean + half, color=color, alpha=0.15, lw=0)
            axes.plot(spending, mean, dash, color=color, lw=1.8, marker="o", ms=3.5, label=name)
        curves = [curve for name in drawn for curve in result.runs[name].values()]
        rewards = np.concatenate([curve.rewards for curve in curves])
        margin = np.ptp(rewards) / 2 + 0.01  # intervals of few seeds are wider than all rewards
        axes.set_ylim(rewards.min() - margin, rewards.max() + margin)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel(AXES[axis])
        axes.set_ylabel(f"held-out {result.reward}")

    caption = "One seed of each method."
    if max(len(result.runs[name]) for name in drawn) > 1:
        caption = (
            f"Mean over seeds; the band is the {CONFIDENCE} interval, cut off where it leaves the "
            "chart."
        )
    return chart(draw, caption, f"held-out reward over {AXES[axis]}", columns=4)


def _page(result: Comparison, rows: dict) -> str:
    """Return comparison.html."""
    names, (who, headline) = list(rows), _headline(result, rows)
    return render(
        "comparison.html",
        title="Comparison of methods",
        heading=f"Comparison of methods: {who}",
        headline=headline,
        remarks=_remarks(result),
        charts={axis: _chart(result, axis, names) for axis in AXES if result.counted(axis, names)},
        head=_head(result),
        rows=[_cells(name, result, row) for name, row in rows.items()],
        colors=[f"s{i % SERIES}" for i in range(len(rows))],
        methods=list(result.methods.items()),
        command=result.command,
    )
