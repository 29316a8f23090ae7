"""The weights of steps in the loss, by their formulas."""

import itertools

import numpy as np
import pytest

from grpo.compiled.functions import Functions
from grpo.learning.step_table import StepTable
from tests import reference
from tests.grpo.specs import tiny_spec
from wan_jax.choices import EXPERTS
from wan_jax.diffusion import sde
from wan_jax.diffusion.schedule import flow_sigmas


@pytest.mark.parametrize("kind", ["flow_grpo_wan", "flow_sde", "dance", "cps"])
def test_rectified_credit_gives_every_step_a_gradient_of_one_size(kind):
    """The root mean square, over the noise, of weight x d log-prob / d v is the same at every trained
    step.
    """
    schedule, config = flow_sigmas(10, 3.0), sde.SDEConfig(kind)
    table = StepTable.make(schedule, config, "rectified", (range(6),))
    s, g = (
        schedule.sigmas.astype(np.float64),
        sde.diffusion_coefficient(config, schedule).astype(np.float64),
    )
    mean_std = reference.cps_mean_std if kind == "cps" else reference.mean_std
    sizes = []
    for i in range(6):
        (a, std), (b, _) = (mean_std(0.3, v, s[i], s[i + 1], g[i]) for v in (0.0, 1.0))
        sizes.append(table.weight[i] * abs(b - a) / std)
    np.testing.assert_allclose(sizes, sizes[0], rtol=1e-5)
    assert np.mean(table.weight[:6]) == pytest.approx(1, rel=1e-6)
    if kind == "flow_sde":
        longcat = StepTable.make(schedule, config, "longcat").weight
        np.testing.assert_allclose(
            table.weight[1:6] / longcat[1:6], table.weight[1] / longcat[1], rtol=1e-5
        )


@pytest.mark.parametrize("experts", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids="+".join)
def test_rectified_credit_is_1_in_the_mean_of_each_experts_trained_steps(experts):
    """An update has rows of one expert, and none of steps that are not trained."""
    values = {"sample.steps": 10, "sample.sde_range": (1, 9), "train.credit": "rectified"}
    spec = tiny_spec("wan2.2-a14b", **values | {"train.experts": experts})
    weight = Functions(spec).table.weight
    assert [part.steps for part in spec.segments] == [range(4), range(4, 10)]
    for name, steps in zip(EXPERTS, (range(1, 4), range(4, 9))):
        if name in experts:
            assert (
                np.mean(weight[steps]) == pytest.approx(1, rel=1e-6) and np.ptp(weight[steps]) > 0
            )


def test_credit_of_the_noise_over_the_step():
    """g / sqrt(-dt), step by step, in float64; the KL has no weight (`test_policy_loss`)."""
    schedule = flow_sigmas(20, 3.0, "legacy")
    weight = StepTable.make(schedule, sde.SDEConfig(), "noise_over_step").weight
    sigmas, _ = reference.flow_sigmas(20, 3.0, "legacy")
    wanted = [sigmas[1] * s / (s - s_next) ** 0.5 for s, s_next in itertools.pairwise(sigmas)]
    # sigmas are rounded to fp32, which changes -dt, at least 0.017, by 2^-24 / 0.017 = 4e-6 at most
    np.testing.assert_allclose(weight, wanted, rtol=4e-6)


def test_rectified_credit_of_wans_published_schedule():
    """Flash-GRPO's constants for 20 steps with shift 3 are these up to a factor: 7.4770 at 999,
    3.7754 at 785.
    """
    schedule = flow_sigmas(20, 3.0, "legacy")
    weight = StepTable.make(schedule, sde.SDEConfig(), "rectified").weight
    at = dict(zip(schedule.timesteps.astype(int).tolist(), weight))
    assert at[999] / at[785] == pytest.approx(7.4770 / 3.7754, rel=1e-4)
