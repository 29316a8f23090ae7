"""DGPO: the loss of groups by its formula, its gradient, and what the videos of a group share."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_ocr
from grpo.learning.velocity_loss import Rows, mean_square
from grpo.methods.dgpo import DGPO
from grpo.settings import parse
from tests.grpo.epoch_inputs import rollout_of
from tests.grpo.specs import tiny_spec
from wan_jax.errors import UserError

ADVANTAGES = np.array([2.0, -1.5, 0.5, -0.5, 1.0, -1.0], np.float32)
GROUPS = np.array([0, 0, 0, 1, 1, 1], np.int32)
VALID = np.array([True, True, True, True, False, True])


def make_rows(seed=0) -> Rows:
    """Two groups of three videos, one of which does not count; on policy where "old" is v."""
    rng = np.random.default_rng(seed)
    target, v, reference = rng.standard_normal((3, 6, 1, 3, 3, 4)).astype(np.float32)
    old = v + 1e-3 * rng.standard_normal(v.shape).astype(np.float32)
    return with_velocity(v, old, reference, target)


def with_velocity(v, old, reference, target) -> Rows:
    return Rows(
        x=None,
        x0=None,
        sigma=None,
        v=v,
        v_lagged={"old": old},
        v_reference=reference,
        error=mean_square(v - target),
        target=target,
        weight=jnp.asarray(ADVANTAGES),
        video=jnp.asarray(GROUPS),
        valid=jnp.asarray(VALID),
    )


def expected(rows: Rows, beta: float, clip: float):
    """The losses of the rows, their weights, and which are clipped, in float64 and row by row."""
    d, d_old, d_ref = (
        np.mean((np.asarray(u, np.float64) - rows.target) ** 2, axis=(1, 2, 3, 4))
        for u in (rows.v, rows.v_lagged["old"], rows.v_reference)
    )
    losses, weights, clipped = [], [], []
    for i, group in enumerate(GROUPS):
        members = [j for j in range(6) if GROUPS[j] == group and VALID[j]]
        total = sum(ADVANTAGES[j] * (d[j] - d_ref[j]) for j in members)
        weights.append(1 / (1 + np.exp(-beta / len(members) * total)))
        losses.append(weights[-1] * ADVANTAGES[i] * d[i])
        ratio = np.exp(d_old[i] - d[i])
        clipped.append(ratio > 1 + clip if ADVANTAGES[i] > 0 else ratio < 1 - clip)
    return np.array(losses), np.array(weights), np.array(clipped)


@pytest.mark.parametrize(("beta", "clip"), [(100.0, 1e-3), (3.0, 1e-4), (0.5, 1.0)])
def test_the_loss_is_that_of_the_formula(beta, clip):
    rows = make_rows()
    loss, logged = DGPO(beta=beta, clip=clip).loss(rows)
    losses, weights, clipped = expected(rows, beta, clip)
    # errors are fp32 means of 36 squares of size 1 to 4, and beta multiplies their rounding
    tolerance = 1e-6 * max(beta, 1)
    np.testing.assert_allclose(loss, losses, rtol=tolerance)
    np.testing.assert_allclose(logged["group_weight"], weights, rtol=tolerance)
    assert np.asarray(logged["clip_fraction"]).tolist() == clipped.tolist()
    unclipped, logged = dataclasses.replace(DGPO(beta=beta), clip=float("inf")).loss(rows)
    np.testing.assert_array_equal(unclipped, loss)
    assert not np.asarray(logged["clip_fraction"]).any()


def test_a_group_learns_less_once_it_has_learnt():
    """Better videos have a smaller error than under the reference, worse ones a larger one."""
    rows = make_rows()
    sides = np.where(ADVANTAGES > 0, 0.5, 1.5)[:, None, None, None, None]
    learnt = rows.target + sides * (rows.v_reference - rows.target)
    unlearnt = rows.target + (2 - sides) * (rows.v_reference - rows.target)
    weights = [
        DGPO(beta=1.0).loss(with_velocity(v, v, rows.v_reference, rows.target))[1]["group_weight"]
        for v in (learnt, rows.v_reference, unlearnt)
    ]
    assert (weights[0] < 0.45).all() and (weights[2] > 0.55).all()
    np.testing.assert_allclose(weights[1], 0.5)


def test_the_gradient_holds_the_weight_and_clipped_videos():
    rows, method = make_rows(), DGPO(beta=2.0, clip=2e-4)
    _, weights, clipped = expected(rows, 2.0, 2e-4)
    assert 0 < clipped.sum() < 6

    def total(v):
        given = with_velocity(v, rows.v_lagged["old"], rows.v_reference, rows.target)
        return method.loss(given)[0].sum()

    factor = np.where(clipped, 0, weights * ADVANTAGES)[:, None, None, None, None]
    wanted = factor * 2 * (rows.v - rows.target) / rows.v[0].size
    np.testing.assert_allclose(jax.grad(total)(rows.v), wanted, rtol=1e-5, atol=1e-8)


def test_the_clip_is_one_sided_and_of_the_weighted_errors():
    """Log-ratios of half and of one and a half of the range, to both sides, for both signs of A. With
    weights of the cells that hide half of the cells, where the errors change the other way.
    """
    clip, advantages = 0.01, np.array([1, 1, 1, 1, -1, -1, -1, -1, 0], np.float32)
    log_ratio = clip * np.array([0.5, 1.5, -0.5, -1.5, 0.5, 1.5, -0.5, -1.5, -1.5])
    clipped = np.array([0, 1, 0, 0, 0, 0, 0, 1, 0], bool)
    side = np.array([1.0, -1.0]).reshape(1, 1, 1, 2, 1)  # cells that count, and others
    v, target = np.ones((9, 1, 2, 2, 3), np.float32), np.zeros((9, 1, 2, 2, 3), np.float32)
    old = np.sqrt(1 + side * log_ratio.reshape(-1, 1, 1, 1, 1)).astype(np.float32) * v
    cells = np.broadcast_to(1 + side, (9, 1, 2, 2, 1)).astype(np.float32)

    def rows(v):
        return dataclasses.replace(
            with_velocity(v, old, old, target),
            error=mean_square(v - target, cells),
            weight=jnp.asarray(advantages),
            cells=cells,
            video=jnp.arange(9),
            valid=jnp.ones(9, bool),
        )

    method = DGPO(clip=clip)
    assert np.asarray(method.loss(rows(v))[1]["clip_fraction"]).tolist() == clipped.tolist()
    gradient = jax.grad(lambda v: method.loss(rows(v))[0].sum())(jnp.asarray(v))
    moved = np.abs(gradient).max(axis=(1, 2, 3, 4)) > 0
    assert moved.tolist() == (~clipped & (advantages != 0)).tolist()


def test_a_masked_video_equals_a_removed_one():
    rows, left = make_rows(), np.flatnonzero(VALID)
    arrays = (rows.v, rows.v_lagged["old"], rows.v_reference, rows.target)
    v, old, reference, target = (x[left] for x in arrays)
    removed = dataclasses.replace(
        rows,
        v=v,
        v_lagged={"old": old},
        v_reference=reference,
        error=mean_square(v - target),
        target=target,
        weight=rows.weight[left],
        video=rows.video[left],
        valid=rows.valid[left],
    )
    (masked, _), (alone, _) = DGPO(beta=2.0).loss(rows), DGPO(beta=2.0).loss(removed)
    np.testing.assert_allclose(masked[left], alone, rtol=1e-6)


def test_the_videos_of_a_group_share_noise_and_level():
    """And the levels are of the first 60 % of the steps, all of which are trained in the long run. Four
    groups of two, in batches of four.
    """
    values = {"train.method": "dgpo", "train.timesteps": 2, "sample.steps": 10}
    spec = tiny_spec(**values, **{"sample.groups": 4, "sample.group_size": 2})
    method, rollout = spec.method, rollout_of(spec)
    seen, groups_differ = set(), []
    for epoch in range(20):
        levels = method.noise_levels(spec, epoch, 0)
        by_group = levels.sigma.reshape(4, 2, 2)
        np.testing.assert_array_equal(by_group, by_group[:, :1].repeat(2, 1))
        groups_differ.append((by_group[:-1] != by_group[1:]).any((1, 2)))
        seen |= {*levels.sigma.ravel().tolist()}
    assert seen == {*spec.schedule.sigmas[:6].tolist()} and np.any(groups_differ, 0).all()
    credit = types.SimpleNamespace(
        advantages=np.linspace(-1, 1, 8),
        spread=np.ones(8, bool),
        kl_gate=None,
        cell_weights=lambda spec, frames: None,
    )
    videos, groups = [], []
    for numbers, batch, kept in method.batches(spec, 1, 0, rollout, credit, 40):
        videos += numbers.tolist()
        groups += np.asarray(batch.video).ravel().tolist()
        assert kept == {"old": pytest.approx(0.041 + 0.001 * (len(videos) > 4))}
    assert videos == [*range(8)] and groups == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_the_copy_keeps():
    method = DGPO()
    assert method.lagged == ("old",) and method.sampler is None and method.needs_reference
    assert method.share_kept(1, True) == {"old": 0.001}
    assert method.share_kept(10_000, False) == {"old": 0.3}
    free = DGPO(clip=float("inf"))
    assert free.lagged == () and free.share_kept(1, True) == {}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"sample.batch_size": 4}, "batch_size=4 .*group_size=8"),
        ({"sample.batch_size": 12, "sample.groups": 9}, "batch_size=12 .*group_size=8"),
        (
            {"sample.groups": 3, "sample.batch_size": 8, "train.updates_per_epoch": 2},
            "updates_per_epoch=2 .*sample.groups=3",
        ),
        ({"train.dgpo_beta": 0.0}, "train.dgpo_beta=0.0"),
        ({"train.dgpo_clip": -1.0}, "train.dgpo_clip=-1.0"),
    ],
    ids=str,
)
def test_settings_that_divide_groups_are_refused(values, found):
    config = tiny_ocr.get_config()
    config.train.method = "dgpo"
    parse.recipe_from_config(config)  # the recipe itself is fine
    config.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=found):
        parse.recipe_from_config(config)
