"""Tests of `benchmarks.family`: commands, peak memory and the table; its stages take minutes."""

import sys

import pytest

from benchmarks import family


def test_peak_memory_is_read_from_the_output():
    script = "print('peak memory: device 1.5 GiB, host 2.0 GiB')"
    stage, output = family.run("stage", [sys.executable, "-c", script])
    assert stage.device_gib == 1.5 and stage.host_gib > 0 and output.startswith("peak memory")
    stage, _ = family.run("stage", [sys.executable, "-c", "pass"])
    assert stage.device_gib is None


def test_a_failing_command_ends_the_benchmark():
    with pytest.raises(SystemExit, match="convert failed"):
        family.run("convert", [sys.executable, "-c", "raise SystemExit(3)"])


def test_settings_become_flags():
    command = family.python("grpo.train", config="a.py", config__epochs=2)
    assert command[1:] == ["-m", "grpo.train", "--config=a.py", "--config.epochs=2"]


def test_table_has_a_row_for_each_stage():
    stages = [
        {"name": "convert", "seconds": 1.26, "host_gib": 2.0, "device_gib": None, "note": "8 GB"},
        {"name": "train", "seconds": 9.0, "host_gib": 3.0, "device_gib": 4.06, "note": ""},
    ]
    assert family.table({"14b": stages}).splitlines()[2:] == [
        "| 14b | convert | 1.3 |  | 2.0 | 8 GB |",
        "| 14b | train | 9.0 | 4.1 | 3.0 |  |",
    ]
