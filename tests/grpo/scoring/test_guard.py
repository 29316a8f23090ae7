"""The guard: panel, judges, spread, fall, halves, the choice of the best checkpoint, and the KL."""

import math

import numpy as np
import pytest

from configs import tiny_grpo, tiny_ocr
from grpo.scoring import guard
from grpo.settings import parse
from wan_jax.errors import UserError


def evaluation(epoch, low, high, dark=0.1, prompts=("a", "b"), **measures):
    half = {"reward": (low + high) / 2, "low": low, "high": high}
    return {
        "epoch": epoch,
        "prompts": list(prompts),
        "choose": half,
        "report": half,
        "measures": {"dark": [dark, 0.05], "motion": [0.0, 0.0]} | measures,
        "num": 100,
    }


STEPS = {"sample.sde_steps": 2, "sample.sde_range": (0, 3)}
PANEL = ("dark", "motion", "colours")


def judge(*evaluations, tolerance=1.0):
    return guard.judge(evaluations, guard.Limits(PANEL, tolerance))


def test_halves_are_of_even_and_odd_prompts():
    rewards = np.array([0.0, 1.0, 0.0, 1.0, math.nan, 1.0])
    halves = guard.halves(rewards, seed=3)
    assert halves["choose"] == {"reward": 0.0, "low": 0.0, "high": 0.0}
    assert halves["report"] == {"reward": 1.0, "low": 1.0, "high": 1.0}
    assert all(math.isnan(v) for v in guard.halves(rewards[:3], 0)["report"].values())


def test_best_is_the_highest_lower_bound():
    verdicts = judge(evaluation(0, 0.4, 0.5), evaluation(5, 0.7, 0.8), evaluation(9, 0.69, 0.95))
    assert guard.best(verdicts).epoch == 5 and not any(v.alarm for v in verdicts)
    # the earliest of equal ones
    assert guard.best(judge(evaluation(0, 0.4, 0.5), evaluation(5, 0.4, 0.9))).epoch == 0
    assert guard.best([]) is None
    records = evaluation(0, 0.4, 0.5), evaluation(5, 0.7, 0.8), evaluation(9, 0.7, 0.95)
    said = guard.explain(judge(*records), records)
    assert "epoch 5" in said and said.endswith("higher lower bound on those that choose.")


def test_a_higher_reward_with_a_panel_outside_is_not_chosen():
    records = evaluation(0, 0.4, 0.5), evaluation(5, 0.6, 0.7), evaluation(9, 0.8, 0.9, dark=0.16)
    verdicts = judge(*records)
    assert verdicts[2].outside == {"dark": pytest.approx(1.2)} and "dark" in verdicts[2].alarm
    assert guard.best(verdicts).epoch == 5
    assert "Epoch 9 has a higher reward" in guard.explain(verdicts, records)
    assert guard.best(judge(*records, tolerance=1.3)).epoch == 9
    # of a measure that falls, too
    assert judge(records[0], evaluation(1, 0.4, 0.5, dark=0.04))[1].outside["dark"] < -1
    assert guard.best(judge(*records, tolerance=math.inf)).epoch == 9


def test_a_fall_is_an_interval_below_that_of_the_best():
    records = [evaluation(e, *i) for e, i in enumerate([(0.4, 0.5), (0.8, 0.9), (0.7, 0.82)])]
    assert [v.fallen for v in judge(*records)] == [None, None, None]  # the intervals overlap
    records.append(evaluation(3, 0.6, 0.7))
    last = judge(*records)[-1]
    assert last.fallen == 1 and "epoch 1" in last.alarm
    assert "fallen since, to epoch 3" in guard.explain(judge(*records), records)


@pytest.mark.parametrize("change, fallen, best", [(-1, None, 5), (1, 0, 0)])
def test_a_measure_as_the_main_reward_is_judged_by_its_penalty(change, fallen, best):
    """Less flicker is no fall and more no gain, though the evaluations report it as it is."""
    values = np.linspace(2.9, 3.1, 16)

    def of_flicker(epoch, change):
        rewards = values + change
        record = evaluation(epoch, 0.0, 0.0, flicker=[rewards.mean(), rewards.std()])
        return record | guard.halves(rewards, 0) | {"main": "flicker", "rewards": rewards.tolist()}

    verdicts = judge(of_flicker(0, 0.0), of_flicker(5, change))
    assert verdicts[1].fallen == fallen and guard.best(verdicts).epoch == best


