"""The figures of the runs of `benchmarks.race`, and their tables."""

import dataclasses
import datetime
import json
import pathlib
import re
import statistics

from grpo.records import run_log

PAIRS = (
    ("theirs-2", "ours-same-2"),
    ("theirs-9", "ours-same-9"),
    ("theirs-2", "ours"),
    ("theirs-9", "ours"),
)
START = "start.json"
COMPILED = re.compile(r"^\S+ {3}\S.*? {2,}(\d+\.\d)(?: +\d+\.\d+){3}$", re.MULTILINE)


# ---- one run -------------------------------------------------------------------------------------
def reached(evaluations: list[dict], target: float) -> int | None:
    """Return the epoch of the first evaluation that is `target` above the first one, or None."""
    for record in evaluations[1:]:
        if record["reward"] >= evaluations[0]["reward"] + target:
            return record["epoch"]
    return None


def compile_seconds(folder: pathlib.Path) -> float:
    """Return the seconds in which a run compiled before its first epoch, or warmed up in PyTorch."""
    start = folder / START
    if start.exists():
        return json.loads(start.read_text())["compile"]
    path = folder / "run.log"
    return sum(map(float, COMPILED.findall(path.read_text()))) if path.exists() else 0.0


def device_of(folder: pathlib.Path) -> str:
    """Return the device and the software of a run."""
    if (folder / START).exists():
        start = json.loads((folder / START).read_text())
        return f"{start['device']}, {start['software']}"
    path = folder / run_log.PROVENANCE
    if not path.exists():
        return ""
    start = json.loads(path.read_text())[run_log.STARTS][-1]
    return f"{start['hardware']['devices']}, jax {start['versions']['jax']}"


def measure(folder: pathlib.Path, target: float, began: float, ended: str) -> dict:
    """Return the figures of a run until the evaluation that reached the target, or the last one.

    began: Unix time at which its process was started. ended: why it ended, 'reached', 'limit',
    'stopped' or 'failed'. `curve` has [epoch, seconds, reward] of every evaluation.
    """
    epochs, evaluations = run_log.read_metrics(folder), run_log.read_evaluations(folder)
    spent = {0: 0.0} | {record["epoch"]: record["spent_seconds"] for record in epochs}
    at = reached(evaluations, target)
    until = at if at is not None else evaluations[-1]["epoch"] if evaluations else 0
    counted = [record for record in epochs if record["epoch"] <= until]
    before = [record for record in evaluations if record["epoch"] <= until]
    totals = [record["seconds"]["total"] for record in epochs]
    command = 0.0
    if before:
        clock = datetime.datetime.fromisoformat(before[-1]["time"]).timestamp() - began
        command = clock - sum(record["seconds"] for record in before)
    # what an epoch compiled is in its total alone
    late = sum(record["seconds"]["total"] for record in counted) - spent[until]
    return {
        "ended": ended if at is None else "reached",
        "device": device_of(folder),
        "epoch": until,
        "seconds": spent[until],
        "compile": compile_seconds(folder) + max(0.0, late),
        "command": command,
        "evaluations": sum(record["evaluations"] for record in counted),
        "epoch_seconds": statistics.median(totals[1:] or totals or [0.0]),
        "stages": stages(epochs[1:] or epochs),
        "curve": [[e["epoch"], spent[e["epoch"]], e["reward"]] for e in evaluations],
        "evaluation_seconds": sum(record["seconds"] for record in evaluations),
        "ratio_max_error": max((e.get("ratio_max_error", 0.0) for e in epochs), default=0.0),
    }


def stages(epochs: list[dict]) -> dict[str, float]:
    """Return the median seconds of each stage of an epoch."""
    names = ("sample", "decode", "score_wait", "update")
    return {n: statistics.median(e["seconds"][n] for e in epochs) for n in names if epochs}


# ---- tables --------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean of seconds; a lower bound where a run did not reach the target."""

    value: float
    bound: bool

    @classmethod
    def of(cls, found: list[dict], key: str, added: float = 0.0) -> "Mean | None":
        """Return the mean of `key`, 'seconds' or 'command'. added: to every run. None without runs."""
        if not found:
            return None
        late = any(record["ended"] != "reached" for record in found)
        return cls(statistics.mean(record[key] for record in found) + added, late)

    def __str__(self) -> str:
        return f"{'> ' if self.bound else ''}{self.value:.1f}"


