"""Which videos the KL holds."""

import numpy as np
import pytest
import scipy.stats

from grpo.credit import compute_credit
from grpo.scoring.kl_gate import auxiliary_rewards, kl_gate, ranks
from grpo.settings import parse
from tests.grpo import tiny_run
from tests.grpo.epoch_inputs import scores_of
from tests.grpo.specs import tiny_spec
from wan_jax.errors import UserError

VALID = np.ones(8, bool)


def test_ranks_are_those_of_scipy_between_0_and_1():
    rng = np.random.default_rng(0)
    for values in (rng.random(9), rng.integers(0, 4, 20).astype(float), np.ones(3)):
        wanted = (scipy.stats.rankdata(values) - 1) / (len(values) - 1)
        np.testing.assert_allclose(ranks(values), wanted)
    np.testing.assert_array_equal(ranks(np.array([np.nan, 3, 1, np.inf])), [np.nan, 1, 0, np.nan])
    np.testing.assert_array_equal(ranks(np.array([np.nan, 3])), [np.nan, 0.5])


def test_videos_whose_main_reward_is_ahead_are_held():
    """Good by both rewards: free. Good by the main one only: held. The reverse: free."""
    main = np.array([9, 8, 7, 6, 3, 2, 1, 0.0])
    other = np.array([9, 8, 0, 1, 2, 3, 7, 6.0])
    np.testing.assert_array_equal(
        kl_gate(main, {"a": other}, VALID, 0.25), [0, 0, 1, 1, 0, 0, 0, 0]
    )
    # the mean rank of several, of those that a video has; and only among valid videos
    third = np.where(np.arange(8) == 2, np.nan, 9 - other)
    held = kl_gate(main, {"a": other, "b": third}, VALID & (np.arange(8) != 3), 0.25)
    assert held[2] == 1 and held[3] == 0 and held.dtype == np.float32


def expected_gate(main, others, valid, share):
    """The gate by its formula: ranks by SciPy, video by video."""

    def rank(values):  # {video: rank from 0 to 1}
        found = [i for i in range(len(values)) if valid[i] and np.isfinite(values[i])]
        among = (scipy.stats.rankdata([values[i] for i in found]) - 1) / max(len(found) - 1, 1)
        return dict(zip(found, among)) if len(found) > 1 else dict.fromkeys(found, 0.5)

    of_main, of_others, ahead = rank(main), [rank(values) for values in others.values()], {}
    for i in np.flatnonzero(valid):
        own = [ranked[i] for ranked in of_others if i in ranked]
        ahead[i] = of_main[i] - sum(own) / len(own) if own else 0.0
    bound = np.quantile([*ahead.values()], 1 - share)
    return [float(i in ahead and ahead[i] > bound) for i in range(len(main))]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.85])
def test_the_gate_equals_its_formula(share):
    """Of videos without a reward, whatever their other rewards are, and without some or all others."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        main, a, b, c = rng.integers(0, 12, (4, 30)) / 4
        a, b, c = (np.where(rng.random(30) < 0.3, np.nan, values) for values in (a, b, c))
        others, valid = {"a": a, "b": b, "c": c}, rng.random(30) < 0.7
        alone = rng.choice(30, 6, replace=False)  # with no other reward
        a[alone], b[alone], c[alone] = np.nan, np.nan, np.nan
        main[~valid] = rng.choice([-9, 9, np.nan], (~valid).sum())
        found = kl_gate(main, others, valid, share)
        wanted = expected_gate(main, others, valid, share)
        assert found.tolist() == wanted and 0 < sum(wanted) < valid.sum()


def test_without_another_reward_of_a_video_or_a_valid_video_nothing_is_held():
    main, nothing = np.arange(8.0), np.full(8, np.nan)
    assert not kl_gate(main, {"a": nothing}, VALID, 0.5).any()
    assert not kl_gate(main, {}, VALID, 0.5).any()
    assert not kl_gate(nothing, {"a": main}, ~VALID, 0.5).any()


def test_measures_are_compared_with_the_base_on_both_sides():
    parts = {"ocr": np.zeros(3), "dark": np.array([0.1, 0.3, 0.6]), "red": np.array([1.0, 2, 3])}
    parts |= {"edges": np.ones(3), "motion": np.ones(3)}
    weights = {"ocr": 1.0, "dark": 0.0, "red": 0.0, "edges": 0.0, "motion": 0.5, "clip": 0.0}
    found = auxiliary_rewards(parts, weights, {"dark": (0.3, 0.1), "motion": (1, 1)}, "ocr")
    assert found.keys() == {"dark", "red"}
    np.testing.assert_allclose(found["dark"], [-0.2, 0, -0.3])
    np.testing.assert_array_equal(found["red"], parts["red"])
    # the main reward is not among the others, also where it has no weight
    assert auxiliary_rewards(parts, weights | {"ocr": 0.0}, {}, "ocr").keys() == {"red"}


def test_the_gate_is_part_of_the_credit():
    main = np.array([0.9, 0.8, 0.7, 0.6, 0.3, 0.2, 0.1, 0.0])
    parts = {"ocr": main, "dark": np.array([0.5, 0.5, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5])}
    for share, wanted in ((0.25, [0, 0, 1, 1, 0, 0, 0, 0]), (None, None)):
        spec = tiny_spec(**{"train.kl_gate": share, "reward.panel": ("dark",)})
        credit = compute_credit(
            spec, scores_of(main, parts), np.repeat([3, 5], 4), {"dark": (0.5, 0.1)}
        )
        assert credit.kl_gate is None if wanted is None else credit.kl_gate.tolist() == wanted


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"reward.panel": ()}, ["reward.panel=()"]),
        ({"train.kl_weight": 0.0}, ["train.kl_weight=0.0"]),
        ({"train.kl_as": "reward", "train.kl_weight": 0.1}, ["train.kl_as=reward"]),
    ],
)
def test_a_gate_without_a_kl_or_another_reward_is_refused(changes, named):
    text = tiny_run.recipe_text("model", "folder")
    config = tiny_run.config_of(text, **{"train.kl_gate": 0.25} | changes)
    with pytest.raises(UserError) as error:
        parse.recipe_from_config(config)
    assert all(text in str(error.value) for text in ("train.kl_gate=0.25", *named))
