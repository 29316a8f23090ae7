"""Tables about where a run's results come from."""

import pathlib

from grpo.report.provenance_tables import provenance_rows, setting_rows
from grpo.report.run_records import RunRecords

START = {
    "time": "2026-03-31T18:00:00+00:00",
    "epoch": 0,
    "hardware": {"devices": "4 x H200", "processes": 2, "memory_of_a_device": 2**37, "cpus": 16},
    "python": "3.12.1",
    "versions": {"jax": "0.9.0", "flax": None},
    "commit": "abc-dirty",
    "in_force": {"sample.noise_level": 0.7},
}
CONFIG = {"sample": {"noise_level": None, "steps": 9}, "command": "x"}


def run(*starts):
    metrics = [{"epoch": 1, "time": "2026-03-31T18:10:00+00:00", "seconds": {"total": 250.0}}]
    evaluations = [{"epoch": 0, "seconds": 50.0}, {"epoch": 1, "seconds": float("nan")}]
    return RunRecords(pathlib.Path(), CONFIG, metrics, evaluations, list(starts))


def test_rows_of_one_start_and_of_two():
    rows = dict(provenance_rows(run(START)))
    assert "newest start" not in rows and rows["first start"] == "2026-03-31 18:00:00 UTC"
    assert rows["from first start to newest record"] == "10 min"
    assert rows["epochs and evaluations took"] == "5 min"
    assert rows["devices"] == "4 x H200, 128 GiB each, in 2 processes"
    assert rows["versions"] == "Python 3.12.1, jax 0.9.0"
    assert rows["git commit of the source"] == "abc-dirty"
    later = START | {"time": "2026-03-31T18:05:00+00:00", "epoch": 3, "commit": None}
    rows = dict(provenance_rows(run(START, later)))
    assert rows["newest start"] == "2026-03-31 18:05:00 UTC, after epoch 3"
    assert rows["git commit of the source"] == "not a checkout"


def test_records_of_earlier_versions():
    assert provenance_rows(run()) == []
    assert dict(provenance_rows(run({})))["from first start to newest record"] == "0 s"


def test_settings_show_the_values_in_force():
    rows = [("sample.noise_level", "0.7 (given as None)"), ("sample.steps", "9")]
    assert setting_rows(run(START)) == rows
    assert setting_rows(run()) == [("sample.noise_level", "None"), rows[1]]
