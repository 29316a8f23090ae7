"""The stochastic step: values against the NumPy reference, and the properties that a policy needs."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference
from wan_jax.diffusion.schedule import euler_sigmas, flow_sigmas
from wan_jax.diffusion.sde import (
    DEFAULTS,
    SDEConfig,
    diffusion_coefficient,
    log_prob,
    mean_slope,
    sde_mean_std,
    sde_step,
)
from wan_jax.diffusion.solvers import euler_step

SHAPE = (3, 4, 2, 5, 6)  # B C F H W
ROUNDING = 16 * float(np.finfo(np.float32).eps)  # a few float32 operations on values below about 5
SCHEDULES = [
    make(n, k)
    for n in (10, 20, 50)
    for k in (3.0, 5.0, 12.0)
    for make in (flow_sigmas, euler_sigmas, lambda n, k: flow_sigmas(n, k, "legacy"))
]


def normal(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def step_std(sde, schedule):
    return diffusion_coefficient(sde, schedule) * np.sqrt(-np.diff(schedule.sigmas))


@pytest.mark.parametrize(
    ("kind", "level"),
    [
        ("flow_grpo_wan", 1.0),
        ("flow_grpo_wan", 0.7),
        ("flow_sde", 0.7),
        ("dance", 0.3),
        ("cps", 0.8),
    ],
)
def test_coefficient_equals_reference(kind, level):
    for schedule in SCHEDULES:
        g = diffusion_coefficient(SDEConfig(kind, level, math.inf), schedule)
        assert g.dtype == np.float32 and g.shape == (schedule.num_steps,)
        theirs = reference.diffusion_coefficient(kind, schedule.sigmas.astype(float), level)
        np.testing.assert_allclose(g, theirs, rtol=1e-6)


def test_published_defaults():
    schedule = flow_sigmas(20, 3.0)
    sigmas = schedule.sigmas.astype(float)
    np.testing.assert_array_equal(
        diffusion_coefficient(SDEConfig(), schedule), (sigmas[1] * sigmas[:-1]).astype(np.float32)
    )
    np.testing.assert_array_equal(
        diffusion_coefficient(SDEConfig("flow_sde"), schedule),
        diffusion_coefficient(SDEConfig("flow_sde", 0.7, math.inf), schedule),
    )
    assert step_std(SDEConfig(), schedule)[0] == pytest.approx(0.129, abs=5e-4)
    assert step_std(SDEConfig("flow_sde"), euler_sigmas(20, 3.0))[0] == pytest.approx(
        0.70, abs=5e-3
    )


@pytest.mark.parametrize(
    "kind, level, bound",
    [
        ("flow_grpo_wan", 1.0, math.inf),
        ("flow_sde", 0.7, 1.0),
        ("dance", 0.3, math.inf),
        ("cps", 0.8, math.inf),
    ],
)
def test_defaults_of_each_kind(kind, level, bound):
    """The level where none is given, and the bound at a level whose steps have a std above 1."""
    schedule = flow_sigmas(4, 3.0)
    cases = [(level, None)] + [(20.0, 20.0)] * (kind != "cps")  # cps takes 1 at most
    for meant, given in cases:
        theirs = reference.diffusion_coefficient(kind, schedule.sigmas.astype(float), meant)
        wanted = np.minimum(theirs * np.sqrt(-np.diff(schedule.sigmas)), bound)
        np.testing.assert_allclose(step_std(SDEConfig(kind, given), schedule), wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_std_is_sane_at_every_step(kind):
    """Without any bound: flow_sde without its guard would start with 3 to 131, or infinity, on
    these lists.
    """
    for schedule in SCHEDULES:
        std = step_std(SDEConfig(kind, max_step_std=math.inf), schedule)
        limit = 0.952 if kind == "cps" else 0.8  # sin(0.8 pi / 2)
        assert np.all((std[:-1] > 0) & (std[:-1] <= limit)), std
        assert std[-1] > 0 or kind == "cps"


def test_max_step_std_lowers_g():
    schedule = flow_sigmas(20, 3.0)
    free, bounded = (
        step_std(SDEConfig("flow_sde", 1.5, limit), schedule) for limit in (math.inf, 0.45)
    )
    np.testing.assert_allclose(bounded, np.minimum(free, 0.45), rtol=1e-6)
    assert free.max() > 1.4 and np.any(free < 0.45)
    assert step_std(SDEConfig("flow_sde", 1.5), schedule).max() == pytest.approx(1.0, rel=1e-6)
    assert step_std(SDEConfig("flow_grpo_wan", 20.0), schedule).max() > 1.0


def test_zero_noise_level_is_the_ode():
    for kind in DEFAULTS:
        assert not diffusion_coefficient(SDEConfig(kind, 0.0), flow_sigmas(10, 3.0)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "sde"}, "'sde'.*flow_grpo_wan, flow_sde"),
        ({"noise_level": -1.0}, "noise_level=-1.0"),
        ({"noise_level": math.nan}, "noise_level=nan"),
        ({"kind": "cps", "noise_level": 1.1}, "noise_level=1.1"),
        ({"max_step_std": 0.0}, "max_step_std=0.0"),
    ],
)
def test_bad_configuration(arguments, message):
    with pytest.raises(ValueError, match=message):
        SDEConfig(**arguments)


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("schedule", [flow_sigmas(20, 3.0), flow_sigmas(10, 12.0, "legacy")])
def test_step_equals_reference(kind, schedule):
    """Every step of the schedule, values and log-prob, with sigma, sigma_next and g per sample."""
    g = diffusion_coefficient(SDEConfig(kind), schedule)
    x, v, z = normal(0), normal(1), normal(2)
    preserving = SDEConfig(kind).preserving
    mean_std = reference.cps_mean_std if preserving else reference.mean_std
    step = jax.jit(sde_step, static_argnames="preserving")
    for i in range(0, schedule.num_steps - 2, 3):
        sigma, after, gs = schedule.sigmas[i : i + 3], schedule.sigmas[i + 1 : i + 4], g[i : i + 3]
        x_next, logp, mean, std = step(x, v, sigma, after, gs, z, preserving=preserving)
        for b in range(3):
            row = (np.asarray(a[b], np.float64) for a in (x, v, sigma, after, gs))
            want_mean, want_std = mean_std(*row)
            np.testing.assert_allclose(mean[b], want_mean, rtol=1e-5, atol=2e-6)
            np.testing.assert_allclose(std[b], want_std, rtol=2e-6)
            drawn = want_mean + want_std * np.asarray(z[b], np.float64)
            np.testing.assert_allclose(x_next[b], drawn, rtol=1e-5, atol=2e-6)
            want = reference.log_prob(drawn, want_mean, want_std)
            assert float(logp[b]) == pytest.approx(want, abs=1e-5)


def test_scalar_and_per_sample_sigmas_agree():
    x, v, z = normal(0), normal(1), normal(2)
    scalar = sde_step(x, v, 0.8, 0.7, 0.6, z)
    rows = sde_step(x, v, *(jnp.full(3, value) for value in (0.8, 0.7, 0.6)), z)
    assert rows[3].shape == (3,) and scalar[1].shape == rows[1].shape == (3,)
    # a scalar's logarithm and root are compiled otherwise than a vector's
    for a, b in zip(scalar, rows):
        np.testing.assert_allclose(np.broadcast_to(a, np.shape(b)), b, rtol=1e-5, atol=ROUNDING)


def test_without_noise_the_step_is_euler_and_finite():
    x, v, z = normal(0), normal(1), normal(2)
    for sigma, after in ((0.9999990, 0.98), (0.2, 0.0)):
        x_next, logp, mean, std = jax.jit(sde_step)(x, v, sigma, after, 0.0, z)
        np.testing.assert_allclose(
            x_next, jax.jit(euler_step)(x, v, sigma, after), rtol=0, atol=ROUNDING
        )
        np.testing.assert_allclose(x_next, mean, rtol=0, atol=ROUNDING)
        assert not np.any(logp) and not np.any(std)


def test_gradients_are_finite_where_the_step_is_deterministic():
    """Row 0 is an SDE step, row 1 an ODE step, row 2 a padding row of zeros."""
    x, v, target = normal(0), normal(1), normal(2)
    sigma, after, g = (jnp.array(a) for a in ([0.8, 0.8, 0.0], [0.7, 0.7, 0.0], [0.5, 0.0, 0.0]))

    def total(v):
        return jnp.sum(log_prob(target, *sde_mean_std(x, v, sigma, after, g)))

    value, gradient = jax.value_and_grad(total)(v)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert np.any(gradient[0]) and not np.any(gradient[1:])


def test_log_prob_is_a_mean_over_dimensions():
    x, mean = normal(0), normal(1)
    one = log_prob(x, mean, 0.3)
    doubled = log_prob(jnp.concatenate([x, x], axis=1), jnp.concatenate([mean, mean], axis=1), 0.3)
    np.testing.assert_allclose(one, doubled, rtol=1e-6)
    squares = np.mean(((x - mean) / 0.3) ** 2, axis=(1, 2, 3, 4))
    expected = -0.5 * squares - math.log(0.3 * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(one, expected, rtol=1e-5)


def test_gradient_of_log_prob():
    """d logp / d mean = (x' - mean) / (std^2 size) for every element."""
    x, mean, std = normal(0), normal(1), jnp.array([0.1, 0.5, 2.0])
    gradient = jax.grad(lambda m: jnp.sum(log_prob(x, m, std)))(mean)
    size = x[0].size
    expected = (x - mean) / (std.reshape(3, 1, 1, 1, 1) ** 2 * size)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-8)


