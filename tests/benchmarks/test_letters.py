"""The parts of the benchmark of damaged letters."""

import numpy as np
import pytest

from benchmarks.letters import DAMAGES, auc, damage, draw


def test_ties_count_half():
    assert auc([1.0, 2.0], [0.0, 1.0]) == 0.875 and auc([1.0], [1.0]) == 0.5


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damage_is_small_and_leaves_the_clean_sign(kind):
    sign = draw("HELLO", 36)
    clean = np.array(sign)
    changed = (np.array(damage(sign, kind, np.random.default_rng(1))) != clean).any(-1)
    assert 10 < changed.sum() < 200 and (np.array(sign) == clean).all()
