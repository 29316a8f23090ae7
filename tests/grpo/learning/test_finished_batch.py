"""The noise levels of the methods that train on finished videos."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from grpo.methods.dpo import DPO
from grpo.methods.nft import NFT
from grpo.methods.rvm import RVM
from grpo.methods.rwr import RWR
from tests.grpo.specs import levels_spec
from wan_jax.diffusion.schedule import flow_sigmas


def levels_of(
    method, expert=0, *, seed=7, epoch=3, videos=4000, boundary=None, quotas=(4,), steps=20
):
    """Return a method's noise levels on a schedule with shift 12."""
    spec = levels_spec(flow_sigmas(steps, 12.0), quotas, videos, seed=seed, boundary=boundary)
    segment = next(i for i, part in enumerate(spec.segments) if part.expert == expert)
    return method.noise_levels(spec, epoch, segment)


def test_noise_levels_lie_with_their_expert_and_cover_it():
    for method in (NFT(), DPO()):
        first, second = (
            levels_of(method, expert, boundary=0.875, quotas=(3, 2)) for expert in (0, 1)
        )
        assert first.sigma.shape == (4000, 3) and second.sigma.shape == (4000, 2)
        assert first.sigma.dtype == np.float32
        assert first.timestep.min() >= 875 > second.timestep.max() and second.sigma.min() >= 0
        assert first.draw.tolist() == [0, 1, 2] and second.draw.tolist() == [3, 4]
        # strata, in their order
        assert (np.diff(first.sigma.mean(0)) * (-1 if method.rollout_levels else 1) > 0).all()
        again = levels_of(method, 0, boundary=0.875, quotas=(3, 2))
        np.testing.assert_array_equal(again.sigma, first.sigma)
        for other in ({"seed": 8}, {"epoch": 4}):
            changed = levels_of(method, 0, boundary=0.875, quotas=(3, 2), **other)
            assert not np.array_equal(changed.sigma, first.sigma)


def test_as_many_levels_as_steps_are_each_step_once():
    levels = levels_of(NFT(), videos=9, quotas=(20,))
    schedule = flow_sigmas(20, 12.0)
    np.testing.assert_array_equal(levels.sigma, np.tile(schedule.sigmas[:-1], (9, 1)))
    np.testing.assert_array_equal(levels.timestep, np.tile(schedule.timesteps, (9, 1)))


def test_other_levels_are_logit_normal():
    levels, normal = levels_of(RWR(), videos=999), NormalDist()
    for level in (0.1, 0.5, 0.8):
        wanted = normal.cdf(math.log(level / (1 - level)))
        assert np.mean(levels.sigma < level) == pytest.approx(wanted, abs=0.02)


def test_levels_of_velocity_matching_are_uniform():
    levels = levels_of(RVM(), videos=999)
    assert levels.sigma.dtype == np.float32 and levels.sigma.min() > 0 < 1 - levels.sigma.max()
    np.testing.assert_array_equal(levels.timestep, 1000 * levels.sigma)
    for level in (0.1, 0.5, 0.8):  # one level in each quarter of a video
        assert np.mean(levels.sigma < level) == pytest.approx(level, abs=0.02)
    low, high = (levels_of(RVM(), i, boundary=0.875, quotas=(3, 2)) for i in (1, 0))
    assert low.timestep.max() < 875 <= high.timestep.min()


def test_levels_of_two_experts_are_drawn_apart():
    """Where they lie in their distribution, between the bounds of each."""
    first, second = (levels_of(RVM(), i, boundary=0.875, quotas=(3, 3)) for i in (0, 1))
    shares = (first.sigma - 0.875) / (0.999 - 0.875), (second.sigma - 0.001) / (0.875 - 0.001)
    for share in shares:  # one in each third
        assert ((share >= np.arange(3) / 3 - 1e-4) & (share <= np.arange(1, 4) / 3 + 1e-4)).all()
    assert np.abs(shares[0] - shares[1]).max() > 0.2
