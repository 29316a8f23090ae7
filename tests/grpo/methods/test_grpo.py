"""Flow-GRPO: the average that its KL is to, its checks and its warning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.defaults import defaults
from grpo.learning import train_state
from grpo.learning.optimiser import init_state, make_update
from grpo.learning.policy_gradient import stack_batches
from grpo.learning.policy_loss import LossConfig
from grpo.methods.grpo import GRPO
from grpo.settings.budget import Spent
from tests.grpo.specs import devices_mesh
from tests.grpo.tiny_policy import (
    OPTIMISER,
    TABLE,
    WINDOW,
    compiled_velocity,
    copies,
    flat_vector,
    sampled,
    setup,
    text_batch,
)
from wan_jax.errors import UserError
from wan_jax.storage.checkpoint import Checkpoints


@pytest.mark.slow
def test_the_kl_is_to_an_average_of_the_trained_weights_and_its_weight_adapts(tmp_path):
    """Three updates, and a checkpoint that holds it all.

    The KL is 0 while nothing is trained, then the distance to the average, which follows by its
    formula. The weight follows the KL that the updates report.
    """
    method = GRPO(
        policy_loss=LossConfig(
            kl_beta=0.1,
            kl_kind="velocity",
            kl_target=0.02,
            kl_horizon=3.0,
            kl_range=(1e-3, 0.2),
            reference_decay=0.75,
        )
    )
    policy, trainable, frozen = setup()
    _, kept = sampled(policy, trainable, frozen, range(4))
    batch = stack_batches([kept], np.array([[2.0, -1.0, 0.5, -1.5]]), np.ones((1, 4), bool))
    options = {"adaptive_kl": method.adaptive_kl, "lagged": method.lagged}
    gradient = method.make_gradient(policy, TABLE, (1.0, method.policy_loss))
    update = make_update(gradient, policy, OPTIMISER, devices_mesh(1), **options)
    state = init_state(copies(trainable), OPTIMISER, **options)
    control = method.adaptive_kl.init()
    for number in range(3):
        new, average = copies(state.trainable), copies(state.lagged["old"])
        share_kept = method.share_kept(number + 1, False)
        assert share_kept == {"old": 0.75}
        state, metrics, norms = update(state, frozen, batch, share_kept)
        kl = metrics.averages()["kl"]
        v, v_ref = (
            np.stack(
                [
                    compiled_velocity(
                        policy.module(weights, frozen), x, TABLE.timestep[i], text_batch(4), 1.0
                    )
                    for x, i in zip(kept.x, WINDOW)
                ]
            )
            for weights in (new, average)
        )
        assert kl == pytest.approx(np.mean((v - v_ref) ** 2), rel=1e-3, abs=1e-9)
        assert (kl > 1e-6) == (number > 0)
        np.testing.assert_allclose(
            flat_vector(state.lagged["old"]),
            0.75 * flat_vector(average) + 0.25 * flat_vector(state.trainable),
            atol=1e-6,
        )
        assert float(norms["kl_weight"]) == pytest.approx(float(control.weight), rel=1e-5)
        control = method.adaptive_kl.step(control, jnp.asarray(kl), jnp.asarray(number == 0))
        assert float(state.kl.weight) == pytest.approx(float(control.weight), rel=1e-4)
        assert 1e-3 < float(state.kl.weight) < 0.2
    assert update._cache_size() == 1  # compiled once
    checkpoints, states = Checkpoints(tmp_path), {"transformer": state}
    train_state.save(checkpoints, 1, states, defaults().to_dict(), None, Spent())
    fresh = {"transformer": init_state(copies(trainable), OPTIMISER, **options)}
    restored = train_state.restore(checkpoints, 1, fresh)["transformer"]
    jax.tree.map(np.testing.assert_array_equal, restored, state)


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
    method = GRPO(policy_loss=LossConfig(clip_low=clip, objective=objective))
    warning = method.warning({"ratio_max_error": error})
    assert (warning is not None) == warned
    assert not warned or (f"{error:.1e}" in warning and f"{clip:g}" in warning)


@pytest.mark.parametrize(
    ("backend", "products", "dtype", "given", "bound"),
    [
        ("cpu", None, "float32", None, 1e-4),
        ("gpu", None, "float32", None, 2e-3),  # TF32
        ("gpu", "float32", "float32", None, 1e-4),
        ("gpu", "tensorfloat32", "float32", None, 2e-3),
        ("cpu", None, "bfloat16", None, 2e-3),
        ("gpu", None, "bfloat16", 1e-5, 1e-5),
    ],
)
def test_the_bound_of_the_ratio_allows_for_rounding(
    monkeypatch, backend, products, dtype, given, bound
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with jax.default_matmul_precision(products):
        assert GRPO(ratio_tolerance=given, dtype=dtype).ratio_bound == bound


def test_a_first_update_off_policy_is_refused():
    method = GRPO(ratio_tolerance=1e-3)
    assert method.check_first({"ratio_min": 1 - 5e-4, "ratio_max": 1 + 2e-4}, 3) == {
        "ratio_max_error": pytest.approx(5e-4)
    }
    for bad in ({"ratio_min": 0.99, "ratio_max": 1.0}, {"ratio_min": 1.0, "ratio_max": 1.01}):
        with pytest.raises(UserError, match=r"epoch 3: .*1\.00e-02.*ratio_tolerance=0\.001"):
            method.check_first(bad, 3)
