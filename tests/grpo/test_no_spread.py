"""Groups without spread teach nothing: no method makes a step from them."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from grpo import train
from grpo.credit import compute_credit
from grpo.records.run_log import read_metrics
from grpo.update import update_epoch
from rewards.base import Score
from rewards.pool import RewardPool
from tests.grpo.epoch_inputs import rollout_of, scores_of, session_of, states_of
from tests.grpo.specs import tiny_spec
from tests.grpo.tiny_run import arrays_of, newest

METHODS = {
    "grpo": {},
    "grpo with its KL in the reward": {"train.kl_as": "reward", "train.kl_weight": 0.1},
    "grpo with a KL weight that adapts": {"train.kl_target": 0.1, "train.kl_weight": 0.1},
    "grpo with an average as reference": {"train.kl_reference": "average"},
    "nft": {},
    "awm": {},
    "dgpo": {},
    "rvm": {},
    "rwr": {},
    "sft": {},
    "dpo": {},
    "dpo, online": {"train.reference_every": 1},
}
SPREAD = np.array([0.5, 0.5, 0.5, 0.5, 0.2, 0.4, 0.9, 0.9])


def epoch_of(method, **values):
    """Return (a function that learns from an epoch's rewards, the states, the updates' arguments).

    The function returns the record.
    """
    spec = tiny_spec(**{"train.method": method, "train.timesteps": 2} | values)
    session, made = session_of(spec)
    states = states_of(spec)

    def learn(rewards):
        rollout = rollout_of(spec)  # its trajectories are used up
        credit = compute_credit(spec, scores_of(rewards), rollout.prompt_of, {})
        new, record = update_epoch(session, states, 1, rollout, credit)
        states.update(new)
        return record

    return learn, states, made


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    "name, combine",
    [
        *((name, "rewards") for name in METHODS),
        ("grpo", "advantages"),
        ("nft", "advantages"),
        ("dpo", "advantages"),
    ],
)
def test_equal_rewards_leave_the_state_as_it_was(name, combine):
    """Parameters, moments, averages, counters and the KL's control, bit for bit; unequal rewards
    change all of them.
    """
    method = name.split()[0].strip(",")
    learn, states, made = epoch_of(method, **METHODS[name] | {"reward.combine": combine})
    before = jax.tree.map(np.asarray, states)
    # a single score has no spread either
    one_left = np.array([0.7, np.nan, np.nan, np.nan, 0.5, 0.5, 0.5, 0.5])
    for rewards in (np.full(8, 0.1), one_left):
        assert learn(rewards) == {"updates": 0, "videos_trained": 0}
    assert not made and jax.tree.all(jax.tree.map(np.array_equal, before, states))
    assert learn(SPREAD)["updates"] == len(made) > 0
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, before, states)))


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "method, counted",
    [
        ("nft", 4),
        ("awm", 4),
        ("dgpo", 4),
        ("rvm", 4),
        ("rwr", 4),
        ("sft", 1),
        ("dpo", 1),
        ("grpo", 8),
    ],
)
def test_one_group_without_spread_is_masked(method, counted):
    """In the methods on finished videos; in Flow-GRPO, where its advantages are 0, it still counts
    for mean and KL.
    """
    learn, _, made = epoch_of(method, **{"train.updates_per_epoch": 1})
    record = learn(SPREAD)
    ((batch, _),) = made
    assert int(batch.valid.sum()) == counted
    assert record["videos_trained"] == (2 if method == "dpo" else counted)


def test_videos_with_advantage_0_are_dropped_on_demand():
    """Those of a group without spread, and one at its group's mean. With a KL in the reward all
    have advantages. An update of such videos only is left out.
    """
    drop = {"train.zero_advantages": "drop"}
    rewards = np.array([0.5, 0.5, 0.5, 0.5, 0.2, 0.4, 0.9, 0.5])
    for values, updates, kept in (
        ({"train.updates_per_epoch": 1}, 1, [4, 5, 6]),
        ({}, 1, [4, 5, 6]),
        ({"train.kl_as": "reward", "train.kl_weight": 0.1}, 1, [4, 5, 6, 7]),
    ):
        learn, _, made = epoch_of("grpo", **drop | values)
        record = learn(rewards)
        assert (record["updates"], record["videos_trained"]) == (updates, len(kept))
        valid = np.concatenate([batch.valid.ravel() for batch, _ in made])
        np.testing.assert_array_equal(np.flatnonzero(valid) + 8 - len(valid), kept)


def test_old_weights_follow_in_the_last_update_that_is_made():
    """The first update of the epoch has the group with spread; after the second, left out, the old
    policy samples. The shares follow the number of updates made.
    """
    learn, _, made = epoch_of("nft", **{"train.old_rate": 0.1})
    learn(SPREAD[::-1])
    assert [kept for _, kept in made] == [{"old": 0.1}]
    learn(np.linspace(0, 1, 8))
    assert [kept["old"] for _, kept in made] == [0.1, 1.0, pytest.approx(0.3)]


class Constant:
    def score(self, frames, record):
        return Score(0.25, "the same")


@pytest.mark.slow
def test_a_whole_run_of_equal_rewards_changes_nothing(start, capsys):
    """By the method that would imitate its own samples, with weight decay."""
    settings = {"train.method": "rwr", "train.weight_decay": 0.1, "train.timesteps": 2, "epochs": 1}
    *arguments, _ = start(1, **settings)
    train.train(*arguments, RewardPool(Constant, workers=0))
    run = pathlib.Path(arguments[0].recipe.run_dir)
    out = capsys.readouterr().out
    assert "epoch 1/1: reward 0.250" in out and "nothing to learn from" in out
    assert read_metrics(run)[0]["updates"] == 0 and newest(run) == 1
    after = arrays_of(run)
    shutil.rmtree(run / "checkpoints" / "1")
    before = arrays_of(run)
    assert before.keys() == after.keys() and len(before) > 20
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