def test_draws_have_the_stated_distribution():
    shape = (2, 4, 50, 50, 50)
    x, v = normal(0, shape), normal(1, shape)
    x_next, logp, mean, std = sde_step(x, v, 0.8, 0.7, jnp.array([0.9, 0.3]), normal(2, shape))
    z = (x_next - mean) / std.reshape(2, 1, 1, 1, 1)
    for b in range(2):  # 5e5 draws: the standard error of the mean is 1.4e-3, of the variance 2e-3
        assert abs(float(jnp.mean(z[b]))) < 6e-3 and abs(float(jnp.var(z[b])) - 1) < 8e-3
        entropy = 0.5 + math.log(float(std[b]) * math.sqrt(2 * math.pi))
        assert float(logp[b]) == pytest.approx(-entropy, abs=5e-3)


def test_marginals_are_those_of_the_ode():
    """Data and noise are independent unit normals: x_s is N(0, (1-s)^2 + s^2), the true velocity
    linear in x. Many small SDE steps must keep that variance, which fails when the drift's noise
    correction is wrong.
    """
    sigmas = np.linspace(0.95, 0.05, 301).astype(np.float32)
    noise_rng = np.random.default_rng(0)
    x = noise_rng.normal(size=(1, 40000)).astype(np.float32) * math.hypot(0.95, 0.05)

    step = jax.jit(sde_step)
    for s, after in itertools.pairwise(sigmas):
        variance = (1 - s) ** 2 + s**2
        velocity = x * (s - (1 - s)) / variance  # E[noise - x0 | x]
        z = noise_rng.normal(size=x.shape).astype(np.float32)
        x = step(x, velocity, s, after, np.float32(0.9), z)[0]
    assert float(np.var(x)) == pytest.approx(0.95**2 + 0.05**2, rel=0.03)


