"""Damaged records: what can be read is read, and one warning names the rest."""

import json

import numpy as np
import pytest

from configs.defaults import defaults
from grpo.records import json_lines, run_log, trackers
from grpo.records.run_log import RunLog, ranges, read_evaluations, read_metrics
from grpo.report.run_report import summary_lines, write_report
from tests.grpo.records.run_folders import evaluation, write
from tests.grpo.report.pages import Page, report_of_run

DEEP = b'{"epoch": ' + b"[" * 100_000


def edit(path, line, text):
    """Replaces one line of a file, from 1; adds it after the last."""
    lines = path.read_bytes().splitlines()
    lines[line - 1 : line] = [text]
    path.write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize(
    "text",
    [b'{"epoch": 2, "l', b"\0\0\0", b"[1, 2]", b"{}", b'{"epoch": "2"}', b"null", b"\xff", DEEP],
    ids=lambda text: repr(text[:16]),
)
def test_a_bad_line_in_the_middle_is_left_out_and_copied(tmp_path, capsys, text):
    write(tmp_path, (1, 2, 3))
    path = tmp_path / "metrics.jsonl"
    edit(path, 2, text)
    damaged = path.read_bytes()
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1, 3]
    write(tmp_path, (4,), resume=3)
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1, 3, 4]
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == damaged
    first, missing, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith(f"warning: {path}: 1 of 3 lines") and "line 2 (" in first
    assert f"{path} has no record of epoch(s) 2," in missing


def test_a_last_line_cut_off_is_dropped_and_its_epoch_named(tmp_path, capsys):
    """The epoch is named only if its checkpoint exists; else the run computes it again."""
    write(tmp_path, (1, 2, 3), evals=(1, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    write(tmp_path, (3,), resume=2)
    assert "metrics" not in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-20])
    write(tmp_path, (4,), resume=3)
    assert "has no record of epoch(s) 3, which the checkpoint of epoch 3" in capsys.readouterr().err
    assert not path.with_name("metrics.jsonl.damaged").exists()


def test_a_missing_log_is_named(tmp_path, capsys):
    write(tmp_path, (1, 2, 3))
    (tmp_path / "metrics.jsonl").unlink()
    write(tmp_path, (4,), resume=3)
    err = capsys.readouterr().err
    assert (
        "has no record of epoch(s) 1 to 3," in err
        and "evals.jsonl has no evaluation of epoch 0" in err
    )
    assert "The log has no record of epoch(s) 1 to 3;" in write_report(tmp_path).read_text()
    assert ranges(()) == "" and ranges([7, 1, 3, 2]) == "1 to 3, 7"


def test_stray_files_stay(tmp_path):
    write(tmp_path, (1, 2), evals=(1, 2))
    stray = [
        tmp_path / "previews" / name for name in ("eval_abc.npz", "eval_.npz", "eval_2.npz.old")
    ]
    for path in stray:
        path.write_bytes(b"")
    write(tmp_path, (2,), resume=1)
    assert sorted(p for p in (tmp_path / "previews").iterdir() if not p.is_dir()) == sorted(
        [*stray, tmp_path / "previews" / "eval_000001.npz"]
    )


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: b"PK" + whole[2:40] + bytes(200),
        lambda whole: whole[:60] + bytes(30) + whole[90:],
    ],
    ids=["half", "empty", "garbage", "zeros"],
)
def test_previews_that_cannot_be_read_are_left_out(tmp_path, capsys, spoil):
    report_of_run(tmp_path)
    path = run_log.preview_path(tmp_path, 0)
    path.write_bytes(spoil(path.read_bytes()))
    assert run_log.read_previews(tmp_path, 0) is None
    text = write_report(tmp_path).read_text()
    assert "0.46 → 0.61" in text and text.count("data:image/png") == 2
    assert f"{path} cannot be read" in capsys.readouterr().err


def test_previews_of_another_kind_are_left_out(tmp_path):
    path = run_log.preview_path(tmp_path, 0)
    path.parent.mkdir()
    for values in (
        dict(videos=np.zeros((2, 3))),
        dict(other=np.zeros(2)),
        dict(videos=np.array([{}], object)),
    ):
        np.savez(path, **values)
        assert run_log.read_previews(tmp_path, 0) is None


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "change",
    [
        {"prompts": None},
        {"prompts": ["a"]},
        {"texts": [None, "b"]},
        {"rewards": 1.0},
        {"rewards": ["x", 0.5]},
        {"low": "x"},
        {"num": []},
    ],
    ids=str,
)
def test_an_evaluation_without_its_fields_is_left_out(tmp_path, capsys, change):
    write(tmp_path, (1, 2), evals=(1, 2))
    edit(tmp_path / "evals.jsonl", 1, json.dumps(json_lines.plain(evaluation(1) | change)).encode())
    assert [r["epoch"] for r in read_evaluations(tmp_path)] == [2]
    Page(write_report(tmp_path).read_text())
    assert capsys.readouterr().err.count("evals.jsonl: 1 of 2 lines") == 1, (
        "once, however often it is read"
    )


def test_metrics_that_are_no_numbers_are_not_drawn(tmp_path):
    log = RunLog(tmp_path)
    for i, odd in enumerate(("x", [None], [1], {"a": 1}, True), 1):
        log.epoch(
            {"epoch": 2 * i - 1}
            | dict.fromkeys(
                (
                    "reward_mean",
                    "seconds",
                    "idle_share",
                    "videos",
                    "spent_seconds",
                    "kl",
                    "kl_max",
                    "experts",
                ),
                odd,
            )
        )
        log.epoch(
            {
                "epoch": 2 * i,
                "seconds": {"sample": odd, "update": 1.5},
                "experts": {"a": odd, "b": {"kl": odd}},
            }
        )
    log.epoch({"epoch": 11, "reward_mean": 0.5, "kl": 0.125, "videos": 8})
    log.config({"epochs": 20})
    log.close()
    text = write_report(tmp_path).read_text()
    Page(text)
    assert "0.125 (epoch 11)" in text and "Epoch 11 of 20" in text and "8 videos sampled" in text


def test_evaluations_that_could_not_be_scored_are_left_out_by_name(tmp_path):
    """They have no reward and no interval, which JSON holds as null."""
    log, nan = RunLog(tmp_path), float("nan")
    log.evaluation(evaluation(0))
    log.evaluation(
        evaluation(4) | {"reward": nan, "low": nan, "high": nan, "num": 0, "rewards": [nan, nan]}
    )
    log.close()
    text = write_report(tmp_path).read_text()
    Page(text)
    assert (
        "OCR reward 0.50 on 2" in text
        and "no result of the evaluation after epoch 4" in text
        and "nan" not in text
    )
    assert any("epoch 4" in line for line in summary_lines(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"mlflow": 5}', ""])
def test_other_files_of_a_run_that_cannot_be_read(tmp_path, capsys, text):
    for name in ("config.json", "trackers.json"):
        (tmp_path / name).write_text(text)
    Page(write_report(tmp_path).read_text())
    assert trackers._stored_id(tmp_path, "mlflow", {"uri": "x"}) is None
    trackers._store_id(tmp_path, "mlflow", {"uri": "x"}, "7")
    assert trackers._stored_id(tmp_path, "mlflow", {"uri": "x"}) == "7"
    warned = capsys.readouterr().err.count("cannot be read")
    assert warned == (0 if text.startswith('{"') else 2)
    RunLog(tmp_path, 0, defaults().log).close()