def finished(record: dict) -> bool:
    """Return whether a run needs no repetition."""
    return record["ended"] in ("reached", "limit")


def ratio(theirs: Mean | None, ours: Mean | None) -> str:
    """Return their seconds over ours."""
    if theirs is None or ours is None or ours.value == 0 or (theirs.bound and ours.bound):
        return "unknown"
    sign = "> " if theirs.bound else "< " if ours.bound else ""
    return f"{sign}{theirs.value / ours.value:.1f}"


def cold_compile(found: list[dict]) -> float:
    """Return the seconds of compilation of a side's first run."""
    return found[0]["compile"] if found else 0.0


HEAD = (
    "side",
    "seeds",
    "seconds, each seed",
    "seconds",
    "with compilation",
    "command",
    "seconds an epoch",
    "sample, decode, score wait, update",
    "epochs",
    "model evaluations",
    "held-out reward, start",
    "end",
)


def row(name: str, seeds: list[str], found: list[dict]) -> str:
    """Return the row of a side."""

    def mean(values, form: str) -> str:
        return format(statistics.mean(values), form)

    each = ", ".join(str(Mean.of([record], "seconds")) for record in found)
    parts = [mean([r["stages"][n] for r in found], ".2f") for n in found[0]["stages"]]
    curves = [r["curve"] for r in found]
    cells = [
        name,
        ", ".join(seeds),
        each,
        str(Mean.of(found, "seconds")),
        str(Mean.of(found, "seconds", cold_compile(found))),
        str(Mean.of(found, "command")),
        mean([r["epoch_seconds"] for r in found], ".2f"),
        ", ".join(parts),
        mean([r["epoch"] for r in found], ".0f"),
        mean([r["evaluations"] for r in found], ".0f"),
        mean([curve[0][2] for curve in curves], ".3f"),
        mean([curve[-1][2] for curve in curves], ".3f"),
    ]
    return "| " + " | ".join(cells) + " |"


def table(results: dict) -> str:
    """Return the tables in Markdown. results: the content of race.json."""
    sides = {
        name: {seed: r for seed, r in by_seed.items() if finished(r)}
        for name, by_seed in results["runs"].items()
    }
    sides = {name: by_seed for name, by_seed in sides.items() if by_seed}
    lines = [
        f"Seconds until the held-out reward is {results['target']:g} above its start "
        f"({results['prompts']} prompts, evaluated every {results['every']} epochs, "
        f"{results['workers']} scoring processes). `>`: not reached by then.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *(row(name, [*by_seed], [*by_seed.values()]) for name, by_seed in sides.items()),
        "",
        "| theirs / ours | seconds | with compilation | command | seconds an epoch |",
        "|---|---|---|---|---|",
    ]
    for theirs, ours in PAIRS:
        for name in sides:
            if name.startswith(f"{theirs}-") and ours in sides:
                lines.append(ratio_row(name, ours, sides))
    notes = [
        f"- {name}, seed {seed}: {r['ended']} after {r['seconds']:.1f} s"
        for name, by_seed in results["runs"].items()
        for seed, r in by_seed.items()
        if not finished(r)
    ]
    devices = {r["device"] for by_seed in results["runs"].values() for r in by_seed.values()}
    return (
        "\n".join([*lines, "", *notes, *(f"- {name}" for name in sorted(devices) if name)]) + "\n"
    )


def ratio_row(theirs: str, ours: str, sides: dict[str, dict[str, dict]]) -> str:
    """Return the row of a pair of sides, over the seeds that both have."""
    common = [seed for seed in sides[theirs] if seed in sides[ours]]
    a, b = ([sides[name][seed] for seed in common] for name in (theirs, ours))
    compiled = [cold_compile([*sides[name].values()]) for name in (theirs, ours)]
    means = [
        (Mean.of(a, "seconds"), Mean.of(b, "seconds")),
        (Mean.of(a, "seconds", compiled[0]), Mean.of(b, "seconds", compiled[1])),
        (Mean.of(a, "command"), Mean.of(b, "command")),
        tuple(
            Mean(statistics.mean(r["epoch_seconds"] for r in found), False) if found else None
            for found in (a, b)
        ),
    ]
    return "| " + " | ".join([f"{theirs} / {ours}", *(ratio(*pair) for pair in means)]) + " |"