def test_what_cannot_be_compared_is_left_out():
    old = {k: v for k, v in evaluation(0, 0.4, 0.5).items() if k not in ("choose", "report")}
    empty = evaluation(2, math.nan, math.nan)
    other = evaluation(3, 0.9, 0.99, prompts=("c", "d"))
    assert judge() == [] and judge(old) == []
    verdicts = judge(old, other, evaluation(4, 0.4, 0.5), empty, evaluation(6, 0.5, 0.6))
    assert [v.epoch for v in verdicts] == [4, 6]
    # a measure that the base did not have moves nothing; one that did not vary has a small deviation
    still = evaluation(5, 0.4, 0.5)
    still["measures"] = {"motion": [0.1, 0.0], "colours": [3.0, 1.0]}
    assert guard.movements(evaluation(0, 0, 1), still, PANEL) == {"motion": pytest.approx(1e5)}
    # sharpness is a logarithm, negative for blank frames
    blank, noise = ({"measures": {"sharpness": [mean, 0.0]}} for mean in (-6.9, -6.8931))
    moved = guard.movements(blank, noise, ("sharpness",))
    assert moved == {"sharpness": pytest.approx(1.0)}


def test_a_judge_that_falls_excludes_a_checkpoint():
    """Rewards without a weight, not those with one; against their best evaluation, not the first."""
    values = (0.4, 0.8, 0.76, 0.6)
    records = [
        evaluation(n, 0.4 + 0.1 * n, 0.5 + 0.1 * n, gold=[v, 0.2], silver=[0.9 - 0.3 * n, 0.2])
        for n, v in enumerate(values)
    ]
    limits = guard.Limits(PANEL, 1.0, trained=("silver",))
    verdicts = guard.judge(records, limits)
    assert [v.judges for v in verdicts] == [
        {},
        {},
        {},
        {"gold": 1},
    ]  # the third's intervals overlap
    assert "gold has fallen below that of epoch 1" in verdicts[3].alarm
    assert guard.best(verdicts).epoch == 2
    assert "Epoch 3 has a higher reward" in guard.explain(verdicts, records)
    both = guard.judge(records, guard.Limits(PANEL, 1.0))[3]
    assert both.judges == {"gold": 1, "silver": 0}


def test_intervals_of_judges_are_95_per_cent():
    """1.96 standard errors on each side: 0.2 / sqrt(100) makes 0.0392. The best evaluation has the highest
    lower bound, not the highest mean or upper bound.
    """
    first = evaluation(0, 0.4, 0.5, gold=[0.8, 0.2])
    uncertain = evaluation(1, 0.4, 0.5, gold=[0.81, 0.8])
    for mean, fallen in ((0.8 - 0.0783, {}), (0.8 - 0.0785, {"gold": 0})):
        last = evaluation(2, 0.4, 0.5, gold=[mean, 0.2])
        assert judge(first, uncertain, last)[-1].judges == fallen


def test_the_best_reward_is_reported_by_the_prompts_that_did_not_choose():
    record = evaluation(3, 0.7, 0.9) | {"report": {"reward": 0.31, "low": 0.21, "high": 0.41}}
    sentence = guard.explain(judge(record), [record])
    assert "epoch 3" in sentence and "0.31 [0.21, 0.41]" in sentence


