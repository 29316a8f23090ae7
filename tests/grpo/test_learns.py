"""Training raises the reward: the whole loop, with a reward that tells any two pictures apart.

The test fails where an advantage has the wrong sign, where a score goes to another prompt's video,
and where a score that is not valid counts.
"""

import dataclasses
import functools

import numpy as np
import pytest

from grpo import train
from grpo.data.prompts import PromptSet
from grpo.records import run_log
from rewards.base import Score
from rewards.pool import RewardPool

pytestmark = pytest.mark.slow
GROUP = 16
OFFSET = {"open": 3.0, "shut": -3.0}  # by the prompt's word


class Tint:
    """How much redder than blue a video is, plus a far larger constant of the prompt, which within
    its own group says nothing.
    """

    def score(self, frames, record):
        red, _, blue = frames.mean((0, 1, 2)) / 255
        return Score(float(red - blue) + OFFSET[record[0]])


def misleading(gather, *args):
    """Every fourth score is not valid and says the opposite, enlarged."""
    scores = gather(*args)
    groups = scores.values.reshape(-1, GROUP)
    mean = np.repeat(groups.mean(1), GROUP)
    valid = np.arange(len(mean)) % 4 != 3
    opposite = mean - 20 * (scores.values - mean)
    return dataclasses.replace(scores, valid=valid, values=np.where(valid, scores.values, opposite))


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_the_reward_rises(start, monkeypatch, method):
    """From the same noise, videos of both prompts are redder after eight epochs. Seen: 0.044 and
    0.049 by GRPO; -0.08 with the sign of the advantages turned, 0.00 with scores in other groups,
    -0.03 where the mask is ignored.
    """
    spec, model, *_ = start(
        1,
        **{
            "train.method": method,
            "train.kl_weight": 0.0,
            "train.learning_rate": 5e-3,
            "train.updates_per_epoch": 1,
            "train.timesteps": 2,
            "train.advantage_std": "group",
            "lora.rank": 0,
            "sample.group_size": GROUP,
            "sample.batch_size": GROUP,
            "epochs": 8,
            "eval.every": 8,
            "save.every": 8,
        },
    )
    monkeypatch.setattr(train, "gather_scores", functools.partial(misleading, train.gather_scores))
    prompts = PromptSet(
        [f'A sign that says "{word}".' for word in OFFSET], [(word,) for word in OFFSET]
    )
    judged = PromptSet(prompts.prompts * 4, prompts.targets * 4)
    train.train(spec, model, prompts, judged, RewardPool(Tint, workers=0))
    before, after = (
        np.reshape(record["rewards"], (4, 2))
        for record in run_log.read_evaluations(spec.recipe.run_dir)
    )
    gain = (after - before).mean(0)
    assert (gain > 0.025).all(), gain
