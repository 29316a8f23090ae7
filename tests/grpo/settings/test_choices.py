"""The names that settings may have are those of the tables in the code."""

from grpo import methods
from grpo.scoring.reward_combination import BAD_SIDE, MAIN
from grpo.settings import choices
from grpo.settings.parse import DTYPES
from grpo.settings.schema import SETTINGS
from rewards import choices as reward_choices
from rewards import clip, judge, quality
from rewards.composite import DERIVED
from rewards.ocr import engines, rules
from wan_jax import choices as model_choices
from wan_jax.diffusion import sde, solvers
from wan_jax.models import transformer


def test_names_of_the_models_and_samplers():
    assert model_choices.DTYPES == tuple(DTYPES)
    assert model_choices.REMAT_POLICIES == tuple(transformer.REMAT_POLICIES)
    assert model_choices.SDE_KINDS == tuple(sde.DEFAULTS)
    for name in model_choices.SOLVERS:
        solvers.make_solver(name, num_steps=3, shift=3.0)


def test_names_of_the_rewards():
    assert reward_choices.RULES == tuple(rules.RULES)
    assert reward_choices.ENGINES == tuple(engines.ENGINES)
    assert reward_choices.QUESTIONS == tuple(judge.QUESTIONS)
    prefix = "reward.weights."
    weights = {key.removeprefix(prefix) for key in SETTINGS if key.startswith(prefix)}
    assert weights == {MAIN, *DERIVED, *clip.KINDS, *quality.MEASURES}
    assert {*BAD_SIDE} == {*quality.MEASURES, *reward_choices.READ_MEASURES}
    assert {*reward_choices.READ_MEASURES} < {*DERIVED}
    assert reward_choices.MEASURES == tuple(quality.MEASURES)
    assert {*reward_choices.PANEL} < {*quality.MEASURES}


def test_names_of_the_methods():
    assert choices.METHODS == tuple(method.name for method in methods.all_methods())
