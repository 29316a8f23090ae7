"""The KL to a reference and the weight that follows it, against their formulas."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.learning.kl import AdaptiveKL, kl_to_reference


def test_kl_kinds():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32) for _ in range(2))
    squared = np.mean((np.asarray(a) - np.asarray(b)) ** 2, axis=(1, 2))
    scale = jnp.array([0.5, 2.0])
    for kind in ("flow_grpo", "sigma"):
        ours = kl_to_reference(a, b, scale, kind=kind)
        np.testing.assert_allclose(ours, squared / (2 * scale**2), rtol=1e-5)
    for kind in ("x", "velocity"):
        np.testing.assert_allclose(kl_to_reference(a, b, None, kind=kind), squared, rtol=1e-5)
    assert not np.any(kl_to_reference(a, a, scale, kind="flow_grpo"))
    short = [x.astype(jnp.bfloat16) for x in (a, b)]  # the difference is in float32
    exact = np.mean(np.subtract(*(np.asarray(x, np.float64) for x in short)) ** 2, axis=(1, 2))
    np.testing.assert_allclose(kl_to_reference(*short, None, kind="x"), exact, rtol=1e-5)
    half = jnp.array([0.0, 1.0])  # row 0 deterministic
    gradient = jax.grad(lambda m: jnp.sum(kl_to_reference(m, b, half, kind="flow_grpo")))(a)
    assert np.isfinite(gradient).all() and not np.any(gradient[0]) and np.any(gradient[1])
    with pytest.raises(ValueError, match="'forward'"):
        kl_to_reference(a, b, scale, kind="forward")


def test_an_adaptive_weight_follows_its_formula_and_finds_the_target():
    """Against NumPy; then in a loop in which more weight means less KL, where it must settle."""
    adaptive = AdaptiveKL(0.01, target=0.5, horizon=5.0, bounds=(1e-3, 0.1))
    control, weight, average = adaptive.init(), 0.01, 0.0
    assert float(control.weight) == pytest.approx(0.01)
    for n, kl in enumerate([0.2, 3.0, 3.0, 0.0, 1e6, 0.0]):
        control = adaptive.step(control, jnp.asarray(kl), jnp.asarray(n == 0))
        average = kl if n == 0 else 0.9 * average + 0.1 * kl
        weight = min(max(weight * math.exp(min((average - 0.5) / 0.5 / 5.0, 50)), 1e-3), 0.1)
        assert float(control.weight) == pytest.approx(weight, rel=1e-4)
        assert float(control.average) == pytest.approx(average, rel=1e-5)
    assert float(control.weight) == pytest.approx(0.1)  # at its bound
    control = adaptive.init()
    for n in range(200):
        kl = 0.02 / control.weight
        control = adaptive.step(control, kl, jnp.asarray(n == 0))
    assert float(kl) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    "key, changes",
    [
        ("kl_target=0.0", {"target": 0.0}),
        ("kl_horizon=-1.0", {"horizon": -1.0}),
        ("kl_weight_range=(0.0, 1.0)", {"bounds": (0.0, 1.0)}),
        ("kl_weight_range=(0.2, 1.0)", {"bounds": (0.2, 1.0)}),
    ],
)
def test_values_that_cannot_adapt_are_refused(key, changes):
    with pytest.raises(ValueError, match=re.escape(key)):
        AdaptiveKL(**{"first": 0.1, "target": 0.5} | changes)
