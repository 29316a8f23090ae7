"""Run logs: what is written can be read, resuming drops later records, failures damage no file."""

import errno
import json
import math
import os

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from grpo.records import run_log
from grpo.records.run_log import RunLog, read_evaluations, read_metrics
from tests.grpo.records.run_folders import evaluation, write


def board(folder):
    """Return [(step, tag, value or image)] of the event files, and the first steps of sessions."""
    found, starts = [], []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            n = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + n])
            data = data[16 + n :]
            if event.HasField("session_log"):
                starts.append(event.step)
            for v in event.summary.value:
                found.append(
                    (event.step, v.tag, v.image if v.HasField("image") else v.simple_value)
                )
    return found, starts


def test_round_trip(tmp_path):
    log = RunLog(tmp_path / "runs" / "a")
    record = {
        "epoch": np.int64(3),
        "loss": np.float32(0.5),
        "bad": float("inf"),
        "steps": np.arange(2),
        "name": "x",
        "seconds": {"sample": 1.5, "total": float("nan")},
    }
    log.epoch(record)
    log.evaluation(evaluation(3), np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 1, 4, 6, 3))
    log.config({"a": {"range": (0, 6), "none": None}, "command": "python"})
    log.close()
    text = (log.folder / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "epoch": 3,
        "loss": 0.5,
        "bad": None,
        "steps": [0, 1],
        "name": "x",
        "seconds": {"sample": 1.5, "total": None},
    }
    back = read_metrics(log.folder)[0]
    assert math.isnan(back["bad"]) and math.isnan(back["seconds"]["total"]) and back["loss"] == 0.5
    back = read_evaluations(log.folder)[0]
    assert (
        math.isnan(back["rewards"][1])
        and back["prompts"] == evaluation(3)["prompts"]
        and back["texts"][1] == ""
    )
    assert run_log.read_config(log.folder) == {
        "a": {"range": [0, 6], "none": None},
        "command": "python",
    }
    videos = run_log.read_previews(log.folder, 3)
    assert (
        videos.dtype == np.uint8 and videos.shape == (2, 1, 4, 6, 3) and videos[0, 0, 0, 1, 0] == 3
    )
    assert run_log.read_previews(log.folder, 4) is None
    assert read_metrics(tmp_path) == [] and run_log.read_config(tmp_path) == {}


def test_tensorboard_mirrors(tmp_path):
    log = RunLog(tmp_path)
    log.epoch({"epoch": 2, "loss": 0.5, "seconds": {"sample": 1.5}})
    log.evaluation(evaluation(2), np.zeros((2, 1, 4, 6, 3), np.uint8))
    log.evaluation(
        evaluation(4), np.random.default_rng(0).integers(0, 255, (2, 5, 4, 6, 3), np.uint8)
    )
    log.close()
    found, _ = board(tmp_path)
    scalars = {(step, tag): v for step, tag, v in found if isinstance(v, float)}
    assert scalars[2, "train/loss"] == 0.5 and scalars[2, "train/seconds/sample"] == 1.5
    assert scalars[2, "eval/reward"] == 0.5 and not [k for k in scalars if "epoch" in k[1]]
    images = {step: v for step, tag, v in found if tag == "eval/previews"}
    assert (
        images[2].encoded_image_string[:4] == b"\x89PNG"
        and images[4].encoded_image_string[:3] == b"GIF"
    )
    assert images[2].height >= 128
    single = {step: v for step, tag, v in found if tag == "eval/previews/001"}
    assert single[4].encoded_image_string[:3] == b"GIF" and 192 < single[2].height < 256


@pytest.mark.parametrize(
    "cut", [b"", b'{"epoch": 6, "lo', b'{"epoch": 6, "name": "h\xc3', b"\0\0\0\0", b'{"epoch": 6']
)
def test_resume(tmp_path, cut):
    """Killed after epoch 5, perhaps in the middle of a line; the newest checkpoint is that of epoch
    3.
    """
    write(tmp_path, range(1, 6), evals=(2, 4))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(cut)
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    write(tmp_path, (4, 5, 6), resume=3, evals=(6,))
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [r["epoch"] for r in read_evaluations(tmp_path)] == [2, 6]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    folder = tmp_path / "previews"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*")) == [
        *(f"{i}/epoch_00000{epoch}.png" for i in ("000", "001") for epoch in (2, 6)),
        "eval_000002.npz",
        "eval_000006.npz",
    ]
    assert 4 in board(tmp_path)[1], "TensorBoard is told to forget the steps from 4 on"


def test_whole_last_line_without_its_end_is_kept(tmp_path):
    write(tmp_path, (1, 2))
    data = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(data[:-1])
    write(tmp_path, (3,), resume=2)
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_new_start_sets_old_records_aside(tmp_path):
    write(tmp_path, (1, 2))
    old = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, (1,))
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1]
    assert (tmp_path / "metrics.jsonl.old").read_bytes() == old


def test_full_disk_leaves_good_files(tmp_path, monkeypatch):
    write(tmp_path, (1, 2), evals=(2,))
    log = RunLog(tmp_path, 2)
    log.config({"a": 1})
    before = {
        p: p.read_bytes()
        for p in tmp_path.rglob("*")
        if p.is_file() and p.parent.name != "tensorboard"
    }

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for fail in (
        lambda: log.epoch({"epoch": 3}),
        lambda: log.config({"a": 2}),
        lambda: RunLog(tmp_path, 1),
        lambda: log.evaluation(evaluation(3), np.zeros((1, 1, 4, 6, 3), np.uint8)),
    ):
        with pytest.raises(OSError, match="No space left"):
            fail()
    monkeypatch.undo()
    after = {
        p: p.read_bytes()
        for p in tmp_path.rglob("*")
        if p.is_file() and p.parent.name != "tensorboard"
    }
    assert after == before
    log.epoch({"epoch": 3})
    log.close()
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_record_needs_its_epoch(tmp_path):
    log = RunLog(tmp_path)
    for record in ({"loss": 1.0}, {"epoch": 1.5}, {"epoch": None}):
        with pytest.raises(ValueError, match="'epoch'"):
            log.epoch(record)
    log.close()
    assert read_metrics(tmp_path) == []
