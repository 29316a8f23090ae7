"""What an epoch's rewards say of its videos: sums, masks, advantages, and who is trained on."""

import numpy as np
import pytest

from grpo.credit import compute_credit
from tests import reference
from tests.grpo.epoch_inputs import scores_of
from tests.grpo.specs import tiny_spec

PROMPT_OF = np.repeat([3, 5], 4)
REWARDS = np.array([0.1, 0.9, 0.4, np.nan, 0.2, 0.2, 0.3, 0.8])
VALID = np.isfinite(REWARDS)


def test_one_reward():
    """Advantages within the groups, over the standard deviation of all valid rewards."""
    credit = compute_credit(tiny_spec(), scores_of(REWARDS), PROMPT_OF, {})
    np.testing.assert_array_equal(credit.total, REWARDS)
    np.testing.assert_array_equal(credit.valid, VALID)
    wanted = reference.group_advantages(REWARDS, PROMPT_OF, VALID, "global", 1e-4)
    np.testing.assert_allclose(credit.advantages, wanted, rtol=1e-6)
    assert credit.advantages[3] == 0 and credit.value is credit.total
    np.testing.assert_array_equal(credit.spread, VALID)
    np.testing.assert_array_equal(credit.counted, VALID)
    np.testing.assert_array_equal(credit.order, [0, 1])
    assert credit.groups.mean_reward == pytest.approx(REWARDS[VALID].mean())


def test_a_weighted_reward_that_is_missing_masks_the_video():
    """One of weight 0 does not."""
    sharpness = np.array([1.0, 2.0, np.nan, 1.0, 1.0, 1.0, 1.0, 3.0])
    rewards, base = np.nan_to_num(REWARDS), {"sharpness": (1.0, 0.5)}
    for weight, valid in ((0.5, ~np.isnan(sharpness)), (0.0, np.ones(8, bool))):
        spec = tiny_spec(**{"reward.weights.sharpness": weight})
        scores = scores_of(rewards, {"ocr": rewards, "sharpness": sharpness})
        credit = compute_credit(spec, scores, PROMPT_OF, base)
        np.testing.assert_array_equal(credit.valid, valid)
        assert np.isfinite(credit.total[valid]).all() and np.isfinite(credit.advantages).all()
        if weight:  # 4 standard deviations above the base model's mean: -1
            assert credit.total[7] == pytest.approx(rewards[7] - 0.5)


def test_a_video_without_the_main_reward_is_masked_though_it_has_no_weight():
    """`main_reward`: runs are judged by it."""
    spec = tiny_spec(**{"reward.weights.ocr": 0.0, "reward.weights.sharpness": 0.5})
    scores = scores_of(REWARDS, {"ocr": REWARDS, "sharpness": np.linspace(1.0, 3.0, 8)})
    credit = compute_credit(spec, scores, PROMPT_OF, {"sharpness": (1.0, 0.5)})
    assert np.isfinite(credit.total).all()
    np.testing.assert_array_equal(credit.valid, VALID)
    assert credit.advantages[3] == 0 and not credit.counted[3]


def test_the_gate_ranks_by_the_main_reward_not_by_the_sum():
    """The weighted sum has the opposite order."""
    main = np.linspace(0.0, 0.7, 8)
    parts = {"ocr": main, "sharpness": np.linspace(1.0, 5.0, 8), "dark": np.full(8, 0.5)}
    values = {"reward.weights.sharpness": 2.0, "reward.panel": ("dark",), "train.kl_gate": 0.25}
    base = {"sharpness": (1.0, 1.0), "dark": (0.5, 0.1)}
    credit = compute_credit(tiny_spec(**values), scores_of(main, parts), PROMPT_OF, base)
    assert np.argmax(credit.total) < 4
    np.testing.assert_array_equal(credit.kl_gate, np.arange(8) >= 6)


