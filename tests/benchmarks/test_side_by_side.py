"""Tests the comparison's arithmetic on fixed numbers, its commands, and its imports.

Neither side may load the other's framework.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import side_by_side, workload
from benchmarks.side_by_side import WORKS, Target, judge, ratio, table
from benchmarks.workload import Record, Stage

PEERS = WORKS["1.3b-image"].peers


def record(side, rollout, update, peak, tflops=500.0):
    return Record(
        side,
        {"rollout": Stage(rollout, peak, tflops), "update": Stage(update, peak, tflops)},
        "GPU",
        "1.0",
        (0.999, 1.001),
    )


RECORDS = {
    "ours": record("ours", 50.0, 200.0, 5.0, 553.0),
    "autocast": record("peer", 150.0, 400.0, 12.0),
    "bf16": record("peer", 120.0, 390.0, 4.5),
    "bf16-compile": record("peer", 90.0, 420.0, 6.0),
}


def test_ratios_are_to_the_fastest_peer_of_each_stage():
    assert ratio(RECORDS, "rollout", "autocast") == 3.0
    assert ratio(RECORDS, "rollout", "best") == 1.8 and ratio(RECORDS, "update", "best") == 1.95
    assert ratio({"ours": RECORDS["ours"]}, "rollout", "best") is None


@pytest.mark.parametrize(
    "target, verdict",
    [
        (Target("rollout", "autocast", 2.5), "2.5x autocast: 3.00, reached"),
        (Target("rollout", "autocast", 3.0), "3x autocast: 3.00, reached"),
        (Target("rollout", "best", 2.0), "2x best: 1.80, **not reached**"),
        (Target("rollout", "mfu", 0.7), "MFU 0.70: 0.70, reached"),  # 553 of 790
        (Target("rollout", "memory"), "memory at most 4.5 GiB (bf16): 5.0, **not reached**"),
    ],
)
def test_targets(target, verdict):
    assert judge(RECORDS, target, PEERS) == verdict


def test_targets_need_what_they_compare_with():
    some = {side: RECORDS[side] for side in ("ours", "autocast")}
    assert (
        judge(some, Target("rollout", "best", 2.0), PEERS)
        == "2x best: no peer in bf16 was measured"
    )
    assert (
        judge({"bf16": RECORDS["bf16"]}, Target("rollout", "mfu", 0.6), PEERS)
        == "MFU 0.60: not measured"
    )
    assert judge(some, Target("rollout", "best", 2.0), ("autocast",)) == "2x best: 3.00, reached"


def test_table_has_a_row_for_each_stage_and_says_what_failed(tmp_path):
    results = {"1.3b-image": {}}
    for side, found in RECORDS.items():
        found.write(tmp_path / "record.json")
        results["1.3b-image"][side] = json.loads((tmp_path / "record.json").read_text())
    results["1.3b-image"]["bf16"] = {"failed": "out of memory"}
    lines = table(results).splitlines()
    assert lines[2] == (
        "| 1.3B, 9 x 1 x 512 x 512 | rollout | 50.0 | 150.0 | 90.0 (bf16-compile) | 3.00 | 1.80 | "
        "0.56 | 0.70 | 5.0 | 12.0 | 6.0 | 2.5x autocast: 3.00, reached; "
        "2x best: 1.80, **not reached**; MFU 0.65: 0.70, reached; "
        "memory at most 6.0 GiB (bf16-compile): 5.0, reached |"
    )
    assert (
        "- 1.3B, 9 x 1 x 512 x 512, bf16: failed, out of memory" in lines
        and lines[-1] == "- GPU, 1.0"
    )
    assert {len(line.split(" | ")) for line in lines[2:4]} == {len(side_by_side.HEAD)}


def test_both_sides_get_the_same_shape():
    for work in WORKS.values():
        commands = [side_by_side.command(work, side) for side in (*work.own, *work.peers)]
        assert all(set(work.shape.split()) <= set(c) for c in commands)
        assert {target.stage for target in work.targets} <= set(work.stages)


def test_what_fails_or_takes_too_long_is_told(tmp_path):
    failed = side_by_side.run([sys.executable, "-c", "raise SystemExit('broken')"], tmp_path, 20)
    assert failed == "exit code 1: broken"
    slow = side_by_side.run([sys.executable, "-c", "import time; time.sleep(9)"], tmp_path, 0.2)
    assert "took longer" in slow and side_by_side.run([], tmp_path, 0) == "no time left"


@pytest.mark.parametrize("given, used", [(None, "0.95"), ("0.5", "0.5")])
def test_a_process_may_use_the_whole_gpu(tmp_path, monkeypatch, given, used):
    if given is None:
        monkeypatch.delenv(side_by_side.MEMORY, raising=False)
    else:
        monkeypatch.setenv(side_by_side.MEMORY, given)
    code = f"import os; assert os.environ[{side_by_side.MEMORY!r}] == {used!r}"
    assert side_by_side.run([sys.executable, "-c", code], tmp_path, 20) is None


def test_a_side_whose_search_failed_is_not_measured(tmp_path, monkeypatch):
    work = next(work for work in WORKS.values() if work.search)
    monkeypatch.setattr(
        side_by_side, "run", lambda arguments, *_: None if "--json" in str(arguments) else "broken"
    )
    (tmp_path / "record.json").write_text("{}")
    found, written = {}, []
    sides = [work.own[0]]
    side_by_side.measure(work, sides, tmp_path, 9.0, found, lambda: written.append(dict(found)))
    assert "broken" in found[work.own[0]]["failed"] and written == [found]


def test_epoch_comes_out_even():
    assert [rows.tolist() for rows in workload.epoch_rows(2, 2, 2, 2)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="groups=3 x group_size=2"):
        workload.epoch_rows(3, 2, 4, 1)


def test_signs_differ_inside_a_group_and_can_be_scored():
    from rewards.ocr.rules import OCRReward

    targets = [target for _, target in workload.prompts(1)] * 4
    videos = workload.signs(targets, 1, 128, 256, seed=0)
    assert videos.shape == (4, 1, 128, 256, 3) and videos.dtype == np.uint8
    reward = OCRReward(rule="flow_grpo_video")
    scores = [reward.score(video, target).value for video, target in zip(videos, targets)]
    assert max(scores) > 0.6 and np.ptp(scores) > 0.05
    assert (videos == workload.signs(targets, 1, 128, 256, seed=0)).all()


def test_what_is_shared_loads_no_framework():
    code = "import sys, benchmarks.side_by_side; assert not {'jax', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