def test_groups_that_become_alike_raise_the_alarm():
    """By the mean since the evaluation before, relative to the first epoch."""
    records = [evaluation(n, 0.4, 0.5) for n in (0, 2, 4)]
    epochs = [{"epoch": n, "group_spread": s} for n, s in enumerate((0.8, 0.6, 0.5, 0.1), start=1)]
    spreads = [v.spread for v in guard.judge(records, guard.Limits(PANEL, 1.0, 0.5), epochs)]
    assert spreads == [None, None, pytest.approx((0.5 + 0.1) / 2 / 0.8)]
    last = guard.judge(records, guard.Limits(PANEL, 1.0, 0.5), epochs)[-1]
    assert "38%" in last.alarm and not last.inside
    # the base has no evaluation before it
    first = guard.judge(records[2:], guard.Limits(PANEL, 1.0, 0.7), epochs)[0]
    assert first.epoch == 4 and first.spread is None
    # a floor of 0, and a run of an earlier version
    for floor, known in ((0.0, epochs), (0.5, epochs[1:]), (0.5, [{"epoch": 1}, *epochs[1:]])):
        verdicts = guard.judge(records, guard.Limits(PANEL, 1.0, floor), known)
        assert not any(v.alarm for v in verdicts)


def test_a_change_of_size_is_no_fall_of_the_spread():
    """A new size has the share of the epoch before it, so what had fallen before stays fallen."""
    sizes = [{"frames": 1}] * 2 + [{"frames": 5}] * 2 + [{"frames": 5, "height": 96}] * 3
    spreads = 0.8, 0.6, 0.2, 0.1, 3.0, 0.0, 1.5
    epochs = [
        {"epoch": n, "group_spread": spread, **size}
        for n, (spread, size) in enumerate(zip(spreads, sizes, strict=True), start=1)
    ]
    shares = guard.relative_spreads(epochs)
    assert [*shares.values()] == pytest.approx([1, 0.75, 0.75, 0.375, 0.375, 0, 0.1875])
    collapsed = {"epoch": 8, "group_spread": 0.0, "frames": 9}
    assert guard.relative_spreads([*epochs, collapsed])[8] == 0


def test_limits_follow_from_the_settings():
    config = tiny_ocr.get_config()
    config.reward.own = {"gold": "a:B", "part": "a:C"}
    config.reward.weights.part = {"x": 0.5}
    config.reward.weights.edges = 0.0
    limits = guard.Limits.of(parse.recipe_from_config(config).to_dict())
    assert (limits.tolerance, limits.spread) == (1.5, 0.5) and "dark" in limits.panel
    assert {name.partition(".")[0] for name in limits.trained} == {"ocr", "part"}
    earlier = guard.Limits.of({"train": {}, "reward": {}})  # of a version without a guard
    assert earlier == guard.Limits((), math.inf, 0.0, [])


def test_the_kl_is_raised_until_enough_evaluations_are_calm():
    calm, alarm = guard.Verdict(1, 0.5, {}, None), guard.Verdict(1, 0.5, {"dark": 2.0}, None)
    for series, raised in (
        ([], False),
        ([calm], False),
        ([calm, alarm], True),
        ([alarm, calm], True),
        ([alarm, calm, calm], False),
        ([alarm, calm, calm, alarm], True),
    ):
        assert guard.kl_is_raised(series, 2) == raised
    assert not guard.kl_is_raised([alarm, calm], 1)


@pytest.mark.parametrize(
    "values, named",
    [
        ({"train.method": "dpo"}, "train.method=dpo"),
        ({"train.kl_weight": 1.0}, "train.alarm_kl=1.0 .*train.kl_weight=1.0"),
        ({"train.alarm_kl": math.inf}, "train.alarm_kl=inf"),
        ({"train.method": "grpo", "train.kl_as": "reward", **STEPS}, "train.kl_as=reward"),
        ({"train.method": "grpo", "train.kl_target": 0.1, **STEPS}, "train.kl_target=0.1"),
    ],
    ids=str,
)
def test_a_kl_that_cannot_be_raised_is_refused(values, named):
    config = tiny_ocr.get_config()
    config.train.on_alarm = "kl"
    config.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=named):
        parse.from_config(config)


def test_a_kl_of_weight_0_has_a_reference_where_it_may_be_raised():
    for module in (tiny_ocr, tiny_grpo):
        config = module.get_config()
        config.train.kl_weight = 0.0
        assert not parse.from_config(config).method.needs_reference
        config.train.on_alarm = "kl"
        assert parse.from_config(config).method.needs_reference
