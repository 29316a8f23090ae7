"""Writes `report.html` of a run: one page that needs no network and embeds its pictures.

    python -m grpo.report --run runs/tiny_ocr

The page is made from the run folder's files alone (listed in `grpo.records.run_log`), so it can be
made again at any time, also for a run that was cut short. Its layout is
`templates/run_report.html`.
"""

import math
import pathlib

import numpy as np

from grpo.records import run_log
from grpo.records.clock import timestamp
from grpo.records.run_files import write_atomically
from grpo.records.run_log import number, reward_name
from grpo.records.statistics import paired_difference
from grpo.report.charts import Chart, chart
from grpo.report.curves import small_curves
from grpo.report.page import CONFIDENCE, plural, render
from grpo.report.provenance_tables import provenance_rows, setting_rows
from grpo.report.reward_chart import RewardChart
from grpo.report.run_records import RunRecords, comparable, without_result
from grpo.report.samples import format_reward, samples, write_pairs
from grpo.report.training_tables import health_rows, timings
from grpo.scoring import guard
from grpo.settings.budget import Budget, Spent

SHOWN_PROMPTS = 1000  # rows of the prompt table


def write_report(folder, pairs: bool = True) -> pathlib.Path:
    """Write `folder`/report.html, and the folder side_by_side if `pairs`; return the page's path.

    Raises:
      FileNotFoundError: there is no run folder.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder} does not exist")
    run = RunRecords.read(folder)
    if pairs:
        write_pairs(run)
    name = folder.resolve().name
    text = render(
        "run_report.html",
        title=f"{name}: GRPO report",
        heading=name,
        written=_written(run),
        progress=run.progress if run.trained and run.progress.last else None,
        sentence=result_sentence(run),
        remarks=[*guard_lines(run), *_remarks(run)],
        tiles=_tiles(run),
        reward=_reward_chart(run),
        curves=small_curves(run),
        pairs=pairs,
        provenance=provenance_rows(run),
        panel=_panel(run),
        others=_others(run.folder),
        evaluated=len(run.evaluations),
        samples=samples(run),
        prompts=_prompt_table(run),
        timings=timings(run.metrics, run.evaluations),
        health=health_rows(run.metrics),
        settings=setting_rows(run),
        command=run.config.get("command"),
    )
    path = folder / "report.html"
    write_atomically(path, text.encode(errors="replace"))
    return path


def _written(run: RunRecords) -> str:
    """Return when the page was written, and after which epoch."""
    now = f"Written at {timestamp().replace('T', ' ').removesuffix('+00:00')} UTC"
    if not run.trained:
        return f"{now}."
    if run.progress.finished:
        return f"{now}, after {plural(run.last_epoch, 'epoch')}: the run is finished."
    eta = f"; about {run.progress.eta} left" if run.progress.eta else ""
    return f"{now}, epoch {run.last_epoch} of {run.progress.last}{eta}."


def summary_lines(folder) -> list[str]:
    """Return the lines to print at the end of a run: the result, and the path of its report."""
    run = RunRecords.read(pathlib.Path(folder))
    if not run.recorded:
        result = "no held-out evaluation was recorded"
    elif not run.evaluations:
        result = "no held-out evaluation has a result"
    elif len(run.evaluations) == 1:
        (last,) = run.evaluations
        result = (
            f"{reward_name(last)} {last['reward']:.2f} (95 % CI {_interval(last)}, {last['num']} held-out "
            "prompts; one evaluation so far)"
        )
    else:
        first, last = run.ends
        result = (
            f"{reward_name(first)} {first['reward']:.2f} -> {last['reward']:.2f} (95 % CI {_interval(first)} "
            f"-> {_interval(last)}, {last['num']} held-out prompts; intervals "
            f"{_overlap(first, last)})"
        )
    missing = without_result(run.recorded)
    warnings = [f"warning: {missing}"] if missing else []
    return [result, *guard_lines(run), *warnings, f"report: {run.folder / 'report.html'}"]


def _interval(evaluation: dict) -> str:
    return f"[{evaluation['low']:.2f}, {evaluation['high']:.2f}]"


def _overlap(first: dict, last: dict) -> str:
    overlap = first["low"] <= last["high"] and last["low"] <= first["high"]
    return "overlap" if overlap else "do not overlap"


def result_sentence(run: RunRecords) -> str:
    """Return the result in one sentence."""
    if not run.recorded:
        return "No held-out evaluation was recorded."
    if not run.evaluations:
        return "No held-out evaluation has a result."
    if len(run.evaluations) == 1:
        (last,) = run.evaluations
        return (
            f"{reward_name(last)} {last['reward']:.2f} on {last['num']} held-out prompts, {CONFIDENCE} "
            f"confidence interval {_interval(last)}."
        )
    first, last = run.ends
    return (
        f"{reward_name(first)} {first['reward']:.2f} → {last['reward']:.2f} on {last['num']} held-out "
        f"prompts. The {CONFIDENCE} confidence intervals {_interval(first)} and {_interval(last)} "
        f"{_overlap(first, last)}."
    )


def guard_lines(run: RunRecords) -> list[str]:
    """Return which checkpoint of a training is best and why, and the last evaluation's alarm; [] with
    fewer than two evaluations.
    """
    if len(run.verdicts) < 2:
        return []
    last = run.verdicts[-1]
    alarm = [f"Alarm after epoch {last.epoch}: {last.alarm}."] if last.alarm else []
    best = [guard.explain(run.verdicts, run.recorded)] if run.trained else []
    return [*best, *alarm]


def _panel(run: RunRecords) -> dict:
    """Return the head and the rows of the table of the guard's panel, and its tolerance."""
    records, panel = {e["epoch"]: e for e in run.recorded}, run.limits.panel
    moved = {
        v.epoch: guard.movements(records[run.verdicts[0].epoch], records[v.epoch], panel)
        for v in run.verdicts
    }
    names = [name for name in panel if any(name in row for row in moved.values())]
    chosen = guard.best(run.verdicts) if run.trained else None
    rows = []
    for verdict in run.verdicts:
        cells = [
            f"{moved[verdict.epoch].get(name, math.nan):+z.2f}"
            + (" !" if name in verdict.outside else "")
            for name in names
        ]
        mark = " (best)" if chosen is not None and verdict.epoch == chosen.epoch else ""
        mark += f" (fallen below epoch {verdict.fallen})" if verdict.fallen is not None else ""
        mark += "".join(f" ({judge} fallen)" for judge in sorted(verdict.judges))
        mark += "" if verdict.spread is None else f" (spread {verdict.spread:.0%})"
        rows.append([f"{verdict.epoch}{mark}", f"{records[verdict.epoch]['reward']:.2f}", *cells])
    return {
        "head": ["after epoch", "reward", *names],
        "rows": rows if names and len(rows) > 1 else [],
        "tolerance": run.limits.tolerance,
    }


