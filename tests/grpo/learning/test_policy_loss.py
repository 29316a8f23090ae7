"""The GRPO objective: values, gradients and metrics against the float64 reference, whose own
gradient is checked by central differences.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.learning.kl import KL_KINDS
from grpo.learning.policy_loss import (
    OBJECTIVES,
    LossConfig,
    Rows,
    clipped_loss,
    policy_gradient_terms,
    policy_term,
)
from tests import reference
from wan_jax.diffusion import sde
from wan_jax.diffusion.schedule import flow_sigmas

SHAPE = (8, 4, 1, 3, 5)  # B C F H W
CONFIG = dict(clip_low=0.02, clip_high=0.03, kl_beta=0.1)


def masked_mean(values, mask):
    """Return the mean of values [B] where mask [B] is True; masked values may be NaN."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def batch(seed=0, distance=0.06):
    """Eight rows at different steps of one schedule: the float32 arguments of
    `reference.grpo_objective`.
    """
    rng = np.random.default_rng(seed)
    schedule = flow_sigmas(10, 3.0)
    steps = np.arange(1, 9)
    sigma, sigma_next = schedule.sigmas[steps], schedule.sigmas[steps + 1]
    g = sde.diffusion_coefficient(sde.SDEConfig(), schedule)[steps]
    x, v_old, z, a, b = (rng.normal(size=SHAPE).astype(np.float32) for _ in range(5))
    mean, std = sde.sde_mean_std(jnp.asarray(x), jnp.asarray(v_old), sigma, sigma_next, g)
    x_next = np.asarray(mean) + np.asarray(std).reshape(-1, 1, 1, 1, 1) * z
    # Moving the mean by +-distance * std * z changes the log-prob by about +-distance: ratios on
    # both sides of the clip range, and two rows inside it.
    side = np.array([1, -1, 1, -1, 0, 0, 1, -1], np.float32).reshape(-1, 1, 1, 1, 1)
    scale = (np.asarray(std) / (sigma_next - sigma)).reshape(-1, 1, 1, 1, 1)
    v_new = v_old + distance * (0.2 * a + side * scale * z)
    advantages = np.array([1, 1, -1, -1, 2, -0.5, 0.3, -0.7], np.float32)
    return dict(
        x=x,
        x_next=x_next,
        v_new=v_new,
        v_old=v_old,
        v_ref=v_old + distance * b,
        sigma=sigma,
        sigma_next=sigma_next,
        g=g,
        advantages=advantages,
    )


def rows_of(args, old_log_prob, mask=None):
    names = ("x", "x_next", "advantages", "sigma", "sigma_next", "g")
    mask = np.ones(len(args["x"]), bool) if mask is None else mask
    return Rows(
        old_log_prob=jnp.asarray(old_log_prob, jnp.float32),
        mask=jnp.asarray(mask),
        **{name: jnp.asarray(args[name]) for name in names},
    )


compiled_terms = jax.jit(policy_gradient_terms, static_argnames="config")


def objective(rows, v_new, v_ref, config):
    """Scalar loss, gradient and metrics, jitted as an update would."""

    def loss(v):
        terms, metrics = policy_gradient_terms(rows, v, v_ref, config)
        return masked_mean(terms, rows.mask), metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(v_new))
    return value, gradient, metrics


def old_log_prob(args):
    return sde.log_prob(
        jnp.asarray(args["x_next"]),
        *sde.sde_mean_std(
            jnp.asarray(args["x"]),
            jnp.asarray(args["v_old"]),
            args["sigma"],
            args["sigma_next"],
            args["g"],
        ),
    )


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
    assert parts[0].merge(parts[1]).averages() == pytest.approx(whole.averages(), rel=1e-5)


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


