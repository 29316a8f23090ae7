"""The tables of `benchmarks.hacking`, from the folders of its runs."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks.hacking_distance import RESULT
from grpo.records import json_lines, run_log
from grpo.records.statistics import t_interval
from grpo.report.run_records import RunRecords
from grpo.scoring import guard

TABLES, VALUES = "hacking.md", "hacking.json"
TOLERANCES = 0.5, 1.0, 1.5, 2.0
HEALTHY = (
    "nft_0",
    "nft_0.5",
    "nft_0.9",
    "grpo_0",
    "grpo_0.5",
    "grpo_0.9",
)  # trained by spelling alone
CHOSEN = re.compile(r"best of 8: judge (\S+) on .*; all candidates (\S+)")
SAVED = re.compile(r"noise level (\S+): (\d+)% of the model evaluations saved")

Run = dict  # what is known of a run, as in the JSON file


def summarise(folder: pathlib.Path) -> Run:
    """Return what a run's folder says of it; {} before its first evaluation."""
    records = RunRecords.read(folder)
    evaluations = [e for e in records.recorded if math.isfinite(e["reward"])]
    if not evaluations:
        return {}
    verdicts = records.verdicts
    panel_alone = dataclasses.replace(
        records.limits, trained=[name for e in evaluations for name in e.get("measures", {})]
    )
    panel_verdicts = guard.judge(records.recorded, panel_alone, records.metrics)
    chosen, by_panel = guard.best(verdicts), guard.best(panel_verdicts)
    alarms = {v.epoch: v.alarm for v in verdicts if v.alarm}
    shares = guard.relative_spreads(records.metrics)
    distance = folder / RESULT
    return {
        "case": folder.parent.name,
        "seed": int(folder.name.removeprefix("seed")),
        "epochs": records.last_epoch,
        "evaluated": [e["epoch"] for e in evaluations],
        "reward": [e["reward"] for e in evaluations],
        "gold": [measure(e, "gold") for e in evaluations],
        "dark": [measure(e, "dark") for e in evaluations],
        "moved": {
            str(e["epoch"]): guard.movements(evaluations[0], e, records.limits.panel)
            for e in evaluations[1:]
        },
        "chosen": None if chosen is None else chosen.epoch,
        "chosen_by_panel_and_fall": None if by_panel is None else by_panel.epoch,
        "alarms": {str(epoch): why for epoch, why in alarms.items()},
        "panel_alarms": [v.epoch for v in verdicts if v.outside],
        "spread": [shares[epoch] for epoch in sorted(shares)],
        "kl_weight": [m["kl_weight"] for m in records.metrics if "kl_weight" in m],
        "kl": [m["kl"] for m in records.metrics if "kl" in m],
        "seconds": [m["seconds"]["total"] for m in records.metrics],
        "distance": json.loads(distance.read_text()) if distance.exists() else None,
    }


def measure(evaluation: dict, name: str) -> float:
    """Return the mean of a measure in an evaluation, nan where it was not measured."""
    return (evaluation.get("measures", {}).get(name) or (math.nan,))[0]


def at(run: Run, key: str, epoch: int | None) -> float:
    """Return a value of the evaluation after an epoch, nan without any."""
    return run[key][run["evaluated"].index(epoch)] if epoch in run["evaluated"] else math.nan


def best_epoch(run: Run, key: str) -> int | None:
    """Return the epoch with the highest value, the earliest of equal ones."""
    values = np.array(run[key], float)
    return None if np.isnan(values).all() else run["evaluated"][int(np.nanargmax(values))]


