"""Several devices beside one: the arithmetic on fixed numbers, and the command itself on simulated devices."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import scaling
from benchmarks.scaling import WORKS, table, times_one
from benchmarks.workload import Record, Stage


def record(rollout: float, update: float) -> Record:
    return Record("ours", {"rollout": Stage(rollout, 3.0, 500.0), "update": Stage(update, 9.0, 450.0)}, "GPU", "1.0",
                  (0.999, 1.001))


def as_written(found: Record, folder) -> dict:
    found.write(folder / "record.json")
    return json.loads((folder / "record.json").read_text())


def test_times_one_counts_videos():
    data, context = WORKS["1.3b-data"], WORKS["1.3b-context"]
    found = {1: record(100.0, 200.0), 2: record(100.0, 250.0)}
    assert times_one(data, found, 2, "rollout") == 2.0  # twice the videos in the same time
    assert times_one(data, found, 2, "update") == pytest.approx(1.6)
    assert times_one(context, {1: record(100.0, 1.0), 4: record(40.0, 1.0)}, 4, "rollout") == 2.5  # one video, faster
    assert times_one(data, {2: found[2]}, 2, "rollout") is None


def test_table_judges_data_parallel_only(tmp_path):
    found = {str(n): as_written(record(100.0, ms), tmp_path) for n, ms in ((1, 100.0), (2, 110.0), (4, 103.0))}
    lines = table({"1.3b-data": found, "1.3b-context": found | {"4": {"failed": "out of memory"}}}).splitlines()
    assert lines[3].endswith("| 100.0 | 500 | 2.00 | 110.0 | 450 | 1.82 | 9.0 | rollout 1.9: reached; update 1.9: "
                             "**not reached** |")
    assert lines[4].endswith("update 3.75: reached |")
    assert lines[6].endswith("| 9.0 |  |")
    assert "- 1.3B, LoRA, one video of 81 x 480 x 832, 4 GPUs: failed, out of memory" in lines
    assert {len(line.split(" | ")) for line in lines[:7] if "---" not in line} == {len(scaling.HEAD)}


@pytest.mark.parametrize("extra", [["--devices=2", "--batch=4"], ["--devices=2", "--fsdp=2", "--batch=4", "--full"],
                                   ["--devices=2", "--context=2", "--batch=2"],
                                   ["--batch=2", "--full", "--offload_optimiser"]])
def test_every_axis_is_measured(extra, tmp_path):
    command = [sys.executable, "-m", "benchmarks.full_size", "--size=tiny", "--height=32", "--width=32", "--repeats=1",
               f"--json={tmp_path / 'record.json'}", *extra]
    env = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = Record.from_dict(json.loads((tmp_path / "record.json").read_text()))
    assert set(found.stages) == set(scaling.STAGES) and all(s.ms > 0 for s in found.stages.values())
    assert found.ratio == pytest.approx((1.0, 1.0), abs=1e-4)