def variant(args, objective_name, preserving, distance=1.0, cells=None):
    """(rows with the old mean, velocities, clip range, the reference's (loss, ratio) of row b at
    velocity v).
    """
    args = dict(args, v_new=args["v_old"] + distance * (args["v_new"] - args["v_old"]))
    step = args["sigma"], args["sigma_next"], args["g"]
    plain, std = sde.sde_mean_std(jnp.asarray(args["x"]), jnp.asarray(args["v_old"]), *step)
    old_mean, _ = sde.sde_mean_std(
        jnp.asarray(args["x"]), jnp.asarray(args["v_old"]), *step, preserving
    )
    # with the same noise
    args["x_next"] = np.asarray(old_mean + args["x_next"] - plain, np.float32)
    scale = {"guard": float(std.mean()), "unscaled": 2 * float(jnp.mean(std**2))}.get(
        objective_name, 1.0
    )
    clip = {"clip_low": 0.02 * scale, "clip_high": 0.03 * scale}
    rows = dataclasses.replace(
        rows_of(args, sde.log_prob(jnp.asarray(args["x_next"]), old_mean, std)),
        old_mean=old_mean,
        cells=None if cells is None else jnp.asarray(cells, jnp.float32),
        preserving=preserving,
    )
    mean_std = reference.cps_mean_std if preserving else reference.mean_std
    wide = {k: np.asarray(v, np.float64) for k, v in args.items()}

    def of_row(b, v):
        row = wide["x"][b], wide["sigma"][b], wide["sigma_next"][b], wide["g"][b]
        (mean, std), (old, _) = (mean_std(row[0], u, *row[1:]) for u in (v, wide["v_old"][b]))
        return reference.policy_loss(
            objective_name,
            wide["x_next"][b],
            mean,
            old,
            std,
            row[2] - row[1],
            wide["advantages"][b],
            clip["clip_low"],
            clip["clip_high"],
            1e-3,
            1.0 if cells is None else cells[b],
        )

    return rows, args["v_new"], clip, of_row


def random_cells(seed=7):
    """Weights of the cells of every row, with a mean of 1; a third of them 0."""
    cells = np.random.default_rng(seed).uniform(0.5, 1.5, (SHAPE[0], 1, *SHAPE[2:]))
    cells[..., ::3] = 0
    return cells / cells.mean(axis=(1, 2, 3, 4), keepdims=True)


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("cells", [None, random_cells()], ids=["alike", "by_cell"])
@pytest.mark.parametrize("preserving", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_equal_their_formulas(name, preserving, cells):
    """Losses, ratios, and gradients against central differences, on both sides of every clip; with
    weights of the cells too, of which those of 0 get no gradient.
    """
    rows, v, clip, of_row = variant(batch(), name, preserving, cells=cells)
    config = LossConfig(**clip, kl_beta=0.0, objective=name, divergence=1e-3)
    loss, gradient, metrics = objective(rows, v, None, config)
    want, ratios = zip(*(of_row(b, v[b].astype(np.float64)) for b in range(8)))
    assert float(loss) == pytest.approx(np.mean(want), rel=1e-4, abs=1e-7)
    low, high = 1 - clip["clip_low"], 1 + clip["clip_high"]
    bounded = [x == 0 if name == "dppo" else not low <= r <= high for x, r in zip(want, ratios)]
    assert (
        metrics.averages()["clip_fraction"] == pytest.approx(np.mean(bounded), rel=1e-6)
        and 0 < np.mean(bounded) < 1
    )
    assert float(metrics.ratio_max) == pytest.approx(max(ratios), rel=1e-5)
    assert float(metrics.ratio_min) == pytest.approx(min(ratios), rel=1e-5)
    rng, expected, found = np.random.default_rng(3), [], []
    for b in range(8):
        direction = rng.normal(size=SHAPE[1:])
        ends = [of_row(b, v[b] + h * direction)[0] for h in (1e-5, -1e-5)]
        expected.append((ends[0] - ends[1]) / 2e-5 / 8)
        found.append(float(np.sum(np.asarray(gradient[b], np.float64) * direction)))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5 * np.abs(expected).max())
    assert 0 < np.count_nonzero(found) < 8  # some rows are clipped or left out
    if cells is not None:
        assert not np.any(np.asarray(gradient)[np.broadcast_to(cells, SHAPE) == 0])


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


