"""Every recipe in configs/ is sound: settings agree, prompts can be scored, the experts it trains
have steps. Recipes of published runs have the published settings.
"""

import importlib
import pathlib
import sys

import numpy as np
import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from configs.defaults import defaults
from examples import ocr_prompts
from grpo import plan
from grpo.data.prompts import epoch_prompts, load_prompts
from grpo.learning.sde_windows import step_quotas
from grpo.run import RunSpec
from grpo.scoring import scored_prompts
from grpo.settings import parse
from grpo.settings.unused import changed_in_vain
from rewards.ocr.targets import parse_targets
from tests.grpo import specs
from wan_jax.diffusion.experts import segments
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.diffusion.solvers import Euler
from wan_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = sorted({p.stem for p in (ROOT / "configs").glob("*.py")} - {"__init__", "defaults"})
# {recipe of a published run: model, devices, (frames, height, width), (guidances, shift)}
PUBLISHED = {
    "flow_grpo_wan21_1_3b": ("wan2.1-1.3b", 1, (33, 240, 416), (4.5, None, 3.0)),
    "amd_wan21_14b": ("wan2.1-14b", 4, (1, 512, 512), (4.5, None, 3.0)),
    "amd_wan22_a14b": ("wan2.2-a14b", 4, (1, 512, 512), (4.5, None, 3.0)),
    "amd_wan22_a14b_both_experts": ("wan2.2-a14b", 4, (1, 512, 512), (4.0, 3.0, 12.0)),
    "amd_wan22_ti2v_5b": ("wan2.2-ti2v-5b", 4, (1, 512, 512), (4.5, None, 5.0)),
}


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_run(name):
    """The recipe makes its run, with Flow-GRPO's settings."""
    model, devices, size, (guidance, guidance_2, shift) = PUBLISHED[name]
    module = importlib.import_module(f"configs.published.{name}")
    c = module.get_config()
    assert c.run_dir == f"runs/{name}" and f"configs/published/{name}.py" in module.__doc__
    assert pathlib.Path(c.model.path).name == model and changed_in_vain(c) == []
    recipe = parse.recipe_from_config(c)
    preset = plan.choose_model(recipe, None)[0]
    mesh = specs.devices_mesh(devices)
    spec = RunSpec(recipe, parse.settings_of(recipe), preset, mesh, "chunked")
    spec.check()
    sample, train, evaluation = c.sample, c.train, c.eval
    assert (sample.frames, sample.height, sample.width) == size
    assert (sample.guidance, sample.guidance_2, sample.shift) == (guidance, guidance_2, shift)
    assert (evaluation.guidance, evaluation.guidance_2) == (guidance, guidance_2)
    # 20 steps from the list of Diffusers 0.33 are noisy, the first 19 are trained
    start = 0.999 * shift / (1 + 0.999 * (shift - 1))
    for schedule, steps in ((spec.schedule, 20), (spec.solver.schedule, 50)):
        assert schedule.num_steps == steps and schedule.sigmas[0] == np.float32(start)
    trained = np.concatenate(spec.windows.of_epoch(c.seed, 1))
    np.testing.assert_array_equal(trained, np.arange(19))
    assert sample.untrained_noise and train.zero_advantages == "drop" and train.credit == "none"
    assert isinstance(spec.solver, Euler) and evaluation.num_prompts == 1018
    assert (c.reward.rule, c.reward.engine) == ("flow_grpo_video", "paddleocr")
    # two updates an epoch; AMD's of 24 groups of 12
    assert spec.update_batches(0).shape == ((2, 8) if devices == 4 else (2, 1))
    assert spec.settings.videos == (576 if devices == 4 else 16)
    experts = (
        ("transformer", "transformer_2") if name.endswith("both_experts") else ("transformer",)
    )
    assert spec.preset.experts == spec.trained == experts
    loss, optimiser = spec.method.policy_loss, spec.settings.optimiser
    assert (loss.clip_low, loss.clip_high, loss.kl_beta) == (1e-3, 1e-3, 0.004)
    assert (loss.objective, loss.kl_kind) == ("clip", "flow_grpo")
    assert (optimiser.learning_rate, optimiser.weight_decay) == (1e-4, 1e-4)
    assert (optimiser.max_grad_norm, train.advantage_clip) == (1.0, 5.0)
    assert (c.lora.rank, c.lora.alpha, train.advantage_std) == (32, 64.0, "group")


def test_nft_of_ti2v_5b():
    """RLinf's settings; the behaviour policy follows at once in the first epoch, by a hundredth in the
    last. The careful twin differs in what holds the model.
    """
    plain, careful = (
        parse.recipe_from_config(importlib.import_module(f"configs.{name}").get_config())
        for name in ("wan22_ti2v_5b_nft", "wan22_ti2v_5b_nft_careful")
    )
    settings = parse.settings_of(plain)
    sample, optimiser, method = plain.sample, settings.optimiser, settings.method
    assert (sample.frames, sample.height, sample.width) == (5, 512, 512)
    assert (sample.steps, plain.eval.steps) == (10, 20)
    assert sample.guidance == plain.eval.guidance == 1.0
    assert (settings.lora.rank, settings.lora.alpha) == (32, 64.0)
    assert (settings.videos, sample.group_size, plain.train.updates_per_epoch) == (1152, 8, 2)
    assert (optimiser.learning_rate, optimiser.weight_decay) == (4e-4, 1e-4)
    assert (optimiser.adam_b1, optimiser.adam_b2, optimiser.adam_eps) == (0.9, 0.999, 1e-8)
    assert (method.beta, method.advantage_clip, method.kl_weight) == (0.1, 5.0, 0.0)
    kept = [method.share_kept(2 * epoch, True)["old"] for epoch in (1, 35, 70, 100)]
    np.testing.assert_allclose(kept, [0.99 / 70, 0.495, 0.99, 0.99])
    before, after = (parse.flat(recipe.to_dict()) for recipe in (plain, careful))
    assert {key for key in before if before[key] != after[key]} == {
        "run_dir",
        "train.learning_rate",
        "train.kl_weight",
        "train.kl_gate",
        "train.on_alarm",
        "data.path",
        "data.weight",
    }


def test_prompts_of_published_runs_are_not_shipped():
    """A run without them ends in one error, which names the file."""
    c = importlib.import_module("configs.published.amd_wan21_14b").get_config()
    c.reward.engine = "rapidocr"
    recipe = parse.recipe_from_config(c)
    with pytest.raises(UserError, match=r"flow_grpo/dataset/ocr/train\.txt"):
        scored_prompts.load_prompt_sets(recipe, parse.settings_of(recipe))


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
        "quickstart",
        "tiny_ocr",
        "tiny_grpo",
        "wan21_1_3b_ocr",
        "wan21_14b_ocr",
        "wan21_14b_distilled",
        "wan22_a14b_ocr",
        "wan22_ti2v_5b_ocr",
        "wan22_ti2v_5b_nft",
        "wan22_ti2v_5b_nft_careful",
    }
    published = (ROOT / "configs/published").glob("*_*.py")
    assert {p.stem for p in published} - {"__init__"} == PUBLISHED.keys()


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