def _others(folder: pathlib.Path) -> list[list[str]]:
    """Return the rows of the table of evaluations of other lengths and other prompts: the series, the
    number of its prompts, and the first and the last result on the prompts of the newest one.
    """
    rows = []
    for series in run_log.other_series(folder):
        found = comparable(run_log.read_evaluations(folder, series))
        if found:
            ends = [f"{e['reward']:.2f} {_interval(e)}, epoch {e['epoch']}" for e in found]
            name = series.replace("_frames", " frames") if series[0].isdigit() else series
            rows.append([name, str(found[-1]["num"]), ends[0], ends[-1]])
    return rows


def _remarks(run: RunRecords) -> list[str]:
    """Return what limits the result: scores, evaluations, epochs and records that are missing."""
    remarks = []
    # 1 evaluations
    last = run.evaluations[-1] if run.evaluations else {}
    if len(run.evaluations) == 1:
        remarks.append(
            f"There is one evaluation so far, after epoch {last['epoch']}: nothing to compare it "
            "with."
        )
    if lost := last.get("failed_scores", 0):
        remarks.append(
            f"{lost} of {len(last['prompts'])} samples of the last evaluation could not be scored and "
            f"{'is' if lost == 1 else 'are'} left out."
        )
    if missing := without_result(run.recorded):
        remarks.append(f"There is {missing}.")
    others = sum(math.isfinite(e["reward"]) for e in run.recorded) - len(run.evaluations)
    if others:
        verb = "is" if others == 1 else "are"
        remarks.append(f"{plural(others, 'earlier evaluation')} on other prompts {verb} left out.")
    # 2 rewards of training
    failed = [m.get("failed_rewards", {}) for m in run.metrics]
    for name in dict.fromkeys(name for counts in failed for name in counts):
        if count := sum(counts.get(name, 0) for counts in failed):
            remarks.append(
                f"{name} could not be measured for {plural(count, 'video')} of the training."
            )
    # 3 epochs
    if _is_unfinished(run):
        remarks.append(
            f"Epoch {run.last_epoch} of {run.config['epochs']}: the run is not finished."
        )
    recorded = {m["epoch"] for m in run.metrics}
    expected = range(1, max([run.last_epoch, *(e["epoch"] for e in run.evaluations)]) + 1)
    if recorded and (missing := run_log.ranges(set(expected) - recorded)):
        remarks.append(
            f"The log has no record of epoch(s) {missing}; curves and figures leave them out."
        )
    return remarks


