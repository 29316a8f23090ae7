"""Groups without spread teach nothing: no method makes a step from them."""

import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grpo.learner import Learner

from grpo import train
from grpo.compiled.functions import Run
from grpo.learning.optimiser import init_state
from grpo.learning.selection import Selection
from grpo.records.run_log import read_metrics
from grpo.rollout import Trajectory
from grpo.settings.parse import from_config
from rewards.base import Score
from rewards.pool import RewardPool
from tests.grpo import test_programs, test_train
from tests.grpo.test_train import arrays_of, newest
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.models import presets

start = test_programs.start
METHODS = {
    "grpo": {},
    "grpo with its KL in the reward": {"train.kl_as": "reward", "train.kl_weight": 0.1},
    "grpo with a KL weight that adapts": {"train.kl_target": 0.1, "train.kl_weight": 0.1},
    "grpo with an average as reference": {"train.kl_reference": "average"},
    "nft": {},
    "rwr": {},
    "sft": {},
    "dpo": {},
    "dpo, online": {"train.reference_every": 1},
}
SPREAD = np.array([0.5, 0.5, 0.5, 0.5, 0.2, 0.4, 0.9, 0.9])


def learner_of(method, combine="rewards", **overrides):
    """A learner of two groups of four, whose update adds 1 to every float of the state and counts
    in its integers.
    """
    namespace = {}
    exec(
        test_train.RECIPE.format(
            run="run", model="model", train="train.txt", heldout="heldout.txt"
        ),
        namespace,
    )
    c = namespace["get_config"]()
    c.train.method, c.train.timesteps, c.reward.combine = method, 2, combine
    c.update_from_flattened_dict(overrides)
    s = from_config(c)
    run = Run(
        presets.PRESETS["wan2.1-1.3b"], c, mesh_lib.make_mesh(devices=jax.devices()[:1]), "xla"
    )
    weights = {"w": jax.device_put(jnp.ones(3), mesh_lib.replicated(run.mesh))}
    states = {"transformer": init_state(weights, s.optimiser, s.loss, s.keeps_old)}
    batches = []

    def update(state, frozen, *batch):
        batches.append(batch)
        metrics = types.SimpleNamespace(averages=lambda: {"ratio_min": 1.0, "ratio_max": 1.0})
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), metrics, {"grad_norm": 1.0}

    vars(run)["updates"] = [update]
    learner = Learner(
        c,
        s,
        run,
        None,
        {1: run.shape},
        *(None,) * 5,
        {},
        lambda _: None,
        states,
        lambda x: x,
        None,
        None,
    )
    learner.texts = lambda prompt_of: TextBatch(
        jnp.zeros((len(prompt_of), 2, 3)), jnp.zeros((2, 3)), 1
    )
    return learner, batches


def learn(learner, rewards):
    """(record, the videos and pairs that counted in each update) of an epoch with these rewards."""
    videos, steps = len(rewards), 2
    trajectories = []
    for _ in range(learner.s.batches):
        x, row = jnp.zeros((steps, 4, *learner.run.shape)), jnp.zeros((steps, 4))
        trajectories.append(Trajectory(x, x, row, jnp.arange(steps), learner.texts(np.arange(4))))
    kl = {"transformer": np.linspace(0, 1, steps * videos).reshape(steps, videos)}
    scores = types.SimpleNamespace(values=rewards, valid=np.isfinite(rewards), parts={}, error="")
    sampled = types.SimpleNamespace(
        key=jax.random.key(0),
        prompt_of=np.repeat([3, 5], 4),
        kl=kl,
        importance={},
        trajectories={"transformer": trajectories},
        scores=scores,
        finished=[jnp.zeros((4, *learner.run.shape))] * learner.s.batches,
    )
    return learner.learn(1, sampled, learner.lesson(sampled, {}))


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
    learner, batches = learner_of(name.split()[0].strip(","), combine, **METHODS[name])
    before = jax.tree.map(np.asarray, learner.states)
    # a single score has no spread either
    one_left = np.array([0.7, np.nan, np.nan, np.nan, 0.5, 0.5, 0.5, 0.5])
    for rewards in (np.full(8, 0.1), one_left):
        assert learn(learner, rewards) == {"updates": 0, "videos_trained": 0}
    assert not batches and jax.tree.all(jax.tree.map(np.array_equal, before, learner.states))
    assert learn(learner, SPREAD)["updates"] == len(batches) > 0
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, before, learner.states)))


@pytest.mark.parametrize(
    "method, counted", [("nft", 4), ("rwr", 4), ("sft", 1), ("dpo", 1), ("grpo", 8)]
)
def test_one_group_without_spread_is_masked(method, counted):
    """In the methods on finished videos; in Flow-GRPO, where its advantages are 0, it still counts
    for mean and KL.
    """
    learner, batches = learner_of(method, **{"train.updates_per_epoch": 1})
    record = learn(learner, SPREAD)
    ((batch, *_),) = batches
    assert int(batch.valid.sum()) == counted
    assert record["videos_trained"] == (2 if method == "dpo" else counted)


def test_old_weights_follow_in_the_last_update_that_is_made():
    """The first update of the epoch has the group with spread; after the second, left out, the old
    policy samples.
    """
    learner, batches = learner_of("nft", **{"train.old_rate": 0.1})
    learn(learner, SPREAD[::-1])
    assert [kept for _, kept in batches] == [0.1]
    learn(learner, np.linspace(0, 1, 8))
    assert [kept for _, kept in batches] == [0.1, 1.0, pytest.approx(0.3)], (
        "numbers of updates made"
    )


def test_numbers_of_what_counts():
    numbers, valid = np.arange(4), np.array([True, False, True, True])
    assert Selection(numbers, None, numbers, valid).numbers.tolist() == [0, 2, 3]
    assert sorted(Selection(numbers, numbers + 4, numbers, valid).numbers.tolist()) == [
        0,
        2,
        3,
        4,
        6,
        7,
    ]


class Constant:
    def score(self, frames, record):
        return Score(0.25, "the same")


def test_a_whole_run_of_equal_rewards_changes_nothing(start, capsys):
    """By the method that would imitate its own samples, with weight decay."""
    c, s, *rest, _ = start(
        1, **{"train.method": "rwr", "train.weight_decay": 0.1, "train.timesteps": 2, "epochs": 1}
    )
    train.train(c, s, *rest, RewardPool(Constant, workers=0))
    assert (
        "epoch 1/1: reward 0.250" in (out := capsys.readouterr().out)
        and "nothing to learn from" in out
    )
    assert read_metrics(c.run_dir)[0]["updates"] == 0 and newest(pathlib.Path(c.run_dir)) == 1
    after = arrays_of(pathlib.Path(c.run_dir))
    shutil.rmtree(pathlib.Path(c.run_dir, "checkpoints", "1"))
    before = arrays_of(pathlib.Path(c.run_dir))
    assert before.keys() == after.keys() and len(before) > 20
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
