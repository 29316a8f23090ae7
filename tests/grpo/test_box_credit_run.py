"""Runs whose loss is weighted by the boxes of the text that was read, and whose KL has a gate."""

import functools
import pathlib
import shutil

import numpy as np
import pytest

from grpo import train
from grpo.scoring.reward_combination import MAIN
from rewards.composite import CompositeReward
from rewards.pool import RewardPool
from rewards.quality import QualityReward
from tests.grpo.tiny_run import arrays_of, assert_same, result
from tests.rewards.pool_rewards import Boxed

SETTINGS = {
    "train.box_credit": 0.5,
    "train.box_kl": True,
    "train.kl_gate": 0.5,
    "train.kl_weight": 0.1,
    "reward.panel": ("exposure",),
    "train.timesteps": 2,
    "train.updates_per_epoch": 1,
    # 8 x 8 cells, of which boxes cover a part
    "sample.height": 64,
    "sample.width": 64,
}


REWARDS = {MAIN: Boxed, "exposure": functools.partial(QualityReward, "exposure")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nft", "grpo"])
def test_a_run_by_cell_resumes_bit_for_bit(start, method, capsys):
    """On two devices. The same rewards without boxes train otherwise."""
    spec, *others, without = start(2, **SETTINGS | {"train.method": method})
    run = pathlib.Path(spec.recipe.run_dir)
    with RewardPool(lambda: CompositeReward(REWARDS)) as pool:
        train.train(spec, *others, pool)
        last = result(run)
        shutil.rmtree(run / "checkpoints" / "2")  # as if killed before it was saved
        train.train(spec, *others, pool)
    assert_same(result(run), last)
    shutil.rmtree(run)
    train.train(spec, *others, without)
    alike = arrays_of(run)
    assert any(not np.array_equal(alike[name], values) for name, values in last[1].items())
    assert "compiled again" not in capsys.readouterr().out
