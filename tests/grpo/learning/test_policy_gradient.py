"""The gradient of an update on stochastic steps: against the float64 reference, on policy, masked,
accumulated.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.learning.optimiser import GradientInputs, init_state, make_update
from grpo.learning.policy_gradient import make_gradient, stack_batches
from grpo.learning.policy_loss import LossConfig
from grpo.learning.step_table import StepTable
from grpo.rollout import initial_noise, make_step, rollout
from tests import reference
from tests.grpo.tiny_policy import (
    CONFIG,
    LORA,
    OPTIMISER,
    SHAPE,
    STEPS,
    TABLE,
    WINDOW,
    compiled_velocity,
    copies,
    flat_vector,
    gradient_of,
    sampled,
    setup,
    text_batch,
    update_of,
)
from wan_jax.diffusion import sde
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.diffusion.schedule import flow_sigmas


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "kl_kind", "given"), [(LORA, "flow_grpo", None), (None, "velocity", 0.5)]
)
def test_loss_and_gradient_against_float64(lora, kl_kind, given):
    """The mean loss over the counted rows of both steps, and its gradient through the model: NumPy's
    gradient of the loss with respect to the velocity, pulled back through the model's own Jacobian.
    `test_policy_loss` has all kinds of KL by themselves. given: weight of the KL that replaces the
    configuration's, as one that adapts does.
    """
    policy, trainable, frozen = setup(lora)
    _, kept = sampled(policy, trainable, frozen, range(4))
    later = moved(trainable)
    beta = 0.5 if given is None else 0.9
    config = LossConfig(clip_low=2e-3, clip_high=3e-3, kl_beta=beta, kl_kind=kl_kind)
    inputs = GradientInputs(None if given is None else jnp.asarray(given), {})
    advantages, valid = np.array([1.5, -0.7, 0.4, -2.0]), np.array([True, True, False, True])
    batch = stack_batches([kept], advantages[None], valid[None])
    grads, metrics = gradient_of(policy, config)(later, inputs, frozen, batch)

    @jax.jit
    def velocity_and_pulled_back(w, x, timestep, cotangent):
        def of(w):
            return velocity(policy.module(w, frozen), x, timestep, text_batch(4), 1.0)

        v, pull_back = jax.vjp(of, w)
        return v, pull_back(cotangent)[0]

    loss, wanted = 0.0, 0.0
    for k, i in enumerate(WINDOW):
        x, t = kept.x[k], TABLE.timestep[i]
        v_new, v_old = (velocity_and_pulled_back(w, x, t, x)[0] for w in (later, trainable))
        v_ref = compiled_velocity(policy.reference(frozen), x, t, text_batch(4), 1.0)
        values = [np.asarray(v, np.float64) for v in (x, kept.x_next[k], v_new, v_old, v_ref)]
        step = [np.full(4, float(v[i])) for v in (TABLE.sigma, TABLE.sigma_next, TABLE.g)]
        expected = reference.grpo_objective(
            *values,
            *step,
            advantages,
            clip_low=2e-3,
            clip_high=3e-3,
            kl_beta=0.5,
            kl_kind=kl_kind,
            mask=valid,
        )
        loss += expected["loss"] / 2
        cotangent = jnp.asarray(expected["gradient"] / 2, jnp.float32)
        wanted += flat_vector(velocity_and_pulled_back(later, x, t, cotangent)[1])
    averages, got = metrics.averages(), flat_vector(grads)
    np.testing.assert_allclose(averages["policy_loss"] + 0.5 * averages["kl"], loss, rtol=1e-4)
    assert np.linalg.norm(got - wanted) < 2e-3 * np.linalg.norm(wanted)
    assert float(metrics.count) == 6


def test_first_update_is_on_policy_and_moves_towards_the_better_samples():
    policy, trainable, frozen = setup()
    _, kept = sampled(policy, trainable, frozen, range(4))
    update = update_of(policy, LossConfig(kl_beta=0.0))
    batch = stack_batches([kept], np.array([[2.0, -1.0, 0.5, -1.5]]), np.ones((1, 4), bool))
    before = copies(trainable)
    state = init_state(copies(trainable), OPTIMISER)
    state, first, _ = update(state, frozen, batch)
    assert (
        abs(first.averages()["ratio_max"] - 1) < 1e-6
        and abs(first.averages()["ratio_min"] - 1) < 1e-6
    )
    assert first.averages()["clip_fraction"] == 0 and float(first.count) == 8
    _, second, _ = update(state, frozen, batch)
    assert update._cache_size() == 1  # compiled once
    assert second.averages()["policy_loss"] < first.averages()["policy_loss"]
    assert (
        max(abs(second.averages()["ratio_max"] - 1), abs(second.averages()["ratio_min"] - 1)) > 1e-5
    )
    # the caller's arrays are his
    assert any(np.abs(before[k] - v).max() > 0 for k, v in trainable.items()) is False


@pytest.mark.slow
def test_first_update_in_bfloat16_is_on_policy():
    """Rollout and update round alike, though XLA fuses them differently: 8e-6 seen, 4e-4 with
    excess precision.
    """
    config = dataclasses.replace(CONFIG, num_attention_heads=4, attention_head_dim=64, ffn_dim=768)
    policy, trainable, frozen = setup(dtype=jnp.bfloat16, remat="block", config=config)
    _, kept = sampled(policy, trainable, frozen, range(9), guidance=4.5, shape=(9, 8, 16, 4))
    update = update_of(policy, LossConfig(kl_beta=0.0), 4.5)
    batch = stack_batches([kept], np.linspace(-1, 1, 9)[None], np.ones((1, 9), bool))
    _, metrics, _ = update(init_state(copies(trainable), OPTIMISER), frozen, batch)
    values = metrics.averages()
    assert max(values["ratio_max"] - 1, 1 - values["ratio_min"]) < 5e-5, values


@pytest.mark.slow
def test_micro_batches_add_up_and_masked_equals_removed():
    policy, trainable, frozen = setup()
    update = update_of(policy, LossConfig(kl_beta=0.01))
    text = text_batch(4)
    part = [
        TextBatch(text.embeddings[s], text.negative, text.padding)
        for s in (slice(0, 2), slice(2, 4))
    ]
    _, whole = sampled(policy, trainable, frozen, range(4), text=text)
    halves = [
        sampled(policy, trainable, frozen, r, text=t)[1]
        for r, t in (((0, 1), part[0]), ((2, 3), part[1]))
    ]
    advantages, ones = np.array([1.0, -1.0, 0.5, -0.5]), np.ones(4, bool)

    def weights(trajectories, a, v):
        batch = stack_batches(trajectories, a, v)
        return flat_vector(
            update(init_state(copies(trainable), OPTIMISER), frozen, batch)[0].trainable
        )

    one = weights([whole], advantages[None], ones[None])
    np.testing.assert_allclose(
        weights(halves, advantages.reshape(2, 2), ones.reshape(2, 2)), one, atol=2e-5
    )
    masked = weights([whole], advantages[None], np.array([[True, True, False, False]]))
    # the mean of them twice
    removed = weights([halves[0]] * 2, np.tile(advantages[:2], (2, 1)), ones.reshape(2, 2))
    np.testing.assert_allclose(masked, removed, atol=2e-5)
    assert np.abs(masked - one).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "objective_name"), [("dance", "guard"), ("cps", "dppo"), ("cps", "unscaled")]
)
def test_every_form_and_objective_is_on_policy_at_first(kind, objective_name):
    """Rollout and update agree on the step's mean and log-prob, the mean at rollout travels with
    the trajectory.
    """
    config = LossConfig(kl_beta=0.0, objective=objective_name)
    policy, trainable, frozen = setup()
    table = StepTable.make(flow_sigmas(STEPS, 3.0), sde.SDEConfig(kind), credit="longcat")
    step = make_step(policy, table, 1.0, keep_mean=config.needs_old_mean)
    samples, text = jnp.arange(4, dtype=jnp.int32), text_batch(4)
    x = initial_noise(jax.random.key(5), samples, SHAPE)
    _, kept = rollout(
        step,
        trainable,
        frozen,
        x,
        text,
        key=jax.random.key(6),
        samples=samples,
        steps=range(4),
        window=WINDOW,
    )
    assert (kept.mean is not None) == config.needs_old_mean
    update = make_update(make_gradient(policy, table, 1.0, config), policy, OPTIMISER)
    batch = stack_batches([kept], np.array([[2.0, -1.0, 0.5, -1.5]]), np.ones((1, 4), bool))
    _, metrics, norms = update(init_state(copies(trainable), OPTIMISER), frozen, batch)
    values = metrics.averages()
    assert max(values["ratio_max"] - 1, 1 - values["ratio_min"]) < 2e-6, values
    assert float(norms["grad_norm"]) > 0


@pytest.mark.slow
def test_guidance_is_distilled_into_the_model_without_it():
    """The loss is the distance to the reference's v_u + 4 (v_c - v_u), and updates without a reward
    make it smaller.
    """
    policy, trainable, frozen = setup()
    _, kept = sampled(policy, trainable, frozen, range(4))
    config = LossConfig(kl_beta=0.0, distill_weight=1.0, distill_guidance=4.0)
    update, state = (
        update_of(policy, config),
        init_state(copies(trainable), OPTIMISER),
    )
    text, wanted = text_batch(4), []
    negative = TextBatch(
        jnp.broadcast_to(text.negative, text.embeddings.shape), text.negative, text.padding
    )
    for k, i in enumerate(WINDOW):
        v, v_c, v_u = (
            np.asarray(compiled_velocity(m, kept.x[k], TABLE.timestep[i], about, 1.0), np.float64)
            for m, about in (
                (policy.module(trainable, frozen), text),
                (policy.reference(frozen), text),
                (policy.reference(frozen), negative),
            )
        )
        wanted.append(np.mean((v - (v_u + 4 * (v_c - v_u))) ** 2))
    batch, found = stack_batches([kept], np.zeros((1, 4)), np.ones((1, 4), bool)), []
    for _ in range(4):
        state, metrics, _ = update(state, frozen, batch)
        found.append(metrics.averages()["distillation"])
    assert found[0] == pytest.approx(np.mean(wanted), rel=1e-3)
    assert found[0] > found[1] > found[2] > found[3]


@jax.jit
def moved(trainable):
    """Return the weights after a step that moves the ratio past the clip range."""
    return jax.tree.map(
        lambda p: p + 0.01 * jax.random.normal(jax.random.key(9), p.shape), trainable
    )
