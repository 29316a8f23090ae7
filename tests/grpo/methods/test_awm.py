"""Advantage-weighted matching: the loss by its formula, its gradient, what the copies keep."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.methods.awm import AWM
from tests.grpo.methods.velocity_rows import velocity_rows


def rows(v, behaviour, target, weight):
    lagged = {"behaviour": behaviour, "average": None}
    return velocity_rows(v, target, weight, lagged=lagged)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    target, behaviour = rng.standard_normal((2, 4, 2, 3, 3, 4)).astype(np.float32)
    moved = behaviour + 1e-3 * rng.standard_normal(behaviour.shape).astype(np.float32)
    return moved, behaviour, target, np.array([2.0, -1.5, 0.5, -0.5], np.float32)


@pytest.mark.parametrize("clip", [1e-5, 1e-4, 1.0])
def test_the_loss_is_the_clipped_surrogate(arrays, clip):
    v, behaviour, target, advantages = arrays
    loss, logged = AWM(clip=clip).loss(rows(*arrays))
    v, behaviour, target = (x.astype(np.float64) for x in (v, behaviour, target))
    axes = (1, 2, 3, 4)
    ratio = np.exp(-np.mean((v - target) ** 2, axes) + np.mean((behaviour - target) ** 2, axes))
    bounded = np.clip(ratio, 1 - clip, 1 + clip)
    wanted = np.maximum(-advantages * ratio, -advantages * bounded)
    # fp32 sums of 72 squares of size 1 to 4
    np.testing.assert_allclose(loss, wanted, rtol=5e-6)
    np.testing.assert_allclose(logged["ratio_mean"], ratio, rtol=2e-6)
    assert np.asarray(logged["clip_fraction"]).tolist() == (np.abs(ratio - 1) > clip).tolist()
    np.testing.assert_allclose(logged["log_ratio"], np.abs(np.log(ratio)), atol=2e-6)
    assert (ratio < 1).any() and (ratio > 1).any()
    np.testing.assert_allclose(
        logged["old_distance"], np.mean((v - behaviour) ** 2, axes), rtol=1e-5
    )


def test_a_better_video_draws_the_velocity_to_its_own(arrays):
    """On policy, where nothing is clipped, the gradient is -A times that of lp."""
    _, behaviour, target, advantages = arrays

    def total(v):
        return AWM().loss(rows(v, behaviour, target, advantages))[0].sum()

    gradient = jax.grad(total)(jnp.asarray(behaviour))
    size = behaviour[0].size
    wanted = advantages[:, None, None, None, None] * 2 * (behaviour - target) / size
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_what_the_copies_keep():
    """The behaviour policy is replaced after an epoch; the average moves in every update."""
    method = AWM()
    assert method.clip == 1e-5, "as published; it is no setting"
    assert set(method.share_kept(1, False)) == set(method.lagged)
    assert method.share_kept(1, False) == {"behaviour": 1.0, "average": 0.9}
    assert method.share_kept(2, True) == {"behaviour": 0.0, "average": 0.9}
    assert method.sampler is None
    # the KL is to the average, never to the base model
    assert method.kl_copy == "average" and not AWM(kl_weight=0.1).needs_reference


def test_videos_count_by_their_advantages():
    advantages, spread = np.array([1.0, -1.0, 0.0]), np.array([True, True, False])
    credit = types.SimpleNamespace(advantages=advantages, spread=spread)
    selection = AWM().select(credit, 3)
    assert selection.weight.tolist() == advantages.tolist()
    assert selection.valid.tolist() == spread.tolist() and selection.worse is None
