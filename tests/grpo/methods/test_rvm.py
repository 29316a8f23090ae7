"""Reward-based velocity matching: the loss by its formula, and its signed gradient."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.velocity_loss import Rows, mean_square
from grpo.methods.rvm import RVM

ADVANTAGES = np.array([2.0, -1.5, 0.0, 5.0], np.float32)


def rows(v, target) -> Rows:
    weight = jnp.asarray(0.1 * ADVANTAGES)
    return Rows(None, None, None, v, {}, None, mean_square(v - target), target, weight)


def test_loss_and_gradient_by_the_formula():
    """c / 2 mean((v - u)^2), whose gradient is c (v - u) / n: to u where c > 0, away where c < 0."""
    v, target = np.random.default_rng(0).standard_normal((2, 4, 1, 3, 3, 4)).astype(np.float32)
    loss, logged = RVM().loss(rows(v, target))
    error = (v.astype(np.float64) - target) ** 2
    wanted = 0.1 * ADVANTAGES / 2 * error.mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert logged == {}
    gradient = jax.grad(lambda v: RVM().loss(rows(v, target))[0].sum())(jnp.asarray(v))
    factor = (0.1 * ADVANTAGES)[:, None, None, None, None]
    np.testing.assert_allclose(gradient, factor * (v - target) / v[0].size, rtol=1e-5, atol=1e-9)
    closer = mean_square(v - 0.1 * gradient - target) - mean_square(v - target)
    assert np.sign(closer).tolist() == [-1, 1, 0, -1]


def test_videos_count_by_a_tenth_of_their_advantages():
    spread = np.array([True, True, False, True])
    credit = types.SimpleNamespace(advantages=ADVANTAGES, spread=spread)
    selection = RVM().select(credit, 4)
    np.testing.assert_allclose(selection.weight, 0.1 * ADVANTAGES, rtol=1e-6)
    assert selection.valid.tolist() == spread.tolist() and selection.worse is None
    assert RVM().lagged == () and not RVM().needs_reference and RVM(kl_weight=0.1).needs_reference
