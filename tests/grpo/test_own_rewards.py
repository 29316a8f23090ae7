"""Runs by rewards of the user's own: from a file outside of the package, and from a named server."""

import pathlib

import pytest

from grpo import train as training
from grpo.records import run_log
from tests.grpo.here import train_here
from tests.grpo.tiny_run import assert_same, newest, result
from tests.rewards.serving import TOKEN, Command
from wan_jax.errors import UserError

OWN = """
import numpy as np

class Redness:
    def score(self, video, request):
        red, green, blue = video.astype(np.float64).mean(axis=(0, 1, 2)) / 255
        return {"red": red, "others": -(green + blue) / 2}

class Wins:
    def score_group(self, videos, request):
        red = [video[..., 0].mean() for video in videos]
        return [sum(a > b for b in red) / len(red) for a in red]
"""
SETTINGS = (
    "reward.workers=1",
    "reward.weights.ocr=None",
    "reward.panel=()",
    "reward.own=red=red_outside:Redness,wins=red_outside:Wins",
    "reward.own_weights=red=1.0,wins=0.5",
)


@pytest.fixture
def unquoted(recipe, monkeypatch):
    """A recipe whose prompts name no text, and a module next to it."""
    config, run = recipe
    for name, things in (("train", "cat dog sun sea"), ("heldout", "car bus oak elm")):
        lines = "".join(f"A picture of a {thing}.\n" for thing in things.split())
        (config.parent / f"{name}.txt").write_text(lines)
    (config.parent / "red_outside.py").write_text(OWN)
    monkeypatch.chdir(config.parent)
    return config, run


@pytest.mark.slow
def test_a_reward_outside_of_the_package_is_trained_and_continued_bit_for_bit(unquoted, capsys):
    """Groups of four from batches of two videos: each is compared as a whole."""
    config, run = unquoted
    settings = (*SETTINGS, "sample.batch_size=2", "eval.every=1")
    train_here(config, *settings, "epochs=2")
    assert "held-out red reward" in capsys.readouterr().out
    metrics, evaluations = run_log.read_metrics(run), run_log.read_evaluations(run)
    assert [record["main"] for record in evaluations] == ["red"] * 3
    assert set(evaluations[0]["measures"]) == {"red.red", "red.others", "wins"}
    for record in metrics:
        assert set(record["rewards"]) == {"red", "red.red", "red.others", "wins"}
        assert record["grad_norm"] > 0 and record["failed_scores"] == 0
        assert record["rewards"]["wins"] == pytest.approx(1.5 / 4)  # of four: 0, 1, 2 and 3 of 4
    again = f"run_dir={run}2"
    train_here(config, *settings, again, "epochs=1")
    train_here(config, *settings, again, "epochs=2")
    assert newest(run.parent / "run2") == 2
    assert_same(result(run), result(run.parent / "run2"))


@pytest.mark.slow
def test_a_change_of_length_may_be_decided_later(unquoted, capsys):
    """The run is then the one whose schedule was known at its start. What was trained stays."""
    config, run = unquoted
    settings = (*SETTINGS, "eval.every=1", "eval.frames=1")
    schedule = "sample.frame_schedule=((2,5),)"
    train_here(config, *settings, "epochs=2", schedule)
    later = f"run_dir={run}2"
    train_here(config, *SETTINGS, "eval.every=1", "epochs=1", later)
    train_here(config, *settings, "epochs=2", schedule, later)
    assert "sample.frame_schedule [] -> [[2, 5]]" in capsys.readouterr().out
    assert_same(result(pathlib.Path(f"{run}2")), result(run))
    assert [record["frames"] for record in run_log.read_metrics(run)] == [1, 5]
    with pytest.raises(UserError, match=r"other settings \(sample\.frame_schedule: "):
        train_here(config, *settings, "epochs=3", "sample.frame_schedule=((3,5),)", later)


@pytest.mark.slow
def test_a_server_with_a_failing_part_may_die_and_come_back(unquoted, monkeypatch, caplog):
    """One of its parts is always nan, and has no weight; the server is killed after the first epoch
    and started again. The run ends as one that nothing disturbed.
    """
    pytest.importorskip("fastapi")
    config, run = unquoted
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    flags = ("--reward=tests.rewards.own_rewards:OneIsNan", "--name=va", "--workers=1")
    settings = (
        "reward.weights.ocr=None",
        "reward.panel=()",
        "reward.workers=2",
        "reward.own_weights=va.mean=1.0,va.contrast=0.5",
        "epochs=2",
    )
    with Command(*flags) as server:
        url = server.url()
        train_here(config, *settings, f"reward.servers=va={url}")
        print_once, port = training.print_once, url.rsplit(":", 1)[1]
        restarted = []

        def restart(*lines, **kwargs):
            if str(lines[0]).startswith("epoch 1/"):
                server.kill()
                restarted.append(Command(*flags, port=port))
            print_once(*lines, **kwargs)

        monkeypatch.setattr(training, "print_once", restart)
        train_here(config, *settings, f"reward.servers=va={url}", f"run_dir={run}2")
    with restarted[0]:
        assert "is not used for now" in caplog.text
    assert_same(result(run), result(run.parent / "run2"))
    (record, *_) = run_log.read_metrics(run)
    assert record["failed_scores"] == 0
    assert record["failed_rewards"] == {"va": 8, "va.contrast": 0, "va.broken": 8}
    assert run_log.read_evaluations(run)[0]["main"] == "va.mean"
