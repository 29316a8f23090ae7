"""Every setting of a recipe has a type and, where it is a number, a range; others are refused by
key and value.
"""

import math
import re
import sys

import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from configs.defaults import defaults
from grpo.settings import parse, validation
from grpo.settings.schema import SETTINGS, values_of
from wan_jax.command_line.cli import UserError

OPTIONAL = sorted(key for key, entry in SETTINGS.items() if entry.optional)
NUMBERS = sorted(key for key, entry in SETTINGS.items() if entry.kind in (int, float))
VALUES = {key: entry.default for key, entry in SETTINGS.items()}
PATHS = sorted(key for key, entry in SETTINGS.items() if entry.path)


def parsed(monkeypatch, *arguments):
    """Returns the defaults with settings of the command line."""
    given = absl_flags.FlagValues()
    monkeypatch.setattr("sys.argv", ["train", *(f"--config.{a}" for a in arguments)])
    config_flags.DEFINE_config_dict("config", defaults(), flag_values=given)
    given(sys.argv)
    return given.config


def refused(c, *parts):
    with pytest.raises(UserError) as error:
        parse.from_config(c)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_out_of_range_and_what_is_no_number(key):
    entry, limits = SETTINGS[key], SETTINGS[key].bounds
    wrong = ["abc", (1,)]
    wrong += [math.nan, limits.low - 1 if not limits.above else limits.low]
    wrong += [2 * limits.high + 1] * (limits.high < math.inf)
    wrong += [1.5] * (entry.kind is int) + [True] + [None] * (not entry.optional)
    wrong += [math.inf] * (limits.below is None or limits.high < math.inf)
    for value in wrong:
        with pytest.raises(UserError, match=re.escape(f"config.{key}={value!r} ")):
            validation.check_values(VALUES | {key: value})


def test_numbers_at_the_ends_of_their_range():
    ends = {
        "train.adam_b1": 0.0,
        "train.clip_low": 1.0,
        "train.max_grad_norm": math.inf,
        "seed": 2**32 - 1,
        "sample.noise_level": 0,
    }
    validation.check_values(VALUES | ends)