def test_masked_rows_equal_removed_ones_by_cell():
    rows, v, clip, _ = variant(batch(), "guard", False, cells=random_cells())
    config = LossConfig(**clip, kl_beta=0.0, objective="guard")
    counted = jnp.arange(8) < 6
    masked = dataclasses.replace(
        rows, mask=counted, cells=jnp.where(counted[:, None, None, None, None], rows.cells, 1e3)
    )
    loss, gradient, metrics = objective(masked, v, None, config)
    first = jax.tree.map(lambda x: x[:6], rows)
    want, want_gradient, want_metrics = objective(first, v[:6], None, config)
    assert float(loss) == pytest.approx(float(want), rel=1e-6)  # sums in another order
    np.testing.assert_allclose(gradient[:6], want_gradient, rtol=1e-5)
    assert not np.any(gradient[6:]) and float(metrics.count) == float(want_metrics.count) == 6


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("cells", [None, random_cells()], ids=["alike", "by_cell"])
@pytest.mark.parametrize("preserving", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy_the_ratio_is_one_and_the_gradient_is_not_zero(name, preserving, cells):
    rows, v, *_ = variant(batch(), name, preserving, distance=0.0, cells=cells)
    _, gradient, metrics = objective(rows, v, None, LossConfig(kl_beta=0.0, objective=name))
    assert max(float(metrics.ratio_max) - 1, 1 - float(metrics.ratio_min)) < 2e-6
    assert all(np.abs(np.asarray(gradient)).reshape(8, -1).max(1) > 0)


def test_guard_centres_the_ratio_where_clip_is_shifted_to_the_left():
    """Over the noise: E[log ratio] is -D with the plain density, 0 with the correction."""
    args, shift = batch(), 0.05
    step = args["sigma"][:1], args["sigma_next"][:1], args["g"][:1]
    x, v = np.repeat(args["x"][:1], 2000, 0), np.repeat(args["v_old"][:1], 2000, 0)
    old_mean, std = sde.sde_mean_std(
        jnp.asarray(x), jnp.asarray(v), *(np.repeat(a, 2000) for a in step)
    )
    z = np.random.default_rng(0).normal(size=x.shape)
    x_next = jnp.asarray(old_mean + float(std[0]) * z, jnp.float32)
    ones, names = jnp.ones(2000), ("sigma", "sigma_next", "g")
    rows = Rows(
        x=jnp.asarray(x),
        x_next=x_next,
        old_log_prob=sde.log_prob(x_next, old_mean, std),
        advantages=ones,
        mask=ones > 0,
        old_mean=old_mean,
        **{n: jnp.repeat(a, 2000) for n, a in zip(names, step)},
    )
    mean = old_mean + shift * float(std[0])
    new = sde.log_prob(x_next, mean, std)
    logs = {
        name: np.log(policy_term(rows, new, mean, std, LossConfig(objective=name))[1])
        for name in ("clip", "guard")
    }
    assert np.mean(logs["clip"]) == pytest.approx(-(shift**2) / 2, rel=0.3)
    assert abs(np.mean(logs["guard"])) < 0.15 * float(std[0]) * shift**2 / 2


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


def test_the_kl_outside_of_the_boxes():
    """A mean over the cells without text, whose weights are below 1; over all of a row that has no
    text. With advantages of 0, where the policy loss has no gradient, cells with text get none.
    """
    has_text = np.random.default_rng(5).random((SHAPE[0], 1, *SHAPE[2:])) < 0.3
    has_text[0] = False
    share = np.maximum(has_text.mean(axis=(1, 2, 3, 4), keepdims=True), 1e-9)
    cells = np.where(share > 1e-6, 0.5 + 0.5 * has_text / share, 1.0)
    args = batch()
    rows, v, *_ = variant(args, "clip", False, cells=cells)
    rows = dataclasses.replace(rows, advantages=jnp.zeros(SHAPE[0]))
    config = LossConfig(kl_beta=0.5, kl_kind="velocity", kl_outside=True)

    def loss(v):
        losses, metrics = policy_gradient_terms(rows, v, args["v_ref"], config)
        return jnp.sum(losses), metrics.kl

    gradient, kl = jax.grad(loss, has_aux=True)(jnp.asarray(v))
    squares = np.square(np.asarray(v, np.float64) - args["v_ref"])
    text = np.broadcast_to(has_text, SHAPE)
    wanted = [squares[row][~text[row]].mean() for row in np.flatnonzero(rows.mask)]
    assert float(kl) == pytest.approx(sum(wanted), rel=1e-5)
    assert text.any() and not np.asarray(gradient)[text].any()
    assert np.asarray(gradient)[~text].all()
