"""Samples of a report: encodings that fit, targets and rewards."""

import math

import numpy as np
import pytest

from grpo.records.run_log import RunLog
from grpo.report.run_records import RunRecords
from grpo.report.samples import embed, format_reward, samples
from tests.grpo.report.pages import evaluation


def noise(frames, height, width):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.mark.parametrize(
    "budget, kind, begins",
    [
        (10**6, "image", "data:image/png;"),
        (20_000, "image", "data:image/jpeg;"),
        (100, "none", ""),
    ],
)
def test_the_best_encoding_that_fits(budget, kind, begins):
    picture = embed(noise(1, 100, 150), budget)
    assert picture.kind == kind and picture.uri.startswith(begins) and len(picture.uri) <= budget
    assert picture.size == "100 x 150" and (picture.width, picture.enlarged) == (300, True)


def test_a_clip_that_fits_no_video_becomes_a_picture():
    assert embed(noise(5, 32, 64), 10**6).kind == "video"
    assert embed(noise(5, 32, 64), 5000).kind == "image"
    picture = embed(noise(1, 192, 64), 10**6)
    assert (picture.width, picture.enlarged) == (64, False)


def test_rewards_are_formatted():
    assert format_reward(0.456) == "0.46" and format_reward(math.nan) == "not scored"


def test_samples_of_both_ends(tmp_path):
    log = RunLog(tmp_path)
    for epoch, count in ((0, 3), (4, 2)):
        record = evaluation(epoch, 0.5, prompts=['A "B" and "C"', "no quotes"] + ["x"] * 6)
        log.evaluation(record, noise(count, 16, 32)[:, None])
    log.close()
    first, second = samples(RunRecords.read(tmp_path))
    assert (first["prompt"], first["target"]) == ('A "B" and "C"', "“B”, “C”")
    assert second["target"] == "no quoted text"
    assert [side["epoch"] for side in first["sides"]] == [0, 4]
    assert {side["picture"].kind for side in first["sides"]} == {"image"}
    assert first["sides"][0]["reward"] == "0.46" and first["sides"][0]["text"] == "<b>OPEM</b>"


def test_some_evaluations_between_the_ends_are_shown(tmp_path):
    """The best one among them, which is not one of those at even distances."""
    log = RunLog(tmp_path)
    log.config({"reward": {"panel": []}})
    for epoch in range(10):
        low = 0.9 if epoch == 1 else 0.1
        half = {"choose": {"reward": low, "low": low, "high": low}}
        log.evaluation(
            evaluation(epoch, 0.5) | half | {"report": half["choose"]}, noise(1, 16, 32)[None]
        )
    log.close()
    (sample,) = samples(RunRecords.read(tmp_path))
    assert [side["epoch"] for side in sample["sides"]] == [0, 9]
    assert [side["epoch"] for side in sample["between"]] == [1, 2, 5, 7]


def test_an_encoded_sample_is_not_encoded_again(monkeypatch):
    first = embed(noise(1, 9, 9), 10**6)
    monkeypatch.setattr("grpo.report.samples.encode", None)
    assert embed(noise(1, 9, 9), 10**6) is first
    with pytest.raises(TypeError):
        embed(noise(1, 9, 9), 10**6 - 1)


def test_no_previews(tmp_path):
    assert samples(RunRecords.read(tmp_path)) == []
