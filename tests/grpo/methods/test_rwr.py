"""Flow-RWR: its weights of videos."""

import types

import numpy as np

from grpo.methods.rwr import RWR, regression_weights
from tests import reference

REWARDS = np.array([0.2, 0.9, 0.4, 0.5, 0.5, 0.5, 0.3, 1.0, -2.0])
VALID = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1], bool)


def test_weights_follow_their_formula():
    for temperature in (1.0, 0.1):
        weights = regression_weights(REWARDS, VALID, 3, temperature)
        wanted = reference.regression_weights(REWARDS, VALID, 3, temperature)
        np.testing.assert_allclose(weights, wanted, rtol=1e-6)
    assert (regression_weights(REWARDS * 1e4, np.zeros(9, bool), 3, 1.0) == 0).all()


def test_videos_count_by_their_rewards_and_the_temperature():
    """Rewards of the credit, not advantages; of groups without spread none is valid."""
    spread = VALID & (np.arange(9) // 3 != 1)
    credit = types.SimpleNamespace(value=REWARDS, spread=spread, advantages=np.zeros(9))
    selection = RWR(temperature=0.2).select(credit, 3)
    wanted = reference.regression_weights(REWARDS, spread, 3, 0.2)
    np.testing.assert_allclose(selection.weight, wanted, rtol=1e-6)
    assert selection.valid.tolist() == spread.tolist() and selection.worse is None


def test_it_keeps_no_earlier_weights():
    method = RWR()
    assert method.lagged == () and method.sampler is None and method.share_kept(1, True) == {}
    assert not method.needs_reference and RWR(kl_weight=0.1).needs_reference
