"""Computes the tables about where a run's results come from: its starts, and its settings in force."""

import math
from datetime import datetime

from grpo.records import json_lines, run_log
from grpo.records.clock import duration
from grpo.report.run_records import RunRecords


def provenance_rows(run: RunRecords) -> list[tuple[str, str]]:
    """Return (what, value) of the newest start, with the time of all; [] if none is recorded."""
    if not run.starts:
        return []
    first, newest = run.starts[0], run.starts[-1]
    hardware = newest.get("hardware") or {}
    versions = {"Python": newest.get("python")} | (newest.get("versions") or {})
    times = [r["time"] for r in (*run.starts, *run.metrics, *run.recorded) if r.get("time")]
    rows = [
        ("first start", _time(first.get("time"))),
        ("newest start", f"{_time(newest.get('time'))}, after epoch {newest.get('epoch')}"),
        ("newest record", _time(max(times, default=None))),
        ("from first start to newest record", _between(times)),
        ("epochs and evaluations took", working_time(run)),
        ("devices", devices(hardware)),
        ("system", f"{hardware.get('system')}, {hardware.get('cpus')} CPU cores"),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items() if v)),
        ("git commit of the source", newest.get("commit") or "not a checkout"),
    ]
    return rows if len(run.starts) > 1 else [row for row in rows if row[0] != "newest start"]


def setting_rows(run: RunRecords) -> list[tuple[str, str]]:
    """Return every setting with its value, and what the run made of those that were left to it."""
    chosen = (run.starts[-1].get("in_force") or {}) if run.starts else {}
    rows = []
    for name, value in json_lines.flatten(run.config).items():
        key = name.replace("/", ".")
        if key in chosen:
            rows.append((key, f"{chosen[key]} (given as {value})"))
        elif key != "command":
            rows.append((key, str(value)))
    return rows


def _time(text) -> str:
    return str(text).replace("T", " ").replace("+00:00", " UTC")


def _between(times: list[str]) -> str:
    try:
        ends = [datetime.fromisoformat(text) for text in (min(times), max(times))]
    except ValueError:
        return "unknown"
    return duration((ends[1] - ends[0]).total_seconds())


def working_time(run: RunRecords) -> str:
    """Return the time of all recorded epochs and evaluations in words."""
    epochs = [m["seconds"].get("total") for m in run.metrics if isinstance(m.get("seconds"), dict)]
    evaluations = [run_log.number(e, "seconds") for e in run.recorded]
    seconds = [s for s in (*epochs, *evaluations) if s is not None and math.isfinite(s)]
    return duration(sum(seconds))


def devices(hardware: dict) -> str:
    """Return the devices of a start's `hardware` in words."""
    parts = [str(hardware.get("devices"))]
    memory = hardware.get("memory_of_a_device")
    if isinstance(memory, int | float) and math.isfinite(memory):
        parts.append(f"{memory / 2**30:.0f} GiB each")
    if hardware.get("processes", 1) > 1:
        parts.append(f"in {hardware['processes']} processes")
    return ", ".join(parts)
