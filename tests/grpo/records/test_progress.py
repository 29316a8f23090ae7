"""How far a run is: the estimate of its rest."""

import pytest

from grpo.records.clock import duration
from grpo.records.progress import estimate, forecast


def epoch(number, total=10.0, **values):
    return {"epoch": number, "seconds": {"save": 1.0, "total": total}} | values


CONFIG = {"epochs": 10, "eval": {"every": 4}}


def test_the_rest_is_epochs_and_evaluations():
    """Epochs 4 to 10 take 10 s and 1 s to save, the evaluations after 4, 8 and 10 take 7 s."""
    records = [epoch(1, total=99.0), epoch(2), epoch(3)]
    evaluations = [{"seconds": 5.0, "unguided": {"seconds": 2.0}}]
    progress = estimate(records, evaluations, CONFIG)
    assert (progress.epoch, progress.last, progress.finished) == (3, 10, False)
    assert progress.seconds == pytest.approx(7 * 11 + 3 * 7) and progress.eta == "98 s"


def test_the_time_of_an_epoch_follows_the_size_of_its_videos():
    """Epochs 1 to 3 take 11 s, those from 5 on four times as long, by their tokens."""
    sample = {"frames": 1, "height": 64, "width": 128, "shift": 3.0, "frame_schedule": []}
    config = CONFIG | {"sample": sample | {"size_schedule": [[5, 128, 256, 4.0]]}}
    records = [epoch(1), epoch(2), epoch(3)]
    assert estimate(records, [], config).seconds == pytest.approx(11 + 6 * 44)
    records += [epoch(4), epoch(5, total=43.0)]
    assert estimate(records, [], config).seconds == pytest.approx(5 * 44)


def test_a_budget_ends_the_run_before_its_last_epoch():
    records = [epoch(n, spent_evaluations=24 * n, spent_seconds=8.0 * n) for n in (1, 2)]
    budget = {"evaluations": 100, "seconds": None}
    assert estimate(records, [], CONFIG | {"budget": budget}).last == 5
    assert estimate(records, [], CONFIG | {"budget": {"seconds": 16.0}}).finished
    assert estimate(records[:1], [], CONFIG | {"budget": {"seconds": 15.0}}).last == 2


def test_what_is_unknown_is_not_estimated():
    assert estimate([], [], {}).finished
    assert estimate([{"epoch": 3}], [], CONFIG).seconds is None
    assert estimate([{"epoch": 3}], [], CONFIG).eta == ""
    assert estimate([epoch(10)], [], CONFIG).eta == ""


def test_before_the_first_epoch_the_evaluation_is_the_measure():
    """Ten epochs of three evaluations of 20 s, and the evaluations after 4, 8 and 10."""
    records = [{"seconds": 15.0, "unguided": {"seconds": 5.0}}]
    assert forecast(3.0, 24, records, CONFIG).seconds == pytest.approx(10 * 60 + 3 * 20)
    assert forecast(3.0, 24, records, CONFIG | {"budget": {"evaluations": 100}}).last == 5
    assert forecast(3.0, 24, records, CONFIG | {"budget": {"seconds": 61.0}}).last == 2
    assert forecast(3.0, 24, [], CONFIG).eta == ""


def test_damaged_records_do_no_harm():
    nan = float("nan")
    damaged = [{"epoch": 1, "seconds": "x"}, epoch(2, total=nan), epoch(3, total="x")]
    budget = {"budget": {"seconds": 100.0, "evaluations": 9}}
    assert estimate(damaged, [{"seconds": "x"}], CONFIG | budget).seconds is None
    spent = epoch(4, spent_seconds="x", spent_evaluations=nan)
    evaluations = [{"seconds": nan, "unguided": 3}]
    assert estimate([*damaged, spent], evaluations, CONFIG | budget).seconds == 66.0


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (7500, "2 h 05 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
