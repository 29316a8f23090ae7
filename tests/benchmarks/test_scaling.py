"""Tests the arithmetic of `benchmarks.scaling` on fixed numbers, and the commands of its works."""

import json

import pytest

from benchmarks import scaling
from benchmarks.scaling import WORKS, speed_up, table
from benchmarks.workload import Record, Stage


def record(rollout: float, update: float) -> Record:
    return Record(
        "ours",
        {"rollout": Stage(rollout, 3.0, 500.0), "update": Stage(update, 9.0, 450.0)},
        "GPU",
        "1.0",
        (0.999, 1.001),
    )


def as_written(found: Record, folder) -> dict:
    found.write(folder / "record.json")
    return json.loads((folder / "record.json").read_text())


def test_speed_up_counts_videos():
    data, context = WORKS["1.3b-data"], WORKS["1.3b-context"]
    found = {1: record(100.0, 200.0), 2: record(100.0, 250.0)}
    assert speed_up(data, found, 2, "rollout") == 2.0  # twice the videos in the same time
    assert speed_up(data, found, 2, "update") == pytest.approx(1.6)
    # one video, faster
    assert speed_up(context, {1: record(100.0, 1.0), 4: record(40.0, 1.0)}, 4, "rollout") == 2.5
    assert speed_up(data, {2: found[2]}, 2, "rollout") is None


def test_table_judges_data_parallel_only(tmp_path):
    found = {
        str(n): as_written(record(100.0, ms), tmp_path)
        for n, ms in ((1, 100.0), (2, 110.0), (4, 103.0))
    }
    lines = table(
        {"1.3b-data": found, "1.3b-context": found | {"4": {"failed": "out of memory"}}}
    ).splitlines()
    assert lines[3].endswith(
        "| 100.0 | 500 | 2.00 | 110.0 | 450 | 1.82 | 9.0 | rollout 1.9: reached; update 1.9: "
        "**not reached** |"
    )
    assert lines[4].endswith("update 3.75: reached |")
    assert lines[6].endswith("| 9.0 |  |")
    assert "- 1.3B, LoRA, one video of 81 x 480 x 832, 4 GPUs: failed, out of memory" in lines
    assert {len(line.split(" | ")) for line in lines[:7] if "---" not in line} == {
        len(scaling.HEAD)
    }


def test_parts_are_added_up_to_the_seconds_of_a_video(tmp_path):
    def parts(**ms: float) -> dict:
        stages = {
            name.replace("_", " "): Stage(value, 2.0 + value, 1.0) for name, value in ms.items()
        }
        return as_written(Record("ours", stages, "GPU", "1.0"), tmp_path)

    one = parts(rollout=9.0, guided_rollout=18.0, grpo_update=90.0, nft_update=45.0, decode=9.0)
    two = parts(rollout=9.0, guided_rollout=18.0, grpo_update=100.0, nft_update=45.0, decode=9.0)
    lines = table({"1.3b-parts": {"1": one, "2": two}}).splitlines()
    assert (
        lines[0].startswith("| work | GPUs | rollout, ms |") and "Flow-GRPO, s a video" in lines[0]
    )
    # (20 x 18 + 9 + 19 x 90) / 9 ms, and on two GPUs (20 x 18 + 9 + 19 x 100) / 18
    assert lines[2].endswith(
        "| data 1 | 9.0 | 18.0 | 90.0 | 45.0 | 9.0 | 0.231 | 0.061 | 0.061 | 0.041 | 92.0 |"
    )
    assert "| data 2 |" in lines[3]
    assert lines[3].endswith(
        "| 0.126 (1.83) | 0.032 (1.93) | 0.030 (2.00) | 0.021 (2.00) | 102.0 |"
    )
    assert {line.count("|") for line in lines[:4]} == {len(scaling.PARTS_HEAD) + 1}


def test_a_call_that_measures_nothing_is_refused():
    assert scaling.measured(["1.3b-data"], ["1", "2"]) == [("1.3b-data", 1), ("1.3b-data", 2)]
    with pytest.raises(ValueError, match=r"--devices=16: .*1, 2, 4 GPUs"):
        scaling.measured(["1.3b-data"], ["16"])


def test_commands_fill_the_axis():
    for work in WORKS.values():
        for devices in work.devices:
            given = dict(x.removeprefix("--").split("=") for x in work.command(devices) if "=" in x)
            assert int(given["devices"]) == devices and int(given["batch"]) == work.videos(devices)
            assert devices == int(given.get("fsdp", 1)) * int(given.get("context", 1)) * (
                devices if work.axis == "data" else 1
            )
