"""Models and recipes of runs that train in tests."""

import pytest

from grpo.data.prompts import load_prompts
from grpo.run import RunSpec, open_model
from grpo.settings import parse
from rewards.ocr.targets import parse_targets
from rewards.pool import RewardPool
from tests.grpo import here, tiny_run
from tests.rewards.pool_rewards import Brightness
from wan_jax.models import presets


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny model with one expert."""
    return tiny_run.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory):
    """The folder of a tiny model with two experts."""
    return tiny_run.make_model(tmp_path_factory.mktemp("two_experts"), boundary=0.875)


@pytest.fixture
def recipe(model, tmp_path):
    """A recipe of the tiny model and its prompts: (config file, run folder)."""
    return tiny_run.write_recipe(model, tmp_path)


@pytest.fixture
def start(request, tmp_path, monkeypatch):
    """A function: start(devices, experts=1, **{'section.key': value}) returns the arguments of
    `grpo.train.train` for a tiny model, (spec, model, prompts, heldout, pool). Runs alike share
    their jitted functions.
    """

    def make(devices: int, experts: int = 1, **values):
        folder = request.getfixturevalue("model" if experts == 1 else "two_experts")
        path, _ = tiny_run.write_recipe(folder, tmp_path)
        here.share(monkeypatch, devices)
        config = tiny_run.config_of(path.read_text(), **{"epochs": 2} | values)
        checked = parse.recipe_from_config(config)
        opened = open_model(checked)
        spec = RunSpec.make(checked, parse.settings_of(checked), presets.of_folder(opened))
        sets = checked.prompts.train, checked.prompts.heldout
        prompts, heldout = (load_prompts(path, parse_targets) for path in sets)
        return spec, opened, prompts, heldout, RewardPool(Brightness, workers=0)

    return make