def write(out: pathlib.Path) -> None:
    """Write the tables and the values of all runs in a folder."""
    found = sorted(out.glob("*/seed*/" + run_log.EVALUATIONS))
    runs = [run for path in found if (run := summarise(path.parent))]
    pruned = best_of(out)
    values = json_lines.plain({"runs": runs, "best_of": pruned})
    (out / VALUES).write_text(json.dumps(values, indent=1) + "\n")
    tables = [
        table("Runs", RUNS, runs),
        table("a. Proxy and gold", PROXY, [r for r in runs if r["case"].startswith("proxy")]),
        *(remedies(runs, name) for name in ("dark", "dark_sum", "fall", "long")),
        tolerances(runs),
        spreads(runs),
        boxes(runs),
        table("f. Best of 8", BEST_OF, pruned),
    ]
    (out / TABLES).write_text("\n".join(text for text in tables if text))


Columns = dict[str, Callable[[Run], object]]  # by head


def table(title: str, columns: Columns, rows: Iterable[Run]) -> str:
    """Return a table in Markdown; "" without rows."""
    lines = [
        "| " + " | ".join(text(value(row)) for value in columns.values()) + " |" for row in rows
    ]
    if not lines:
        return ""
    head = "| " + " | ".join(columns) + " |"
    return "\n".join([f"## {title}\n", head, "|" + "---|" * len(columns), *lines, ""])