def _is_unfinished(run: RunRecords) -> bool:
    """Return whether the run has epochs left and has not reached its budget."""
    if not 0 < run.last_epoch < run.config.get("epochs", 0):
        return False
    last = run.metrics[-1]
    spent = Spent(last.get("spent_evaluations", 0), last.get("spent_seconds", 0.0))
    return not Budget(**run.config.get("budget", {})).reached(spent)


def _tiles(run: RunRecords) -> list[tuple[str, str]]:
    """Return the result in (figure, label) pairs."""
    tiles = [
        (f"{e['reward']:.2f}", f"after epoch {e['epoch']}, {CONFIDENCE} CI {_interval(e)}")
        for e in run.ends
    ]
    if len(run.ends) == 2:
        before, after = (np.array(e["rewards"]) for e in run.ends)
        if np.isfinite(after - before).sum() >= 2:
            mean, low, high = paired_difference(before, after)
            tiles.append(
                (f"{mean:+.2f}", f"per prompt and seed, {CONFIDENCE} CI [{low:+.2f}, {high:+.2f}]")
            )
        counts = f"{(after > before).sum()} : {(after < before).sum()}"
        tiles.append((counts, f"prompts better : worse; {(after == before).sum()} equal"))
    if run.metrics:
        videos = [number(m, "videos") or 0 for m in run.metrics]
        label = "epoch" if run.last_epoch == 1 else "epochs"
        sampled = f", {plural(int(sum(videos)), 'video')} sampled" if videos[-1] else ""
        tiles.append((f"{run.last_epoch}", label + sampled))
    return tiles


def _reward_chart(run: RunRecords) -> Chart | None:
    """Draw the mean reward of training samples and of held-out prompts over the epochs."""
    reward = RewardChart(run)
    if not reward:
        return None
    caption = (
        "Held-out: the averaged (EMA) weights with the deployment sampler, the same prompts and "
        f"seeds each time; the {'band' if reward.joined else 'bar'} is the {CONFIDENCE} bootstrap "
        "interval of the mean."
    )
    if reward.training:
        caption += (
            " Training: the mean over an epoch's samples, drawn as training draws them, which for "
            "GRPO is with noise: the levels may differ."
        )
    return chart(reward.draw, caption, f"{reward.name} by epoch")


def _prompt_table(run: RunRecords) -> dict[str, list]:
    """Return the head and the rows of the table of every prompt's rewards and texts."""
    head = ["prompt"]
    for evaluation in run.ends:
        head += [f"reward after {evaluation['epoch']}", f"read after {evaluation['epoch']}"]
    prompts = run.evaluations[-1]["prompts"][:SHOWN_PROMPTS] if run.evaluations else []
    rows = []
    for i, prompt in enumerate(prompts):
        cells = [(format_reward(e["rewards"][i]), e["texts"][i]) for e in run.ends]
        rows.append([prompt, *(cell for pair in cells for cell in pair)])
    return {"head": head, "rows": rows}
