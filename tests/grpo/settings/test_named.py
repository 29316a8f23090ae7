"""Settings by name, and the user's own rewards in a recipe: what is read, and what is refused."""

import pytest

from configs import tiny_ocr
from grpo.compare import Method
from grpo.settings import parse
from grpo.settings.named import own_names, pairs, servers_by_name
from grpo.settings.schema import main_reward, measured_rewards
from rewards.choices import PANEL
from tests.grpo.tiny_run import write_recipe
from wan_jax.errors import UserError


@pytest.mark.parametrize(
    "value",
    [
        {"va": {"VQ": 1, "MQ": 0.5}, "red": "2"},
        "va.VQ=1, va.MQ=0.5,red=2",
        ("va.VQ=1", "va.MQ=0.5", "red=2"),
        [["va.VQ", 1.0], ["va.MQ", 0.5], ["red", 2.0]],
    ],
)
def test_every_form_is_read(value):
    assert pairs(value, float) == (("va.VQ", 1.0), ("va.MQ", 0.5), ("red", 2.0))


@pytest.mark.parametrize("value", [None, "", "None", (), {}])
def test_nothing_is_no_pairs(value):
    assert pairs(value, str) == ()


@pytest.mark.parametrize(
    "value", [3, "red", "=1", "red=x", ("a",), (("a", 1, 2),), "a=1,a=2", {"a": None}]
)
def test_other_forms_are_refused(value):
    with pytest.raises(ValueError):
        pairs(value, float)


def test_servers_have_names():
    servers = ("http://a:1", "va=http://b:2", "ocr=http://c:3", "va=https://d/x")
    assert servers_by_name(servers) == {
        "ocr": ("http://a:1", "http://c:3"),
        "va": ("http://b:2", "https://d/x"),
    }
    assert own_names({"red": "a:B"}, servers) == ["red", "va"]


def without_panel(weights):
    return {name: weight for name, weight in weights.items() if name not in PANEL}


def recipe_of(own=(), weights=None, **changes):
    """A checked recipe. weights: as a recipe sets them, c.reward.weights.NAME."""
    c = tiny_ocr.get_config()
    c.reward.own = own
    for name, weight in (weights or {}).items():
        c.reward.weights[name] = weight
    c.reward.update(changes)
    return parse.recipe_from_config(c)


def test_weights_of_a_recipe():
    recipe = recipe_of(
        {"red": "redness:Redness", "blue": "a.b:C.d"},
        {"ocr": None, "red": 1, "va": {"VQ": 0.5}},
        servers=("va=http://b:2",),
    )
    assert recipe.reward.own == (("red", "redness:Redness"), ("blue", "a.b:C.d"))
    assert recipe.reward.own_weights == (("red", 1.0), ("va.VQ", 0.5))
    measured = without_panel(measured_rewards(recipe))
    assert list(measured.items()) == [("red", 1.0), ("blue", 0.0), ("va", 0.0), ("va.VQ", 0.5)]
    assert parse.settings_of(recipe).main == "red"


@pytest.mark.parametrize(
    "weights, main",
    [
        ({"ocr": 1.0, "red": 1.0}, "ocr"),
        ({"clip": 0.1, "ocr": 0.0, "red": 1.0}, "clip"),
        ({"ocr": 0.0, "red": 0.0, "va": 0.0, "va.VQ": 2.0}, "va.VQ"),
        ({"motion": 1.0, "ocr": 0.0}, "ocr"),
        ({"motion": 1.0, "red": 0.0}, "red"),
        ({"motion": 1.0}, "motion"),
        ({"colours": 0.0, "motion": 1.0}, "motion"),
    ],
)
def test_the_main_reward_is_the_first_with_a_weight(weights, main):
    assert main_reward(weights) == main


@pytest.mark.parametrize(
    "own, weights, changes, named",
    [
        ({"red": "redness"}, {"red": 1.0}, {}, "red='redness'"),
        ({"red": "redness:"}, {}, {}, "red='redness:'"),
        ({"red": 3}, {}, {}, "reward.own={'red': 3}"),
        ({"motion": "a:B"}, {}, {}, "'motion'"),
        ({"r-d": "a:B"}, {}, {}, "'r-d'"),
        ({"va": "a:B"}, {}, {"servers": ("va=http://a:1",)}, "'va'"),
        ({"red": "a:B"}, {"red": -1.0}, {}, "red=-1.0"),
        ({"red": "a:B"}, {"red": "much"}, {}, "'much'"),
        ({"red": "a:B"}, {"red": {"x-y": 1.0}}, {}, "red.x-y=1.0"),
        ({"red": "a:B"}, {"green": 1.0}, {}, "reward.weights.green"),
        ({"red": "a:B"}, {}, {"own_weights": "green=1"}, "green=1.0"),
        ({"red": "a:B"}, {"red": 1.0}, {"workers": 0}, "workers=0"),
        ({}, {"ocr": None}, {}, "one weight"),
        ({"red": "a:B"}, {"ocr": None, "red": 1.0, "stability": 0.0}, {}, "stability=0.0"),
        ({"red": "a:B"}, {"ocr": None, "red": 1.0}, {"servers": ("http://a:1",)}, "ocr=None"),
        ({}, {}, {"servers": ("va=b:2",)}, "'b:2'"),
    ],
)
def test_what_cannot_be_meant_is_refused(own, weights, changes, named):
    with pytest.raises(UserError) as error:
        recipe_of(own, weights, **changes)
    assert named in str(error.value)


def test_the_command_line_adds_rewards_and_wins(tmp_path):
    path, _ = write_recipe(tmp_path / "model", tmp_path)
    settings = ("reward.workers=1", "reward.own=red=redness:Redness,blue=a:B")
    config = Method("m", str(path), (*settings, "reward.own_weights=red=2")).config()
    assert without_panel(measured_rewards(config)) == {"ocr": 1.0, "red": 2.0, "blue": 0.0}
    path.write_text(
        path.read_text().replace(
            "return c",
            'c.reward.own = {"red": "a:B"}\n    c.reward.weights.red = 1.0\n'
            "    c.reward.workers = 1\n    return c",
        )
    )
    for changed, weight in (("weights.red=3.0", 3.0), ("own_weights=red=4", 4.0)):
        recipe = parse.recipe_from_config(Method("m", str(path), (f"reward.{changed}",)).config())
        assert without_panel(measured_rewards(recipe)) == {"ocr": 1.0, "red": weight}
    again = recipe.to_dict()
    parse.check_resume(again, recipe.to_dict(), "x")
    other = parse.recipe_from_config(Method("m", str(path), ("reward.own=red=b:C",)).config())
    with pytest.raises(UserError, match=r"reward\.own"):
        parse.check_resume(again, other.to_dict(), "x")
