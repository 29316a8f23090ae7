"""Durations and budgets are taken from the monotonic clock: setting the machine's clock changes
none of them.
"""

import functools
import pathlib
import re
import time
import types

from grpo.compiled.compile import COMPILED, CompileCounter
from grpo.records.clock import Stopwatch

ROOT = pathlib.Path(__file__).parents[1]
TIMESTAMPS = {
    "grpo/records/clock.py",  # of a record
    "grpo/records/trackers.py",  # what MLflow shows as the time of a metric
    "grpo/report/provenance_tables.py",  # first and last of the records
    "wan_jax/storage/folder_lock.py",  # since when a folder is locked
}


def test_only_timestamps_are_of_the_wall_clock():
    found = {
        str(path.relative_to(ROOT))
        for package in ("wan_jax", "grpo", "rewards", "convert")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"\btime\.time\(|datetime\.", path.read_text())
    }
    assert found == TIMESTAMPS


def test_a_clock_that_is_set_changes_no_stage(monkeypatch):
    clock = Stopwatch()
    for now in (4e9, 0.0):
        monkeypatch.setattr(time, "time", functools.partial(float, now))
        clock("sample")
        clock("update")
    assert 0 <= sum(clock.seconds.values()) <= clock.total < 60 and min(clock.seconds.values()) >= 0


def test_what_jax_measured_over_a_jump_backwards_counts_as_nothing():
    counter = types.SimpleNamespace(names=[], seconds=1.0)
    CompileCounter._listen(counter, COMPILED, -86400.0, fun_name="update")
    assert counter.seconds == 1.0 and counter.names == ["update"]
