"""Sampling an epoch: which weights sample, what steps count, and videos that are blanked."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from grpo.rollout import Trajectory
from grpo.sampling import averaged_weights, importance_of, sampling_weights, zero_nonfinite
from grpo.scoring.advantages import LEAST_PROGRESS, step_importance
from tests import reference
from tests.grpo.epoch_inputs import rollout_of, session_of, states_of
from tests.grpo.specs import devices_mesh, tiny_spec
from wan_jax.distributed import sharding as sharding_lib

TWO_EXPERTS = {"train.experts": ("transformer",), "sample.shift": 12.0}


def test_the_behaviour_policy_samples_and_the_average_is_judged():
    """Trained experts; NFT samples by its old policy."""
    for method, sampler in (("grpo", "trainable"), ("nft", "old"), ("dpo", "trainable")):
        spec = tiny_spec(**{"train.method": method, "train.timesteps": 2})
        session, _ = session_of(spec)
        states = states_of(spec)
        state = states["transformer"]
        weights, frozen = sampling_weights(session, states, 0)
        wanted = state.lagged["old"] if sampler == "old" else state.trainable
        assert weights is wanted and frozen == "frozen 0"
        assert averaged_weights(session, states, 0) == (state.ema, "frozen 0")


def test_an_expert_that_is_not_trained_stays_as_it_was():
    spec = tiny_spec("wan2.2-a14b", **TWO_EXPERTS)
    start = {name: f"start of {name}" for name in spec.preset.experts}
    session, _ = session_of(spec, start=start, to_device=lambda arrays: ("fetched", arrays))
    states = states_of(spec)
    assert list(states) == ["transformer"]
    for weights in (sampling_weights, averaged_weights):
        assert weights(session, states, 1) == ("start of transformer_2", "frozen 1")
    # an average that is kept in host memory is fetched
    average = states["transformer"].ema
    assert averaged_weights(session, states, 0) == (("fetched", average), "frozen 0")


def test_a_step_counts_by_what_it_brought_the_video_nearer_to_its_end():
    """Two experts with two and one steps, three batches of four videos: against the formula, video
    by video.
    """
    rng, shape = np.random.default_rng(0), (2, 3, 4, 5)
    final = rng.standard_normal((3, 4, *shape))
    before, after = (
        {
            name: final + scale * rng.standard_normal((3, k, 4, *shape)).swapaxes(0, 1)
            for name, k in (("transformer", 2), ("transformer_2", 1))
        }
        for scale in (2.0, 1.5)
    )
    trajectories = {
        name: [
            types.SimpleNamespace(
                x=tuple(np.float32(before[name][:, b])), x_next=tuple(np.float32(after[name][:, b]))
            )
            for b in range(3)
        ]
        for name in before
    }
    sharding = sharding_lib.batch_sharding(devices_mesh(1))
    found = importance_of(trajectories, [np.float32(x) for x in final], sharding)
    assert [(name, w.shape) for name, w in found.items()] == [
        ("transformer", (2, 12)),
        ("transformer_2", (1, 12)),
    ]
    for video in range(12):
        b, row = divmod(video, 4)
        steps = [
            (before[name][k, b, row], after[name][k, b, row])
            for name in found
            for k in range(len(found[name]))
        ]
        wanted = reference.step_importance(steps, final[b, row], LEAST_PROGRESS)
        ours = np.concatenate([*found.values()])[:, video]
        np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-4)
    assert np.concatenate([*found.values()]).std(0).min() > 0.01


def test_steps_that_bring_nothing_count_alike():
    weights = step_importance(
        np.array([[-0.1, 0.2, np.nan], [-0.3, 0.1, np.nan], [0.0, -0.5, np.nan]])
    )
    np.testing.assert_allclose(weights[:, [0, 2]], 1.0)
    np.testing.assert_allclose(weights[:, 1], [2, 1, 0], atol=1e-4)
    assert weights.dtype == np.float32 and (weights > 0).all()


def test_masked_rows_are_blanked_everywhere():
    """In trajectories of two batches and in finished latents."""
    finite = np.array([True, False, True, True, True, False]).reshape(2, 3)
    latents = [
        jnp.where(jnp.asarray(part).reshape(3, 1, 1, 1, 1), 1.0, jnp.nan)
        * jnp.ones((3, 1, 2, 2, 4))
        for part in finite
    ]
    trajectories = [
        Trajectory(
            (x, x),
            (x, x),
            jnp.stack([x[:, 0, 0, 0, 0]] * 2),
            jnp.arange(2),
            "text",
            (2 * x, 3 * x),
            jnp.zeros(2),
        )
        for x in latents
    ]
    rollout = dataclasses.replace(
        rollout_of(tiny_spec()), finished=latents, trajectories={"transformer": trajectories}
    )
    assert zero_nonfinite(rollout, np.ones(6, bool), devices_mesh(1)) is rollout
    batch = zero_nonfinite(rollout, finite.ravel(), devices_mesh(1))
    for t, x, kept in zip(batch.trajectories["transformer"], batch.finished, finite):
        np.testing.assert_array_equal(x[:, 0, 0, 0, 0], kept.astype(float))
        for name in ("x", "x_next", "log_prob"):
            rows = np.reshape(getattr(t, name), (2, 3, -1))[..., 0]
            np.testing.assert_array_equal(rows, [kept.astype(float)] * 2)
        means = np.reshape(t.mean, (2, 3, -1))[..., 0]
        np.testing.assert_array_equal(means, [2.0 * kept, 3.0 * kept])
        assert t.text == "text" and t.x[1] is t.x_next[0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(batch.finished))
    # a method that keeps only one of the two
    for changes in ({"finished": []}, {"trajectories": {}}):
        one = zero_nonfinite(
            dataclasses.replace(rollout, **changes), finite.ravel(), devices_mesh(1)
        )
        assert len(one.finished or one.trajectories["transformer"]) == 2
