"""Threshold-guided optimisation: labels and weights by the median, the loss by its formula, its
gradient.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.methods.tgo import TGO, signed_confidence
from tests.grpo.methods.velocity_rows import velocity_rows


def rows(v, reference, target, weight):
    return velocity_rows(v, target, weight, reference=reference)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    target, reference = rng.standard_normal((2, 4, 2, 3, 3, 4)).astype(np.float32)
    moved = reference + 1e-3 * rng.standard_normal(reference.shape).astype(np.float32)
    return moved, reference, target, np.array([3.5, -1.0, 1.0, -6.0], np.float32)


def formula(v, reference, target, weight, temperature):
    """The loss and h in float64, with the label and the weight apart, as the paper writes them."""
    v, reference, target = (x.astype(np.float64) for x in (v, reference, target))
    label, size = weight > 0, np.abs(weight.astype(np.float64))
    axes = (1, 2, 3, 4)
    h = -(np.mean((v - target) ** 2, axes) - np.mean((reference - target) ** 2, axes))
    h /= temperature
    likely = 1 / (1 + np.exp(-h))
    return -size * (label * np.log(likely) + (1 - label) * np.log(1 - likely)), h


def test_weights_follow_from_the_median():
    scores = np.array([0.0, 0.5, 0.2, 1.0])  # median 0.35
    np.testing.assert_allclose(signed_confidence(scores, 5), [-2.75, 1.75, -1.75, 4.25], rtol=1e-6)
    np.testing.assert_array_equal(signed_confidence(scores, 0), [-1, 1, -1, 1])
    # a score at the median counts as good
    np.testing.assert_array_equal(signed_confidence(np.array([1.0, 2.0, 3.0]), 5), [-6, 1, 6])


@pytest.mark.parametrize("temperature", [1e-3, 0.1])
def test_the_loss_is_the_weighted_classification(arrays, temperature):
    loss, logged = TGO(temperature=temperature).loss(rows(*arrays))
    wanted, h = formula(*arrays, temperature)
    # h is a difference of fp32 sums of 72 squares of size 1 to 4, divided by T
    np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=6 * 2e-6 / temperature)
    agreed = np.sign(h) == np.sign(arrays[3])
    assert np.asarray(logged["agreed"]).tolist() == agreed.tolist()


def test_a_good_video_draws_the_velocity_and_a_bad_one_repels_it(arrays):
    """At the reference, h = 0, the gradient is +-w / (2 T) times that of the error."""
    _, reference, target, weight = arrays
    method = TGO()

    def total(v):
        return method.loss(rows(v, reference, target, weight))[0].sum()

    gradient = jax.grad(total)(jnp.asarray(reference))
    factor = weight[:, None, None, None, None] / (2 * method.temperature)
    wanted = factor * 2 * (reference - target) / reference[0].size
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


def test_videos_of_an_epoch_are_compared_with_the_median_of_those_with_spread():
    value = np.array([0.0, 1.0, np.nan, 0.25, 9.0, 9.0])
    spread = np.array([True, True, False, True, False, False])
    selection = TGO().select(types.SimpleNamespace(value=value, spread=spread), 3)
    np.testing.assert_allclose(selection.weight, [-2.25, 4.75, 1, 1, 1, 1])
    assert selection.valid.tolist() == spread.tolist() and selection.worse is None
    nothing = types.SimpleNamespace(value=value, spread=np.zeros(6, bool))
    assert np.isfinite(TGO().select(nothing, 3).weight).all()


def test_the_base_model_is_the_reference():
    assert TGO().needs_reference and TGO().passes == 4 and TGO().share_kept(1, True) == {}
