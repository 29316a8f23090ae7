"""What a reward head learns: every reward with a weight, and no measure of quality."""

import numpy as np
import pytest

from grpo.reward_head import learned_rewards, rewards_of
from tests.grpo.epoch_inputs import scores_of
from wan_jax.errors import UserError


def test_rewards_are_the_weighted_sum_of_all_but_measures():
    parts = {"clip": np.array([0.5, np.nan, 1]), "flicker": np.full(3, 9.0), "red": np.ones(3)}
    scores = scores_of([1, 2, 3], parts)
    found, lacking = rewards_of(scores, {"ocr": 1.0, "clip": 2.0, "flicker": 1.0, "red": 0.0})
    np.testing.assert_array_equal(found, [2, np.nan, 5])
    assert lacking == {"clip": 1}


def test_a_weighted_reward_that_no_video_has_is_not_left_out():
    """Else a head would be trained on the others without a word."""
    scores = scores_of([1, 2, 3], {"va.VQ": np.ones(3)})
    found, lacking = rewards_of(scores, {"ocr": 1.0, "va.MQ": 1.0})
    assert np.isnan(found).all() and lacking == {"va.MQ": 3}


@pytest.mark.parametrize("weights", [{"flicker": 1.0}, {"ocr": 0.0, "flicker": 1.0, "dark": 2.0}])
def test_measures_of_quality_alone_are_refused(weights):
    """As the main reward one would be learned with the wrong sign: more flicker would be better."""
    with pytest.raises(UserError, match="flicker"):
        learned_rewards(weights)
