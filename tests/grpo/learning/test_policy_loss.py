"""The GRPO objective: values, gradients and metrics against the float64 reference, whose own
gradient is checked by central differences.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.learning.kl import KL_KINDS
from grpo.learning.policy_loss import LossConfig, clipped_loss, policy_term
from tests import reference
from tests.grpo.policy_rows import (
    SHAPE,
    batch,
    compiled_terms,
    masked_mean,
    objective,
    old_log_prob,
    rows_of,
)
from wan_jax.diffusion import sde

CONFIG = dict(clip_low=0.02, clip_high=0.03, kl_beta=0.1)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_objective_equals_reference(kind):
    args, mask = batch(), np.array([1, 1, 1, 1, 1, 0, 1, 1], bool)
    want = reference.grpo_objective(**args, **CONFIG, kl_kind=kind, mask=mask)
    rows = rows_of(args, old_log_prob(args), mask)
    index = np.array([0, 3, 3, 0, 2, 1, 3, 2])  # step 1 is of a masked row
    rows = dataclasses.replace(rows, index=jnp.asarray(index), steps=5)
    config = LossConfig(**CONFIG, kl_kind=kind)
    loss, gradient, metrics = objective(rows, args["v_new"], args["v_ref"], config)
    assert float(loss) == pytest.approx(want["loss"], rel=2e-5)
    largest = np.abs(want["gradient"]).max()
    np.testing.assert_allclose(gradient, want["gradient"], rtol=1e-3, atol=1e-5 * largest)
    averages = metrics.averages()
    assert float(metrics.count) == 7
    change = np.abs(want["log_prob"] - want["old_log_prob"])
    # log-probs of size 1 in fp32
    assert averages["log_ratio"] == pytest.approx(change[mask].mean(), abs=5e-7)
    assert averages["log_ratio_by_step"] == {
        str(k): pytest.approx(change[mask & (index == k)].mean(), abs=5e-7) for k in (0, 2, 3)
    }
    for name, values in {
        "ratio_mean": want["ratio"],
        "clip_fraction": want["clipped"],
        "kl": want["kl"],
        "policy_loss": want["policy_loss"],
        "approx_kl": 0.5 * (want["log_prob"] - want["old_log_prob"]) ** 2,
    }.items():
        assert averages[name] == pytest.approx(values[mask].mean(), rel=1e-4, abs=1e-6), name
    assert averages["ratio_min"] == pytest.approx(want["ratio"][mask].min(), rel=1e-5)
    assert averages["ratio_max"] == pytest.approx(want["ratio"][mask].max(), rel=1e-5)


def test_the_batch_exercises_all_branches():
    args = batch()
    want = reference.grpo_objective(**args, **CONFIG)
    up, down, A = want["ratio"] > 1.03, want["ratio"] < 0.98, args["advantages"]
    for place in (up, down, ~up & ~down):
        assert np.any(place & (A > 0)) and np.any(place & (A < 0)), want["ratio"]
    for edge in (1.03, 0.98):
        assert np.all(np.abs(want["ratio"] - edge) > 1e-3), want["ratio"]


@pytest.mark.parametrize("kind", KL_KINDS)
def test_reference_gradient_by_central_differences(kind):
    args = {name: np.asarray(value, np.float64) for name, value in batch().items()}
    direction = np.random.default_rng(3).normal(size=SHAPE)
    for b in range(SHAPE[0]):  # each row by itself, so that no row hides behind another
        step = np.zeros(SHAPE)
        step[b] = 1e-6 * direction[b]
        plus, minus = (
            reference.grpo_objective(
                **{**args, "v_new": args["v_new"] + sign * step}, **CONFIG, kl_kind=kind
            )["loss"]
            for sign in (1, -1)
        )
        gradient = reference.grpo_objective(**args, **CONFIG, kl_kind=kind)["gradient"]
        assert (plus - minus) / 2e-6 == pytest.approx(
            np.sum(gradient[b] * direction[b]), rel=1e-5, abs=1e-8
        )


def test_on_policy_ratio_is_exactly_one_and_the_gradient_is_plain_policy_gradient():
    args = batch()
    rows = rows_of(args, jnp.zeros(8))
    recompute = jax.jit(
        lambda v: sde.log_prob(
            rows.x_next, *sde.sde_mean_std(rows.x, v, rows.sigma, rows.sigma_next, rows.g)
        )
    )
    v = jnp.asarray(args["v_old"])
    logp = recompute(v)
    loss, ratio = clipped_loss(recompute(v) - logp, rows.advantages, 1e-5, 1e-5)
    np.testing.assert_array_equal(ratio, 1.0)
    np.testing.assert_array_equal(loss, -rows.advantages)
    ours = jax.grad(
        lambda v: clipped_loss(recompute(v) - logp, rows.advantages, 1e-5, 1e-5)[0].sum()
    )(v)
    plain = jax.grad(lambda v: -jnp.sum(rows.advantages * recompute(v)))(v)
    np.testing.assert_allclose(ours, plain, rtol=1e-6, atol=1e-12)
    assert np.any(ours)


def test_clipped_loss_values_and_gradients():
    """r = 0.5, 0.9, 1, 1.1, 2 for A = +1 and -1 with the range [0.8, 1.3]."""
    r = np.array([0.5, 0.9, 1.0, 1.1, 2.0], np.float32)
    for A, want, slopes in (
        (1.0, [-0.5, -0.9, -1.0, -1.1, -1.3], [-0.5, -0.9, -1.0, -1.1, 0.0]),
        (-1.0, [0.8, 0.9, 1.0, 1.1, 2.0], [0.0, 0.9, 1.0, 1.1, 2.0]),
    ):
        loss, ratio = clipped_loss(jnp.log(r), jnp.full(5, A), 0.2, 0.3)
        np.testing.assert_allclose(ratio, r, rtol=1e-6)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        gradient = jax.grad(lambda lp, A=A: clipped_loss(lp, jnp.full(5, A), 0.2, 0.3)[0].sum())
        np.testing.assert_allclose(gradient(jnp.log(r)), slopes, rtol=1e-6)


def test_the_logged_share_has_both_bounds():
    """Ratios on both sides of each of the two bounds, [0.8, 1.3]."""
    ratio = np.array([0.69, 0.71, 0.79, 0.81, 1.19, 1.21, 1.29, 1.31], np.float32)
    rows = dataclasses.replace(rows_of(batch(), np.zeros(8)), advantages=jnp.ones(8))
    config = LossConfig(clip_low=0.2, clip_high=0.3)
    _, found, outside = policy_term(rows, jnp.log(ratio), rows.x, jnp.ones(8), config)
    np.testing.assert_allclose(found, ratio, rtol=1e-6)
    assert np.asarray(outside).tolist() == [True] * 3 + [False] * 4 + [True]


def test_masked_rows_change_nothing():
    """A padding row of zeros and a masked row of nonsense leave loss, gradient and metrics as they
    were.
    """
    args = batch()
    config = LossConfig(**CONFIG)
    old = old_log_prob(args)
    loss, gradient, metrics = objective(rows_of(args, old), args["v_new"], args["v_ref"], config)
    padded = {
        name: np.concatenate([value, 0 * value[:1], 5 * value[:1] if value.ndim > 1 else value[:1]])
        for name, value in args.items()
    }
    rows = rows_of(padded, np.concatenate([old, [0.0, 1.0]]), np.arange(10) < 8)
    loss2, gradient2, metrics2 = objective(rows, padded["v_new"], padded["v_ref"], config)
    assert float(loss2) == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_allclose(gradient2[:8], gradient, rtol=1e-5, atol=1e-9)
    assert not np.any(gradient2[8:])
    assert metrics2.averages() == pytest.approx(metrics.averages(), rel=1e-5)


def test_merged_metrics_are_those_of_the_whole_batch():
    args = batch()
    old, mask, config = (
        old_log_prob(args),
        np.array([1, 1, 0, 1, 1, 1, 0, 1], bool),
        LossConfig(**CONFIG),
    )
    rows = rows_of(args, old, mask)
    inputs = rows, jnp.asarray(args["v_new"]), jnp.asarray(args["v_ref"])
    _, whole = compiled_terms(*inputs, config)
    parts = [
        compiled_terms(*jax.tree.map(lambda a, s=s: a[s], inputs), config)[1]
        for s in (slice(0, 3), slice(3, 8))
    ]
    for first, second in (parts, parts[::-1]):
        assert first.merge(second).averages() == pytest.approx(whole.averages(), rel=1e-5)


def test_reference_velocity():
    args = batch()
    rows, v = rows_of(args, old_log_prob(args)), jnp.asarray(args["v_new"])
    with pytest.raises(ValueError, match=r"kl_beta=0\.1 needs"):
        compiled_terms(rows, v, None, LossConfig(**CONFIG))
    config = LossConfig(**{**CONFIG, "kl_beta": 0.0})  # then the KL is only logged
    without, metrics = compiled_terms(rows, v, None, config)
    watched, watched_metrics = compiled_terms(rows, v, jnp.asarray(args["v_ref"]), config)
    np.testing.assert_allclose(without, watched, rtol=1e-6)
    assert metrics.averages()["kl"] == 0 < watched_metrics.averages()["kl"]

    def through_reference(v_ref):
        return jnp.sum(compiled_terms(rows, v, v_ref, LossConfig(**CONFIG))[0])

    assert not np.any(jax.grad(through_reference)(jnp.asarray(args["v_ref"])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_low": 0.0}, "clip_low=0.0"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"clip_high": -1.0}, "clip_high=-1.0"),
        ({"kl_beta": -0.1}, "kl_beta=-0.1"),
        ({"kl_kind": "kl"}, "'kl'.*flow_grpo"),
        ({"kl_target": 0.0}, r"kl_target=0\.0"),
        ({"kl_target": 0.1, "kl_horizon": -1.0}, r"kl_horizon=-1\.0"),
        ({"kl_target": 0.1, "kl_beta": 0.0}, "first weight, 0.0"),
        ({"kl_target": 0.1, "kl_beta": 2.0}, "first weight, 2.0"),
    ],
)
def test_bad_configuration(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**arguments)


def test_the_gate_of_the_kl_leaves_the_policy_loss():
    """The loss and the logged KL have the KL of the rows that are held."""
    args, config = batch(), LossConfig(**CONFIG)
    rows, v, v_ref = rows_of(args, old_log_prob(args)), args["v_new"], jnp.asarray(args["v_ref"])
    whole, metrics = compiled_terms(rows, v, v_ref, config=config)
    held = np.array([1, 0, 0, 1, 0, 1, 0, 0], np.float32)
    gated = dataclasses.replace(rows, kl_gate=jnp.asarray(held))
    terms, found = compiled_terms(gated, v, v_ref, config=config)
    want = reference.grpo_objective(**args, **CONFIG)
    np.testing.assert_allclose(
        terms, want["policy_loss"] + CONFIG["kl_beta"] * held * want["kl"], rtol=1e-5, atol=1e-6
    )
    assert float(found.kl) == pytest.approx((held * want["kl"]).sum(), rel=1e-4)
    assert float(found.policy_loss) == pytest.approx(float(metrics.policy_loss), rel=1e-6)
    assert np.any(np.abs(whole - terms) > 1e-4)


def test_weights_scale_the_loss_and_their_squares_the_penalty():
    args = batch()
    rows = rows_of(args, old_log_prob(args))
    config = LossConfig(**CONFIG)
    plain = compiled_terms(rows, jnp.asarray(args["v_new"]), jnp.asarray(args["v_ref"]), config)[1]
    weighted = dataclasses.replace(rows, weight=jnp.full(8, 3.0))
    thrice = compiled_terms(
        weighted, jnp.asarray(args["v_new"]), jnp.asarray(args["v_ref"]), config
    )[1]
    assert float(thrice.policy_loss) == pytest.approx(3 * float(plain.policy_loss), rel=1e-6)
    assert float(thrice.kl) == pytest.approx(9 * float(plain.kl), rel=1e-6)
    unweighted = dataclasses.replace(config, kl_weighted=False)
    policy_alone = compiled_terms(
        weighted, jnp.asarray(args["v_new"]), jnp.asarray(args["v_ref"]), unweighted
    )[1]
    assert float(policy_alone.policy_loss) == pytest.approx(float(thrice.policy_loss), rel=1e-6)
    assert float(policy_alone.kl) == pytest.approx(float(plain.kl), rel=1e-6)


def test_a_weight_in_place_of_the_configured_one():
    args = batch()
    rows, v, v_ref = (
        rows_of(args, old_log_prob(args)),
        jnp.asarray(args["v_new"]),
        jnp.asarray(args["v_ref"]),
    )
    given, _ = compiled_terms(rows, v, v_ref, LossConfig(**CONFIG), kl_beta=jnp.asarray(0.7))
    wanted, _ = compiled_terms(rows, v, v_ref, LossConfig(**CONFIG | {"kl_beta": 0.7}))
    np.testing.assert_allclose(given, wanted, rtol=1e-6)


def test_distillation_adds_its_squares_and_their_gradient():
    args, mask = batch(), np.arange(8) != 5
    rows = rows_of(args, old_log_prob(args), mask)
    teacher = np.random.default_rng(7).normal(size=SHAPE).astype(np.float32)

    def of(v, config, teacher):
        terms, metrics = compiled_terms(
            rows, v, jnp.asarray(args["v_ref"]), config, teacher=teacher
        )
        return masked_mean(terms, rows.mask), metrics

    grad = jax.value_and_grad(of, has_aux=True)
    (plain, _), plain_gradient = grad(jnp.asarray(args["v_new"]), LossConfig(**CONFIG), None)
    (loss, metrics), gradient = grad(
        jnp.asarray(args["v_new"]), LossConfig(**CONFIG, distill_weight=0.3), jnp.asarray(teacher)
    )
    apart = (args["v_new"] - teacher).astype(np.float64) * mask.reshape(-1, 1, 1, 1, 1)
    squares = np.mean(apart**2, axis=(1, 2, 3, 4)).sum() / 7
    assert metrics.averages()["distillation"] == pytest.approx(squares, rel=1e-5)
    assert float(loss) == pytest.approx(float(plain) + 0.3 * squares, rel=1e-5)
    wanted = np.asarray(plain_gradient) + 0.3 * 2 * apart / (7 * np.prod(SHAPE[1:]))
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-7)
