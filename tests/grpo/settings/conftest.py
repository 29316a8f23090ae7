"""Recipes that the tests of settings change."""

import pytest

from configs.defaults import defaults


@pytest.fixture
def c():
    """The least that a recipe sets."""
    c = defaults()
    c.run_dir, c.model.path = "run", "model"
    c.prompts.train, c.prompts.heldout = "train.txt", "heldout.txt"
    return c


@pytest.fixture
def small(c):
    """A small recipe of Flow-GRPO: 2 groups of 4 videos in 2 batches, 2 of 3 steps stochastic."""
    c.sample.steps, c.sample.sde_steps, c.sample.sde_range = 3, 2, (0, 3)
    c.sample.groups, c.sample.group_size, c.sample.batch_size = 2, 4, 4
    c.sample.guidance = c.eval.guidance = 1.0
    c.train.method = "grpo"
    return c


@pytest.fixture
def put():
    """put(c, key, value) sets a setting, whatever the type of the value."""

    def put(c, key, value):
        *sections, name = key.split(".")
        for section in sections:
            c = c[section]
        with c.ignore_type():
            c[name] = value

    return put
