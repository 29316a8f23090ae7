"""`grpo.check_rewards`: the trial of a recipe's rewards, and which of them it refuses."""

import numpy as np
import pytest

from configs import tiny_ocr
from grpo import check_rewards
from grpo.check_rewards import (
    LEGEND,
    Row,
    absent,
    problems_of,
    sources,
    synthetic_videos,
    table,
)
from grpo.settings import parse
from grpo.settings.schema import measured_rewards
from tests.grpo import here, tiny_run
from wan_jax.errors import UserError

SAMPLES = np.array([[0.0, 1.0], [2.0, 4.0]])


def row(samples=SAMPLES, synthetic=(0.0, 0.5, 1.0), **changes):
    fields = {"name": "red", "weight": 1.0, "seconds": 0.1} | changes
    return Row(samples=np.asarray(samples), synthetic=np.asarray(synthetic), **fields)


def test_what_cannot_be_trained_on():
    assert problems_of(row(), "") == ""
    assert "is 1 for every video" in problems_of(row(np.ones((2, 2)), np.ones(3)), "")
    assert problems_of(row(np.ones((2, 2)), [0, 1, 1]), "") == ""
    failed = problems_of(row(SAMPLES, [np.nan, 1, 1]), "ValueError: why")
    assert "1 of 7 videos: ValueError: why" in failed


def test_a_weighted_part_that_no_score_has():
    weights = {"va": 1.0, "va.VQ": 1.0, "va.MQQ": 1.0, "va.TAA": 0.0}
    (problem,) = absent(weights, ["va", "va.VQ", "va.MQ"])
    assert problem.startswith("va.MQQ ") and "va.MQ" in problem.split("only ")[1]


def test_the_spread_is_within_groups_and_its_share_is_by_weight():
    assert row().spread == pytest.approx((0.5 + 1) / 2)
    other = row(SAMPLES * 2, name="blue", weight=1.5)
    measure = row(name="motion", weight=9.0)
    lines = table([row(), other, measure, row(name="none", weight=0.0)])
    assert [line.split()[4] for line in lines[1:]] == ["25%", "75%", "-", "-"]


def test_every_reward_is_built_alone():
    c = tiny_ocr.get_config()
    c.reward.own = {"red": "a:B", "blue": "c:D"}
    c.reward.own_weights = "red=1,va.x=2"
    c.reward.servers = ("http://t:1", "va=http://a:1", "va=http://b:1")
    c.reward.weights.stability = c.reward.weights.motion = 0.0
    c.reward.panel = ()
    recipe = parse.recipe_from_config(c)
    found = sources(recipe.reward, measured_rewards(recipe))
    assert [(s.name, tuple(s.weights), s.config.own, s.config.servers) for s in found] == [
        ("motion", ("motion",), (), ()),
        ("ocr", ("ocr", "stability"), (), ("http://t:1",)),
        ("red", ("red",), (("red", "a:B"),), ()),
        ("blue", ("blue",), (("blue", "c:D"),), ()),
        ("va", ("va", "va.x"), (), ("va=http://a:1",)),
        ("va", ("va", "va.x"), (), ("va=http://b:1",)),
    ]


def test_synthetic_videos():
    video = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    black, noise, shuffled = synthetic_videos(video, 0)
    assert not black.any() and noise.std() > 50
    assert not np.array_equal(shuffled, video)
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), video)


def test_the_samples_are_of_the_model_with_its_loras(recipe, tmp_path):
    config = tiny_run.config_of(recipe[0].read_text())
    config.model.loras = (str(tmp_path / "none.safetensors"),)
    config.reward.weights.ocr, config.reward.weights.edges = None, 1.0
    checked = parse.recipe_from_config(config)
    with pytest.raises(UserError, match=r"none\.safetensors"):
        check_rewards.check(checked, 1, 2)


@pytest.mark.slow
def test_a_recipe_with_rewards_that_cannot_be_trained_on(recipe, monkeypatch, capsys):
    here.share(monkeypatch)
    module = "tests.rewards.own_rewards"
    own = "mean=Batches,fixed=Fixed,head=RandomHead,black=NanOnBlack,note=Fixed"
    config = tiny_run.config_of(recipe[0].read_text())
    config.reward.workers = 1
    config.reward.weights.ocr = None
    config.reward.own = own.replace("=", f"={module}:")
    config.reward.own_weights = "mean=1,fixed=1,head=1,black=1,mean.part=1"
    with pytest.raises(UserError) as error:
        check_rewards.check(parse.recipe_from_config(config), 2, 2)
    problems = str(error.value).split("; ")
    assert [problem.split()[0] for problem in problems] == ["fixed", "head", "black", "mean.part"]
    assert "has other values in another process" in problems[1] and "1 of 7" in problems[2]
    out = capsys.readouterr().out
    assert LEGEND in out and "note: note is 1 for every video" in out and len(out.splitlines()) >= 7