@pytest.mark.parametrize("key", sorted(key for key, entry in SETTINGS.items() if entry.choices))
def test_names_that_are_not_a_choice(key):
    entry = SETTINGS[key]
    for name in ("zebra", *entry.choices):
        values = VALUES | {key: (entry.choices[0], name) if entry.kind is tuple else name}
        if name in entry.choices:
            validation.check_values(values)
        else:
            with pytest.raises(UserError, match=re.escape(f"config.{key}=")) as error:
                validation.check_values(values)
            assert "'zebra'" in str(error.value) and ", ".join(entry.choices) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "lora.alpha",
            0.0,
            "config.lora.alpha=0.0 must be above 0; adapters are scaled by alpha / rank",
        ),
        ("lora.alpha", -1.0, "alpha=-1.0 must be above 0"),
        ("lora.alpha", math.inf, "alpha=inf must be above 0 and finite"),
        (
            "seed",
            -1,
            "config.seed=-1 must be at least 0 and at most 4294967295; -1 does not stand for a "
            "random seed",
        ),
        (
            "eval.seed",
            2**32,
            "config.eval.seed=4294967296 must be at least 0 and at most 4294967295",
        ),
        ("sample.guidance", math.nan, "sample.guidance=nan must be at least 0 and finite"),
        ("train.kl_weight", "1e-4", "train.kl_weight='1e-4' must be a number, or None"),
        ("sample.frames", 1.5, "sample.frames=1.5 must be a whole number"),
        ("train.guided", 1, "train.guided=1 must be True or False"),
        ("model.path", 3, "model.path=3 must be a text"),
        ("prompts.negative", None, "prompts.negative=None must be a text"),
        ("lora.targets", "to_q", "lora.targets='to_q' must be a tuple"),
        ("lora.targets", (1,), "lora.targets=(1,) must be a tuple, each of it a text"),
        (
            "sample.sde_range",
            (0, 1.5),
            "sde_range=(0, 1.5) must be a tuple, each of it a whole number",
        ),
        ("sample.sde_range", (0, 1, 2), "sde_range=(0, 1, 2) must be (first, last + 1)"),
        ("train.kl_weight_range", (0.0, 1.0), "kl_weight_range=(0.0, 1.0) must be above 0"),
        ("eval.more_frames", (0,), "eval.more_frames=(0,) must be at least 1"),
        (
            "sample.frame_schedule",
            (5, 9),
            "sample.frame_schedule=(5, 9) must be a tuple, each of it a pair",
        ),
        ("train", 3, "which are not settings"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(c, put, key, value, message):
    if key == "train":
        with c.unlocked():
            c.update({"trian": {"groups": 1}})
    else:
        put(c, key, value)
    refused(c, message)


def test_all_wrong_values_are_named_at_once(c):
    c.epochs, c.train.adam_b1, c.eval.solver = 0, 1.0, "heun"
    refused(
        c,
        "config.epochs=0 must be at least 1",
        "config.train.adam_b1=1.0 must be at least 0 and below 1",
        "config.eval.solver='heun' must be one of unipc",
    )


def test_unknown_keys_are_named_with_the_nearest_ones(c):
    c.sample.group, c.train.learning_rat, c.zebra = 2, 1e-3, 0
    c.trian = c.train.copy_and_resolve_references()
    refused(
        c,
        "sets sample.group, train.learning_rat, trian.*, zebra, which",
        "did you mean sample.groups, train.learning_rate, train.*?",
    )


def test_a_recipe_that_does_not_begin_with_the_defaults(c):
    del c.save["keep"], c.log["wandb"]
    refused(c, "does not set log.wandb.entity, log.wandb.project, save.keep", "c = defaults()")


def test_optional_settings_take_none_and_nothing_on_the_command_line(monkeypatch):
    for none in ("None", ""):
        given = parsed(
            monkeypatch,
            *(f"{key}={none}" for key in OPTIONAL),
            f"lora.init={none}",
            f"log.mlflow.uri={none}",
            f"sample.frame_schedule={none}",
            f"reward.servers={none}",
            f"train.learning_rate={none}",
        )
        found = validation.normalised(values_of(given))
        assert [found[key] for key in OPTIONAL] == [None] * len(OPTIONAL)
        assert found["lora.init"] == found["log.mlflow.uri"] == ""
        assert found["sample.frame_schedule"] == found["reward.servers"] == ()
        with pytest.raises(UserError, match=r"config\.train\.learning_rate=None must be a number"):
            validation.check_values(found)


def test_paths_with_a_tilde_or_dots_become_absolute(c, put, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in PATHS:
        put(c, key, "~/a")
    c.run_dir, c.model.path = str(tmp_path / "no" / ".." / "run"), "models/tiny"
    found = validation.normalised(values_of(c))
    assert {found[key] for key in PATHS if key not in ("run_dir", "model.path")} == {
        str(tmp_path / "a")
    }
    assert found["run_dir"] == str(tmp_path / "run") and found["model.path"] == "models/tiny"
    c.model.path = "~nobody-of-this-name/x"
    refused(c, "nobody-of-this-name")


@pytest.mark.parametrize("key", ["run_dir", "model.path", "prompts.train", "prompts.heldout"])
def test_required_settings_that_are_empty(c, put, key):
    put(c, key, "")
    refused(c, f"config.{key} is empty")


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter2@host:5000",
        "postgresql://hunter2@db/runs",
        "postgresql://db/runs?user=me&password=hunter2",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(c, uri):
    c.log.mlflow.uri = uri
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as error:
        parse.from_config(c)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("REWARD_TOKEN", True),
        ("MY_TOKEN2", True),
        ("of_the_environment", True),
        ("d41d8cd98f00b204e9800998ecf8427e", False),
        ("hf_AbCdEf", False),
        ("A1B2C3D4E5F60718", False),
        ("", False),
    ],
)
def test_a_token_instead_of_its_variable_is_refused_and_not_repeated(c, monkeypatch, name, fine):
    monkeypatch.setenv("of_the_environment", "x")
    c.reward.token_env = name
    if fine:
        validation.check_secrets(c)
    else:
        with pytest.raises(UserError, match=r"config\.reward\.token_env must be the name") as error:
            validation.check_secrets(c)
        assert not name or name not in str(error.value)