def test_videos_are_ranked_by_what_is_combined():
    """By advantages of each reward, a group counts where any reward has spread."""
    flat, sharpness = np.full(8, 0.5), np.array([1.0, 2.0, 2.5, 1.0, 1.0, 1.0, 1.0, 1.0])
    spec = tiny_spec(**{"reward.weights.sharpness": 0.5, "reward.combine": "advantages"})
    scores = scores_of(flat, {"ocr": flat, "sharpness": sharpness})
    credit = compute_credit(spec, scores, PROMPT_OF, {"sharpness": (1.0, 0.5)})
    assert credit.value is credit.advantages
    assert credit.groups.mean_reward == pytest.approx(credit.total.mean())
    np.testing.assert_array_equal(credit.spread, PROMPT_OF == 3)
    assert np.ptp(credit.advantages[:4]) > 1
    np.testing.assert_allclose(credit.advantages[4:], 0, atol=1e-6)


@pytest.mark.parametrize("combine", ["rewards", "advantages"])
def test_a_group_below_the_least_spread_teaches_nothing(combine):
    """The others have what they had; standard deviations are 0.330 and 0.249."""
    values = {"reward.combine": combine}
    plain = compute_credit(tiny_spec(**values), scores_of(REWARDS), PROMPT_OF, {})
    assert not plain.weak.any()
    spec = tiny_spec(**values | {"train.min_group_std": 0.3})
    credit = compute_credit(spec, scores_of(REWARDS), PROMPT_OF, {})
    np.testing.assert_array_equal(credit.weak, PROMPT_OF == 5)
    np.testing.assert_array_equal(credit.spread, VALID & (PROMPT_OF == 3))
    np.testing.assert_array_equal(credit.counted, VALID)
    np.testing.assert_array_equal(credit.advantages[:4], plain.advantages[:4])
    assert plain.advantages[4:].any() and not credit.advantages[4:].any()
    larger = tiny_spec(**values | {"train.min_group_std": 0.35})
    assert not compute_credit(larger, scores_of(REWARDS), PROMPT_OF, {}).spread.any()


def test_groups_of_largest_spread_and_their_extremes_are_counted():
    """Of two groups one is trained, of its videos the best and the worst."""
    settings = {"train.groups": 1, "train.best_of": 1, "train.updates_per_epoch": 1}
    rewards = np.array([0.4, 0.5, 0.6, 0.5, 0.1, 0.9, 0.4, 0.3])
    credit = compute_credit(tiny_spec(**settings), scores_of(rewards), PROMPT_OF, {})
    np.testing.assert_array_equal(np.flatnonzero(credit.counted), [4, 5])
    np.testing.assert_array_equal(credit.order, [1])
    # advantages are those within the whole group, of all groups
    wanted = reference.group_advantages(rewards, PROMPT_OF, np.ones(8, bool), "global", 1e-4)
    np.testing.assert_allclose(credit.advantages, wanted, rtol=1e-6)


@pytest.mark.parametrize("clip", [0.5, 5.0, float("inf")])
@pytest.mark.parametrize("combine", ["rewards", "advantages"])
def test_exponential_advantages(clip, combine):
    """-exp(-A) of advantages without a clip; groups without spread and invalid videos keep 0."""
    rewards = np.array([0.1, 0.9, 0.4, np.nan, 0.2, 0.2, 0.2, 0.2])
    values = {"reward.combine": combine, "train.advantage_std": "group"}

    def advantages(**more):
        spec = tiny_spec(**values | more)
        return compute_credit(spec, scores_of(rewards), PROMPT_OF, {}).advantages.astype(np.float64)

    plain = advantages(**{"train.advantage_clip": float("inf")})
    wanted = np.zeros(8)
    wanted[:3] = -np.exp(-plain[:3])
    found = advantages(**{"train.advantage_exp": True, "train.advantage_clip": clip})
    np.testing.assert_allclose(found, np.clip(wanted, -clip, clip), rtol=1e-6)
    assert (found[:3] < 0).all()


def test_not_one_score():
    credit = compute_credit(tiny_spec(), scores_of([np.nan] * 8), PROMPT_OF, {})
    assert not credit.valid.any() and not credit.counted.any() and not credit.advantages.any()
    assert credit.groups.mean_reward == 0
