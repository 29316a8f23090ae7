"""Several pools that score the same videos: whose values are kept where one of them fails."""

import functools

import numpy as np
import pytest

from rewards.base import PromptRecord
from rewards.composite import CompositeReward
from rewards.own import OwnReward
from rewards.pool import RewardPool
from rewards.pool_set import BUILT_IN_POOL, PoolSet
from tests.rewards import own_rewards, pool_rewards
from tests.rewards.drawing import filled

RECORDS = [PromptRecord(("always",), "sign")] * 2


def pools_of(main, owner):
    """Built-in rewards, and those of a server with three parts; in both, video 1 fails in part."""
    factories = {"ocr": pool_rewards.Mean, "light": pool_rewards.Brightness}
    required = main if owner == BUILT_IN_POOL else None
    composite = functools.partial(CompositeReward, factories, required)
    parts = functools.partial(OwnReward.of, "va", own_rewards.Parts)
    return PoolSet({BUILT_IN_POOL: RewardPool(composite), "va": RewardPool(parts)}, main, owner)


@pytest.mark.parametrize(
    "main, owner, valid",
    [("ocr", BUILT_IN_POOL, [1, 0]), ("va", "va", [1, 0]), ("va.mean", "va", [1, 1])],
)
def test_a_video_is_masked_by_the_main_value_alone(main, owner, valid):
    with pools_of(main, owner) as pool:
        scores = pool.submit(filled(3, 1), RECORDS).result()
    assert scores.valid.tolist() == [bool(v) for v in valid]
    assert scores.failures == 2 - sum(valid)
    np.testing.assert_array_equal(scores.values, scores.parts[main])
    assert all(bool(error) != ok for error, ok in zip(scores.errors, scores.valid))
    assert set(scores.parts) == {"ocr", "light", "va", "va.mean", "va.length", "va.fps"}
    np.testing.assert_array_equal(scores.parts["va.mean"], [3, 1])
    np.testing.assert_array_equal(scores.parts["va.length"], [4, np.nan])
    assert main not in scores.part_errors and len(scores.part_errors["va.length"]) == 1
    # what fails with the main reward of its own pool is lost with it
    assert np.isfinite(scores.parts["light"]).tolist() == [True, main != "ocr"]


def test_a_pool_whose_every_video_fails_leaves_the_others():
    broken = functools.partial(OwnReward.of, "va", lambda: own_rewards.Fixed(None))
    composite = functools.partial(CompositeReward, {"ocr": pool_rewards.Brightness}, "ocr")
    pools = {BUILT_IN_POOL: RewardPool(composite), "va": RewardPool(broken)}
    with PoolSet(pools, "ocr", BUILT_IN_POOL) as pool:
        scores = pool.submit(filled(3, 5), RECORDS).result()
    assert scores.valid.all() and np.isnan(scores.parts["va"]).all()
    assert scores.part_retries == {"va": 2} and "returned NoneType" in scores.part_errors["va"][0]
    with PoolSet({"va": RewardPool(broken)}, "va.x", "va") as pool:
        scores = pool.submit(filled(3, 5), RECORDS).result()
    assert not scores.valid.any() and scores.retries == 2 and all(scores.errors)