def test_on_policy_ratio_is_one():
    """The update's program recomputes the log-prob of the rollout's own draw."""
    x, v, z = normal(0), normal(1), normal(2)
    x_next, logp, _, _ = jax.jit(sde_step)(x, v, 0.8, 0.7, 0.5, z)
    again = jax.jit(lambda v: log_prob(x_next, *sde_mean_std(x, v, 0.8, 0.7, 0.5)))(v)
    np.testing.assert_allclose(jnp.exp(again - logp), 1.0, atol=1e-6)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_slope_of_the_mean(kind):
    """d mean / d v of the reference, which is linear in v."""
    config = SDEConfig(kind, 0.6)
    mean_std = reference.cps_mean_std if config.preserving else reference.mean_std
    for schedule in SCHEDULES[::5]:
        sigmas, g = schedule.sigmas.astype(float), diffusion_coefficient(config, schedule)
        wanted = [
            abs(mean_std(0.3, 1.0, *step)[0] - mean_std(0.3, 0.0, *step)[0])
            for step in zip(sigmas[:-1], sigmas[1:], g.astype(float))
        ]
        np.testing.assert_allclose(mean_slope(config, schedule), wanted, rtol=1e-6, atol=1e-9)


def test_slope_where_all_noise_is_fresh():
    """s (1 - s_next) of CPS, up to the root of a rounded zero, 2^-21 at most, which is negative at some
    steps.
    """
    for schedule in SCHEDULES:
        s, after = schedule.sigmas[:-1].astype(float), schedule.sigmas[1:].astype(float)
        found = mean_slope(SDEConfig("cps", 1.0), schedule)
        assert (np.abs(found - s * (1 - after)) <= (1 - s) * 2**-10.5 + 1e-12).all()


def test_noise_rounded_above_that_of_the_schedule_leaves_none_to_predict():
    """CPS with std = s_next (1 + 1e-5): the mean is the clean share alone, not NaN."""
    x, v = normal(0), normal(1)
    g = 0.25 * (1 + 1e-5) / math.sqrt(0.25)
    mean, std = sde_mean_std(x, v, 0.5, 0.25, g, preserving=True)
    assert float(std) > 0.25
    np.testing.assert_allclose(mean, 0.75 * (x - 0.5 * v), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_cps_keeps_the_coefficients_of_the_schedule(level):
    """1 - s_next of the data, s_next of noise in all, fresh or not; without fresh noise the step is
    Euler's.
    """
    schedule = flow_sigmas(10, 3.0)
    clean, noise = normal(0), normal(1)
    for i in range(schedule.num_steps):
        s, after = schedule.sigmas[i : i + 2].astype(float)
        g = diffusion_coefficient(SDEConfig("cps", level), schedule)[i]
        x = (1 - s) * clean + s * noise
        mean, std = sde_mean_std(x, noise - clean, s, after, g, preserving=True)
        np.testing.assert_allclose(float(std), after * math.sin(level * math.pi / 2), atol=1e-6)
        kept = math.sqrt(max(after**2 - float(std) ** 2, 0))
        np.testing.assert_allclose(
            mean, (1 - after) * clean + kept * noise, atol=2e-3 if level == 1 else 2e-5
        )
        if level == 0:
            np.testing.assert_allclose(mean, euler_step(x, noise - clean, s, after), atol=2e-6)
