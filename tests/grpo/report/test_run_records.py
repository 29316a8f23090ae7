"""Which evaluations of a run a report compares."""

import math

import numpy as np

from grpo.records.run_log import RunLog
from grpo.report.run_records import RunRecords, comparable, without_result
from tests.grpo.report.pages import epoch_record, evaluation


def test_other_prompts_are_not_compared():
    old, new = evaluation(0, 0.2, prompts=["x"] * 8), [evaluation(4, 0.5), evaluation(8, 0.6)]
    assert comparable([old, *new]) == new
    assert comparable([]) == []


def test_evaluations_without_a_result_are_named():
    lost = [evaluation(epoch, math.nan) for epoch in (3, 7)]
    assert comparable([*lost, evaluation(8, 0.5)]) == [evaluation(8, 0.5)]
    assert "3, 7" in without_result([evaluation(0, 0.5), *lost])
    assert without_result([evaluation(0, 0.5)]) == ""


def test_the_first_and_the_last_are_compared(tmp_path):
    log = RunLog(tmp_path)
    log.config({"epochs": 9})
    for epoch in (0, 2, 4):
        videos = np.full((2, 1, 4, 6, 3), epoch, np.uint8)
        log.evaluation(evaluation(epoch, 0.5), videos if epoch else None)
    log.epoch(epoch_record(4))
    log.close()
    run = RunRecords.read(tmp_path)
    assert [e["epoch"] for e in run.recorded] == [0, 2, 4]
    assert [e["epoch"] for e in run.ends] == [0, 4]
    ((last, videos),) = run.previews
    assert last["epoch"] == 4 and videos.shape == (2, 1, 4, 6, 3) and (videos == 4).all()
    assert run.last_epoch == 4 and run.config == {"epochs": 9}


def test_an_empty_folder(tmp_path):
    run = RunRecords.read(tmp_path)
    assert (run.config, run.metrics, run.recorded, run.ends, run.previews) == ({}, [], [], [], [])
    assert run.last_epoch == 0