def text(value: object) -> str:
    """Return a cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def first_alarm(run: Run) -> str | None:
    """Return the epoch and the reason of the first alarm."""
    return next((f"{epoch}: {why}" for epoch, why in run["alarms"].items()), None)


RUNS: Columns = {
    "run": lambda r: f"{r['case']}, seed {r['seed']}",
    "epochs": lambda r: r["epochs"],
    "reward before": lambda r: r["reward"][0],
    "highest": lambda r: max(r["reward"]),
    "its epoch": lambda r: best_epoch(r, "reward"),
    "last": lambda r: r["reward"][-1],
    "save.best": lambda r: r["chosen"],
    "first alarm": first_alarm,
    "seconds an epoch": lambda r: float(np.median(r["seconds"])) if r["seconds"] else math.nan,
}
PROXY: Columns = {
    "run": lambda r: f"{r['case']}, seed {r['seed']}",
    "proxy-best": lambda r: best_epoch(r, "reward"),
    "proxy, gold there": lambda r: pair(r, best_epoch(r, "reward")),
    "gold-best": lambda r: best_epoch(r, "gold"),
    "proxy, gold there ": lambda r: pair(r, best_epoch(r, "gold")),
    "save.best": lambda r: r["chosen"],
    "proxy, gold there  ": lambda r: pair(r, r["chosen"]),
    "by panel and fall alone": lambda r: r["chosen_by_panel_and_fall"],
    "gold at the end": lambda r: r["gold"][-1],
}
BEST_OF: Columns = {
    "candidates": lambda r: r["name"],
    "evaluations saved": lambda r: r["saved"],
    "second reader, best of 8": lambda r: r["best"],
    "all that were finished": lambda r: r["all"],
}


def pair(run: Run, epoch: int | None) -> str:
    """Return the proxy and the gold after an epoch."""
    return f"{text(at(run, 'reward', epoch))}, {text(at(run, 'gold', epoch))}"


def remedies(runs: Sequence[Run], name: str) -> str:
    """Return the table of the cases NAME, NAME_stop and NAME_kl<weight>, a row for each run."""
    chosen = [r for r in runs if re.fullmatch(rf"{name}(_stop|_kl\d+)?", r["case"])]
    columns: Columns = {
        "run": lambda r: f"{r['case']}, seed {r['seed']}",
        "epochs": lambda r: r["epochs"],
        "first alarm": lambda r: next(iter(r["alarms"]), None),
        "save.best": lambda r: r["chosen"],
        "reward before, highest, last": lambda r: ", ".join(
            text(v) for v in (r["reward"][0], max(r["reward"]), r["reward"][-1])
        ),
        "dark before, last": lambda r: f"{text(r['dark'][0])}, {text(r['dark'][-1])}",
        "largest movement of the panel at the end": lambda r: largest(r, r["evaluated"][-1]),
        "epochs with a raised KL": lambda r: (
            sum(w > min(r["kl_weight"]) for w in r["kl_weight"]) if r["kl_weight"] else None
        ),
        "KL at the end": lambda r: r["kl"][-1] if r["kl"] else None,
    }
    return table(f"b, c, d. {name}", columns, chosen)


def largest(run: Run, epoch: int) -> float:
    """Return the largest movement of a measure of the panel, in standard deviations."""
    return max(map(abs, run["moved"].get(str(epoch), {}).values()), default=math.nan)


def tolerances(runs: Sequence[Run]) -> str:
    """Return how many runs of each case leave the panel at several tolerances, and when first."""
    cases = dict.fromkeys(r["case"] for r in runs)

    def cell(case: str, tolerance: float) -> str:
        of_case = [r for r in runs if r["case"] == case]
        firsts = [
            next((int(e) for e in r["moved"] if largest(r, int(e)) > tolerance), None)
            for r in of_case
        ]
        outside = [first for first in firsts if first is not None]
        when = f", from epoch {', '.join(map(str, outside))}" if outside else ""
        return f"{len(outside)} of {len(of_case)}{when}"

    columns: Columns = {
        "case": lambda r: r["case"] + (" (healthy)" if r["case"] in HEALTHY else "")
    }
    for tolerance in TOLERANCES:
        columns[f"{tolerance:g}"] = lambda r, tolerance=tolerance: cell(r["case"], tolerance)
    columns["largest of all"] = lambda r: max(
        (largest(run, int(e)) for run in runs if run["case"] == r["case"] for e in run["moved"]),
        default=math.nan,
    )
    return table("Runs outside of the panel, by tolerance", columns, [{"case": c} for c in cases])


def spreads(runs: Sequence[Run]) -> str:
    """Return the relative spread of the groups: least, and at the end."""
    columns: Columns = {
        "run": lambda r: f"{r['case']}, seed {r['seed']}",
        "least": lambda r: min(r["spread"], default=math.nan),
        "its epoch": lambda r: int(np.argmin(r["spread"])) + 1 if r["spread"] else None,
        "mean of epochs 2 to 5": lambda r: float(np.mean(r["spread"][1:5] or [math.nan])),
        "mean of the last 5": lambda r: float(np.mean(r["spread"][-5:] or [math.nan])),
    }
    return table("Spread within groups, as a share of the first epoch's", columns, runs)


def boxes(runs: Sequence[Run]) -> str:
    """Return the table of box credit: means over seeds with Student's intervals."""
    rows = []
    for case in HEALTHY:
        of_case = [r for r in runs if r["case"] == case and r["distance"]]
        if of_case:
            keys = ("outside", "inside")
            distances = [[r["distance"][key] for r in of_case] for key in keys]
            rows.append(
                {"case": case, "seeds": len(of_case)}
                | {"reward": interval([r["reward"][-1] for r in of_case])}
                | {key: interval(values) for key, values in zip(keys, distances)}
            )
    columns: Columns = {
        "method, train.box_credit": lambda r: r["case"].replace("_", ", "),
        "seeds": lambda r: r["seeds"],
        "reward at the end": lambda r: r["reward"],
        "change outside of the text (0 to 255)": lambda r: r["outside"],
        "inside": lambda r: r["inside"],
    }
    return table("e. Box credit", columns, rows)


def interval(values: Sequence[float]) -> str:
    """Return mean and half-width of Student's 95 % interval over seeds."""
    mean, half = t_interval(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def best_of(out: pathlib.Path) -> list[Run]:
    """Return the results of question f from its output, in the order of its commands."""
    log = out / "best_of.log"
    rows, saved = [], ("", 0)
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        if match := SAVED.search(line):
            saved = match[1], int(match[2])
        if match := CHOSEN.search(line):
            name = f"the better half from noise level {saved[0]} on" if saved[0] else "all"
            rows.append(
                {
                    "name": name,
                    "saved": f"{saved[1]}%",
                    "best": float(match[1]),
                    "all": float(match[2]),
                }
            )
            saved = ("", 0)
    return rows
