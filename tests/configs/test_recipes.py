"""Every recipe in configs/ is sound: settings agree, prompts can be scored, the experts it trains
have steps.
"""

import importlib
import pathlib
import sys

import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from configs.defaults import defaults
from examples import ocr_prompts
from grpo.data.prompts import epoch_prompts, load_prompts
from grpo.learning.sde_windows import step_quotas
from grpo.settings import parse
from rewards.ocr.targets import parse_targets
from wan_jax.diffusion.experts import segments
from wan_jax.diffusion.schedule import flow_sigmas

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*_*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    module = importlib.import_module(f"configs.{name}")
    c = module.get_config()
    made = parse.from_config(c)
    assert c.run_dir == f"runs/{name}" and f"--config=configs/{name}.py" in module.__doc__
    train, heldout = (
        load_prompts(ROOT / path, parse_targets) for path in (c.prompts.train, c.prompts.heldout)
    )
    assert not set(train.prompts) & set(heldout.prompts) and len(heldout) >= c.eval.num_prompts
    assert (
        len(epoch_prompts(0, 0, len(train), c.sample.groups)) * c.sample.group_size == made.videos
    )
    two = "a14b" in name
    experts = ("transformer", "transformer_2")[: 1 + two]
    parts = segments(flow_sigmas(c.sample.steps, c.sample.shift).timesteps, 0.875 if two else None)
    quotas = (
        (c.sample.sde_steps, *c.sample.sde_range)
        if made.method.levels is None
        else (made.method.levels, 0, c.sample.steps)
    )
    assert sum(step_quotas(parts, experts, experts, *quotas)) == quotas[0]


def test_every_setting_can_be_given_on_the_command_line(monkeypatch):
    """Also those that are None until then."""
    for key, default in parse.flat(defaults().to_dict()).items():
        value = {str: "x", bool: not default, list: "(1,2)"}.get(type(default), 3)
        given = absl_flags.FlagValues()
        # where ml_collections looks
        monkeypatch.setattr("sys.argv", ["train", f"--config.{key}={value}"])
        config_flags.DEFINE_config_dict("config", defaults(), flag_values=given)
        given(sys.argv)
        found = parse.flat(given.config.to_dict())[key]
        assert found == ([1, 2] if isinstance(default, list) else value), key


def test_every_size_has_a_recipe():
    assert set(RECIPES) == {
        "tiny_ocr",
        "tiny_grpo",
        "wan21_1_3b_ocr",
        "wan21_14b_ocr",
        "wan22_a14b_ocr",
        "wan22_ti2v_5b_ocr",
    }


def test_prompt_files_are_what_their_code_writes(tmp_path):
    words = sorted(set(ocr_prompts.WORDS))
    heldout = ocr_prompts.prompts(words[::6], 256, seed=1)
    assert (ROOT / "assets/prompts/ocr_heldout.txt").read_text() == "\n".join(heldout) + "\n"
    used = {
        w
        for targets in load_prompts(ROOT / "assets/prompts/ocr_train.txt", parse_targets).targets
        for t in targets
        for w in t.lower().split()
    }
    assert len(used) > 100 and not used & set(words[::6])
