"""What a run is told of its own numbers, and what its steps count."""

import types

import jax
import numpy as np
import pytest

from configs.defaults import defaults
from grpo.advantages import LEAST_PROGRESS, step_importance
from grpo.learner import Learner, clip_warning, summary
from tests import reference
from wan_jax.distributed import mesh as mesh_lib


@pytest.mark.parametrize(
    "error, clip, objective, warned",
    [
        (6e-4, 1e-5, "clip", True),
        (6e-4, 1e-3, "clip", False),
        (3e-6, 2e-6, "guard", True),
        (1.0, 1e-5, "dppo", False),
    ],
)
def test_a_clip_range_below_rounding_is_told(error, clip, objective, warned):
    train = defaults().train
    train.clip_low, train.objective = clip, objective
    warning = clip_warning({"ratio_max_error": error}, train)
    assert (warning is not None) == warned
    assert not warned or (f"{error:.1e}" in warning and f"{clip:g}" in warning)


def test_methods_without_a_ratio_are_not_warned():
    assert clip_warning({}, defaults().train) is None


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
    kept = {
        name: [
            types.SimpleNamespace(x=before[name][:, b], x_next=after[name][:, b]) for b in range(3)
        ]
        for name in before
    }
    learner = types.SimpleNamespace(
        s=types.SimpleNamespace(importance=True),
        states=dict.fromkeys(kept),
        sharded=mesh_lib.batch_sharding(mesh_lib.make_mesh(devices=jax.devices()[:1])),
    )
    kept = jax.tree.map(
        lambda t: types.SimpleNamespace(x=np.float32(t.x), x_next=np.float32(t.x_next)), kept
    )
    found = Learner.importance(learner, kept, [np.float32(x) for x in final])
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
        np.testing.assert_allclose(
            np.concatenate([*found.values()])[:, video], wanted, rtol=1e-3, atol=1e-4
        )
    assert np.concatenate([*found.values()]).std(0).min() > 0.01
    learner.s.importance = False
    assert Learner.importance(learner, kept, []) == {}


def test_steps_that_bring_nothing_count_alike():
    weights = step_importance(
        np.array([[-0.1, 0.2, np.nan], [-0.3, 0.1, np.nan], [0.0, -0.5, np.nan]])
    )
    np.testing.assert_allclose(weights[:, [0, 2]], 1.0)
    np.testing.assert_allclose(weights[:, 1], [2, 1, 0], atol=1e-4)
    assert weights.dtype == np.float32 and (weights > 0).all()


def test_an_epoch_keeps_the_mean_and_the_extremes_of_its_updates():
    """The joint record of two experts has the keys of one expert's."""
    first = {
        "kl": 0.1,
        "grad_norm": 3.0,
        "ratio_min": 0.9,
        "ratio_max": 1.1,
        "ratio_max_error": 1e-7,
    }
    second = {"kl": 0.3, "grad_norm": 1.0, "ratio_min": 0.8, "ratio_max": 1.05}
    record = summary([first, second])
    assert record == {
        "updates": 2,
        "kl": pytest.approx(0.2),
        "kl_min": 0.1,
        "kl_max": 0.3,
        "grad_norm": 2.0,
        "grad_norm_min": 1.0,
        "grad_norm_max": 3.0,
        "ratio_min": 0.8,
        "ratio_max": 1.1,
        "ratio_max_error": 1e-7,
    }
    assert (
        summary([first]).keys() == record.keys()
        and summary([first])["kl"] == summary([first])["kl_max"] == 0.1
    )
    assert summary([]) == {"updates": 0}
