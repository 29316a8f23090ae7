"""The objectives of the policy's loss, also with weights of the cells: values and gradients against
their formulas.
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
    policy_gradient_terms,
    policy_term,
)
from tests import reference
from tests.grpo.policy_rows import SHAPE, batch, objective, rows_of
from wan_jax.diffusion import sde


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


@pytest.mark.parametrize("kind", KL_KINDS)
def test_the_kl_outside_of_the_boxes(kind):
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
    config = LossConfig(kl_beta=0.5, kl_kind=kind, kl_outside=True)

    def loss(v):
        losses, metrics = policy_gradient_terms(rows, v, args["v_ref"], config)
        return jnp.sum(losses), metrics.kl

    gradient, kl = jax.grad(loss, has_aux=True)(jnp.asarray(v))
    text, wanted, everywhere = np.broadcast_to(has_text, SHAPE), [], []
    wide = {key: np.asarray(value, np.float64) for key, value in (args | {"v_new": v}).items()}
    for row in np.flatnonzero(rows.mask):
        step = [wide[key][row] for key in ("sigma", "sigma_next", "g")]
        both = wide["v_new"][row], wide["v_ref"][row]
        (mean, std), (mean_ref, _) = (
            reference.mean_std(wide["x"][row], each, *step) for each in both
        )
        arrays = mean, mean_ref, *both
        free = [array[~text[row]] for array in arrays]
        wanted.append(reference.kl(kind, *free, std, step[2]))
        everywhere.append(reference.kl(kind, *arrays, std, step[2]))
    assert float(kl) == pytest.approx(sum(wanted), rel=1e-5)
    assert text.any() and not np.asarray(gradient)[text].any()
    assert np.asarray(gradient)[~text].all()
    # without the setting the weights of the cells are those of the policy loss alone
    config = dataclasses.replace(config, kl_outside=False)
    _, metrics = policy_gradient_terms(rows, jnp.asarray(v), args["v_ref"], config)
    assert float(metrics.kl) == pytest.approx(sum(everywhere), rel=1e-5)
