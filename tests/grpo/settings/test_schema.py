"""The declared settings: complete, typed, and the same in the ConfigDict and in the `Recipe`."""

import dataclasses
import json
import subprocess
import sys

import pytest

from configs.defaults import defaults
from grpo.settings import schema
from grpo.settings.schema import SETTINGS, Recipe, make_recipe, values_of
from grpo.settings.validation import check_values
from tests import commands


def test_a_recipe_has_the_keys_types_and_defaults_of_the_config():
    c = defaults()
    assert json.dumps(Recipe().to_dict()) == json.dumps(c.to_dict())
    assert values_of(Recipe()) == values_of(c) == {k: e.default for k, e in SETTINGS.items()}
    for key, entry in SETTINGS.items():
        section = c
        *sections, name = key.split(".")
        for part in sections:
            section = section[part]
        assert section.get_type(name) is (object if entry.named else entry.kind), key
        assert entry.optional or entry.default is not None, key


def test_every_number_has_a_range_and_every_tuple_a_type():
    for key, entry in SETTINGS.items():
        if entry.kind in (int, float) or entry.elements in (int, float):
            assert entry.bounds is not None, key
        assert (entry.kind is tuple) == (entry.elements is not None), key
        if entry.elements is not tuple:  # tuples in a tuple have a form unless they are pairs
            assert bool(entry.form) == (entry.length is not None), key
        assert not entry.path or entry.kind is str, key
        if isinstance(entry.experimental, tuple):
            assert set(entry.experimental) <= set(entry.choices) - {entry.default}, key
    check_values(values_of(Recipe()))


def test_meanings_are_sentences():
    for key, entry in SETTINGS.items():
        assert entry.meaning[0].isupper() and entry.meaning.endswith("."), key
        assert not entry.optional or "None" in entry.meaning or key.startswith("reward.weights."), (
            key
        )


def test_a_recipe_is_frozen_and_reads_like_the_config(c):
    c.sample.sde_range, c.train.learning_rate = (1, 4), 0.5
    c.reward.weights.motion = 2.0
    recipe = make_recipe(values_of(c))
    assert recipe.sample.sde_range == (1, 4) and recipe["train"]["learning_rate"] == 0.5
    assert recipe.reward.weights["motion"] == 2.0 and recipe.to_dict() == c.to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.train.method = "grpo"


def test_whole_numbers_become_floats_where_the_setting_is_one():
    given = {
        "train.learning_rate": 1,
        "train.kl_weight_range": [1, 2],
        "sample.frame_schedule": [[2, 5]],
    }
    recipe = make_recipe(values_of(Recipe()) | given)
    assert repr(recipe.train.learning_rate) == "1.0"
    assert repr(recipe.train.kl_weight_range) == "(1.0, 2.0)"
    assert recipe.sample.frame_schedule == ((2, 5),) and repr(recipe.train.updates_per_epoch) == "2"


def test_rewards_that_are_measured_are_sorted_by_name(c):
    c.reward.weights.stability, c.reward.weights.clip = 0.0, 0.5
    c.reward.panel, c.reward.second_engine = ("dark",), "paddleocr"
    for recipe in (c, make_recipe(values_of(c))):
        assert list(schema.measured_rewards(recipe).items()) == [
            ("clip", 0.5),
            ("dark", 0.0),
            ("ocr", 1.0),
            ("second_reader", 0.0),
            ("stability", 0.0),
        ]


@pytest.mark.parametrize(
    ("mark", "with_it", "without"),
    [
        (
            "resume",
            (
                "epochs",
                "budget.seconds",
                "run_dir",
                "eval.every",
                "eval.of_an_earlier_version",
                "save.keep",
                "reward.workers",
                "model.path",
                "model.offload",
                "prompts.heldout",
                "mesh.fsdp",
                "train.offload_optimiser",
                "train.learning_rate",
                "log.wandb.project",
                "reward.clip_model",
            ),
            (
                "seed",
                "model.dtype",
                "prompts.train",
                "train.groups",
                "reward.rule",
                "of_old",
                "a.b",
            ),
        ),
        (
            "per_process",
            ("run_dir", "model.path", "prompts.train", "reward.servers", "log.mlflow.uri"),
            ("seed", "epochs", "prompts.negative", "reward.rule", "eval.every", "mesh.context"),
        ),
    ],
)
def test_marks_are_those_of_the_setting_or_of_its_section(mark, with_it, without):
    assert [key for key in with_it if not schema.is_marked(key, mark)] == []
    assert [key for key in without if schema.is_marked(key, mark)] == []


def test_a_recipe_is_read_without_jax():
    code = (
        "import sys, configs.tiny_ocr as recipe, grpo.settings.reference; recipe.get_config();"
        "print(sorted({'jax', 'flax', 'cv2'} & sys.modules.keys()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=commands.environment(), capture_output=True, text=True
    )
    assert out.stdout == "[]\n", out.stderr
