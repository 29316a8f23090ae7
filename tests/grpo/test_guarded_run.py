"""A run under the guard: the best checkpoint is kept, and an alarm can end the run."""

import functools
import json
import pathlib
import shutil

import pytest

from grpo import train
from grpo.records.run_log import read_metrics
from grpo.scoring.reward_combination import MAIN
from rewards.composite import CompositeReward
from rewards.pool import RewardPool
from rewards.quality import QualityReward
from tests.grpo.tiny_run import assert_same, result
from tests.rewards.pool_rewards import Brightness
from wan_jax.errors import UserError
from wan_jax.storage import checkpoint

SETTINGS = {
    "reward.panel": ("exposure",),
    "train.learning_rate": 1e-2,
    "train.alarm_tolerance": 1e-9,  # every change of the pictures is an alarm
    "eval.every": 1,
    "save.every": 9,
    "save.keep": 1,
    "epochs": 3,
}


@pytest.fixture
def run(start):
    """A function: run(**values) trains by the settings above, and returns the run's folder."""
    factories = {MAIN: Brightness, "exposure": functools.partial(QualityReward, "exposure")}

    def train_by(**values):
        spec, *others, _ = start(1, **SETTINGS | values)
        pool = RewardPool(lambda: CompositeReward(factories), workers=0)
        train.train(spec, *others, pool)
        return spec.recipe.run_dir

    return train_by


@pytest.mark.slow
def test_an_alarm_stops_the_run_and_is_no_obstacle_to_going_on(run, capsys):
    with pytest.raises(UserError, match=r"epoch 1: exposure moved.*on_alarm=log") as error:
        run(**{"train.on_alarm": "stop"})
    assert "checkpoints/0" in str(error.value)  # the base is the best
    with pytest.raises(UserError, match="epoch 1: exposure moved"):  # the same command again
        run(**{"train.on_alarm": "stop"})
    capsys.readouterr()
    folder = run()
    output = capsys.readouterr().out
    assert "after epoch 1" in output and output.count("alarm: exposure moved") == 2
    assert "The best checkpoint is epoch 0" in output

    # the best checkpoint stays beside the newest one
    checkpoints = checkpoint.Checkpoints(folder)
    assert checkpoints.epochs() == [0, 3] and checkpoints.best() == 0
    found, epoch = checkpoint.find(f"{folder}/best")
    assert (found.folder, epoch) == (checkpoints.folder, 0)
    assert checkpoint.find(folder)[1] == 3
    assert "epoch 0" in json.loads((checkpoints.folder.parent / "best.json").read_text())["why"]


@pytest.mark.slow
def test_what_an_alarm_stops_is_saved_where_no_best_one_is_kept(run, tmp_path):
    """As its message says, though neither save.every nor the evaluation asks for it."""
    with pytest.raises(UserError, match=r"Epoch 1 is saved\. To continue"):
        run(**{"train.on_alarm": "stop", "save.best": False, "save.keep": 9})
    (folder,) = tmp_path.glob("**/checkpoints")
    assert checkpoint.Checkpoints(folder.parent).epochs() == [0, 1]


@pytest.mark.slow
def test_a_velocity_that_is_too_far_stops_the_run(start, capsys):
    """After an epoch whose checkpoint is kept; once the bound is raised, the same run goes on."""
    values = {"train.method": "nft", "train.timesteps": 2, "epochs": 2, "eval.every": 9}
    values |= {"train.learning_rate": 1e-2, "train.updates_per_epoch": 2, "save.every": 9}

    def run(bound):
        spec, *rest = start(1, **values, **{"train.max_velocity_distance": bound})
        train.train(spec, *rest)
        return spec.recipe.run_dir

    for _ in range(2):  # the same command again
        with pytest.raises(UserError, match=r"epoch 1: old_distance reached .*=1e-09") as error:
            run(1e-9)
    assert "Epoch 1 is saved" in str(error.value)
    folder = run(1e3)
    assert "after epoch 1" in capsys.readouterr().out
    records = read_metrics(folder)
    assert [record["epoch"] for record in records] == [1, 2]
    # the first update begins at the behaviour policy
    assert records[0]["old_distance_min"] < 1e-12 < 1e-9 < records[0]["old_distance_max"]
    assert all(record["grad_rms"] > 0 for record in records)


@pytest.mark.slow
def test_without_an_alarm_the_best_is_the_highest(run, capsys):
    folder = run(**{"train.alarm_tolerance": float("inf"), "save.keep": 9, "save.best": False})
    assert "alarm: " not in capsys.readouterr().out
    checkpoints = checkpoint.Checkpoints(folder)
    assert checkpoints.epochs() == [0, 3] and checkpoints.best() is None
    with pytest.raises(UserError, match=r"save\.best=True"):
        checkpoint.find(f"{folder}/best")


@pytest.mark.slow
def test_an_alarm_raises_the_kl_and_a_continued_run_has_the_same_one(run, capsys):
    """Bit for bit, without another compilation; once there is no alarm, the weight is the recipe's."""
    settings = {
        "train.on_alarm": "kl",
        "train.alarm_kl": 0.5,
        "train.alarm_calm": 1,
        "save.keep": 9,
    }
    folder = pathlib.Path(run(**settings))
    output = capsys.readouterr().out
    weights = [record["kl_weight"] for record in read_metrics(folder)]
    assert all(record["group_spread"] > 0 for record in read_metrics(folder))
    assert weights == [0.004, 0.5, 0.5] and "compiled again" not in output
    assert output.count("the weight of the KL is 0.5 from now on") == 1
    whole = result(folder)
    shutil.rmtree(folder / "checkpoints" / "3")  # as if killed before it was saved
    run(**settings)
    assert_same(result(folder), whole)
    output = capsys.readouterr().out
    assert "after epoch 2" in output and "the weight of the KL is 0.5 from now on" in output

    run(**settings | {"train.alarm_tolerance": float("inf"), "epochs": 4})
    last = read_metrics(folder)[-1]
    assert last["epoch"] == 4 and last["kl_weight"] == 0.004
