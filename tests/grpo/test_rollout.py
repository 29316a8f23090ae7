"""The rollout against the float64 reference: what it keeps of its steps, shared prefixes, steps of
their own, the solver between stochastic steps, and the weights of steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.learning.optimiser import GradientInputs
from grpo.learning.policy_gradient import make_gradient, stack_batches
from grpo.learning.policy_loss import LossConfig
from grpo.learning.step_table import StepTable
from grpo.rollout import (
    branch,
    group_leaders,
    initial_noise,
    make_step,
    prefix,
    rollout,
    rollout_batches,
    sample_noise,
)
from tests import reference
from tests.grpo.specs import devices_mesh
from tests.grpo.tiny_policy import (
    SHAPE,
    STEPS,
    TABLE,
    WINDOW,
    compiled_velocity,
    flat_vector,
    gradient_of,
    sampled,
    setup,
    step_of,
    text_batch,
)
from wan_jax.diffusion import sde
from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.distributed import sharding as sharding_lib


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_rollout_keeps_what_the_formulas_say(guidance):
    policy, trainable, frozen = setup()
    final, kept = sampled(policy, trainable, frozen, range(3), guidance)
    module = policy.module(trainable, frozen)
    assert np.shape(kept.x) == (2, 3, *SHAPE) and kept.log_prob.shape == (2, 3)
    for row, i in enumerate(WINDOW):
        t, s, s_next, g = (
            np.float64(v)
            for v in (TABLE.timestep[i], TABLE.sigma[i], TABLE.sigma_next[i], TABLE.g[i])
        )
        x, x_next = (np.asarray(v[row], np.float64) for v in (kept.x, kept.x_next))
        v = np.asarray(
            compiled_velocity(module, kept.x[row], t, text_batch(3), guidance), np.float64
        )
        mean = x + v * (s_next - s) + g**2 / (2 * s) * (x + (1 - s) * v) * (s_next - s)
        std = g * np.sqrt(s - s_next)
        z = np.asarray(sample_noise(jax.random.key(3), jnp.arange(3), i, SHAPE), np.float64)
        np.testing.assert_allclose(x_next, mean + std * z, atol=2e-5)
        density = (
            -((x_next - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)
        ).mean((1, 2, 3, 4))
        np.testing.assert_allclose(kept.log_prob[row], density, atol=2e-5)
    # between and after the kept steps: ODE
    x = kept.x_next[0]
    v = compiled_velocity(module, x, TABLE.timestep[1], text_batch(3), guidance)
    np.testing.assert_allclose(kept.x[1], x + v * (TABLE.sigma_next[1] - TABLE.sigma[1]), atol=2e-5)
    assert np.isfinite(final).all()


def test_a_sample_depends_on_its_number_not_on_its_batch():
    policy, trainable, frozen = setup()
    text = text_batch(1)
    wide = TextBatch(jnp.tile(text.embeddings, (3, 1, 1)), text.negative, text.padding)
    three, _ = sampled(policy, trainable, frozen, [4, 5, 6], text=wide)
    one, _ = sampled(policy, trainable, frozen, [5], text=text)
    np.testing.assert_allclose(three[1:2], one, atol=1e-5)
    assert np.abs(three[0] - three[1]).max() > 0.1


@pytest.mark.slow
def test_branches_of_a_shared_prefix_are_the_rollouts_from_one_noise():
    """Three groups of two: the prefix of each computed once, and the same as when every video goes
    all the way.
    """
    policy, trainable, frozen = setup()
    mesh = devices_mesh(1)
    step, key, text = step_of(policy), jax.random.key(3), text_batch(3)
    part, window = Segment(0, range(STEPS)), np.array([2])
    shared = prefix(part, window)
    leaders = group_leaders(3, 2, 3)
    np.testing.assert_array_equal(leaders, [[0, 2, 4]])
    trunk, _ = rollout(
        step,
        trainable,
        frozen,
        initial_noise(key, leaders[0], SHAPE),
        text,
        key=key,
        samples=leaders[0],
        steps=shared,
        window=np.arange(0),
    )
    of = np.array([0, 0, 1, 1, 2, 2])
    wide = TextBatch(text.embeddings[of], text.negative, text.padding)
    start = branch([trunk], jnp.asarray(of), sharding_lib.batch_sharding(mesh))
    common = dict(key=key, samples=[jnp.arange(6)], parts=[part], windows=[window])
    arrays = lambda expert: (trainable, frozen)  # noqa: E731
    ((_, _, x, kept),) = rollout_batches(
        [step], arrays, [start], [wide], **common, done=len(shared)
    )
    noise = initial_noise(key, jnp.asarray(leaders[0][of]), SHAPE)
    ((_, _, y, whole),) = rollout_batches([step], arrays, [noise], [wide], **common)
    np.testing.assert_allclose(x, y, atol=2e-5)
    np.testing.assert_allclose(kept.x, whole.x, atol=2e-5)
    for group in (0, 2, 4):
        np.testing.assert_array_equal(kept.x[0][group], kept.x[0][group + 1])
        assert np.abs(x[group] - x[group + 1]).max() > 0.1
    assert prefix(part, np.arange(0)) == range(STEPS) and not prefix(part, np.array([0, 3]))
    np.testing.assert_array_equal(group_leaders(3, 4, 2), [[0, 4], [8, 0]])


@pytest.mark.slow
def test_every_row_its_own_stochastic_step():
    """Rows at steps 3, 0 and 1 of a segment that ends before 3: what they leave behind is what the
    rollouts with one window for all do, their gradient the sum of those rows' own, and the row that
    is masked changes nothing.
    """
    policy, trainable, frozen = setup()
    table = StepTable.make(flow_sigmas(STEPS, 3.0), sde.SDEConfig("flow_sde", 0.7), "rectified")
    own, samples, text, key = (
        np.array([[3, 0, 1]]),
        jnp.arange(3, dtype=jnp.int32),
        text_batch(3),
        jax.random.key(3),
    )
    step, x = make_step(policy, table, 1.0), initial_noise(key, samples, SHAPE)
    gradient = jax.jit(make_gradient(policy, table, 1.0, LossConfig(kl_beta=0.0)))

    def sample(window):
        return rollout(
            step,
            trainable,
            frozen,
            x,
            text,
            key=key,
            samples=samples,
            steps=range(3),
            window=window,
        )

    def run(window, valid):
        """(latents, Trajectory, the sum of the rows' gradients)."""
        final, kept = sample(window)
        batch = stack_batches([kept], np.array([[1.0, -2.0, 1.5]]), np.array([valid]))
        grads, metrics = gradient(trainable, GradientInputs(None, {}), frozen, batch)
        values = metrics.averages()
        assert max(values["ratio_max"] - 1, 1 - values["ratio_min"]) < 2e-6, values
        return final, kept, flat_vector(grads) * np.sum(valid)

    final, kept, grads = run(own, [False, True, True])
    assert np.shape(kept.x) == (1, 3, *SHAPE)
    np.testing.assert_array_equal(kept.step, [[0, 0, 1]])
    parts = []
    for row in (1, 2):
        parts.append(run(np.full((1, 3), own[0, row]), np.arange(3) == row)[2])
        alone, one = sample(own[0, row : row + 1])
        np.testing.assert_allclose(final[row], alone[row], atol=2e-5)
        for a, b in ((kept.x, one.x), (kept.x_next, one.x_next), (kept.log_prob, one.log_prob)):
            np.testing.assert_allclose(a[0][row], b[0][row], atol=2e-5)
    assert np.linalg.norm(grads - sum(parts)) < 1e-3 * np.linalg.norm(grads)
    assert np.linalg.norm(parts[0]) > 0 < np.linalg.norm(parts[1])


@pytest.mark.slow
def test_kl_at_sampling_and_advantages_of_each_step():
    """The rollout's KL is the formula's; [M, K, B] advantages weight the steps' gradients one by
    one.
    """
    policy, trainable, frozen = setup()
    samples, text, key = jnp.arange(3, dtype=jnp.int32), text_batch(3), jax.random.key(3)
    step = step_of(policy, kl_kind="flow_grpo")
    _, kept = rollout(
        step,
        trainable,
        frozen,
        initial_noise(key, samples, SHAPE),
        text,
        key=key,
        samples=samples,
        steps=range(STEPS),
        window=WINDOW,
    )
    for k, i in enumerate(WINDOW):
        v, v_ref = (
            np.asarray(compiled_velocity(m, kept.x[k], TABLE.timestep[i], text, 1.0), np.float64)
            for m in (policy.module(trainable, frozen), policy.reference(frozen))
        )
        of_step = [np.float64(a[i]) for a in (TABLE.sigma, TABLE.sigma_next, TABLE.g)]
        for row in range(3):
            (mean, std), (mean_ref, _) = (
                reference.mean_std(np.asarray(kept.x[k][row], np.float64), u[row], *of_step)
                for u in (v, v_ref)
            )
            wanted = reference.kl("flow_grpo", mean, mean_ref, None, None, std, of_step[2])
            assert float(kept.kl[k, row]) == pytest.approx(wanted, rel=1e-3) and wanted > 0
    gradient = gradient_of(policy, LossConfig(kl_beta=0.0))

    def of(advantages):
        batch = stack_batches([kept], np.array([advantages]), np.ones((1, 3), bool))
        return flat_vector(gradient(trainable, GradientInputs(None, {}), frozen, batch)[0])

    first, second, zero = [1.0, -2.0, 1.5], [0.5, 1.0, -1.0], [0.0] * 3
    both = of([first, second])
    np.testing.assert_allclose(
        both, of([first, zero]) + of([zero, second]), atol=1e-5 * np.abs(both).max()
    )
    assert np.linalg.norm(of([first, zero])) > 0 < np.linalg.norm(of([zero, second]))


def test_untrained_steps_are_stochastic_on_demand():
    """The noise of every step, of one window or of a step for each video, and the trajectory of the
    trained ones alone.
    """
    mesh_rows = np.arange(2, dtype=np.int32)
    noisy = []

    def step(trainable, frozen, x, i, stochastic, text, key, samples):
        noisy.append(np.broadcast_to(stochastic, 2).tolist())
        return x + 1, x[:, 0], None, None, None

    def run(window, **options):
        noisy.clear()
        samples = jax.device_put(mesh_rows)
        arguments = {"key": None, "samples": samples, "steps": range(4), "window": window}
        x = jnp.zeros((2, 1))
        return rollout(step, {}, None, x, text_batch(2), **arguments, **options)

    both, neither = [True, True], [False, False]
    final, kept = run(WINDOW, untrained_noise=True)
    assert noisy == [both] * 4 and final[0, 0] == 4
    assert kept.step.tolist() == WINDOW.tolist() and np.asarray(kept.x)[:, 0, 0].tolist() == [0, 2]
    run(WINDOW)
    assert noisy == [both, neither, both, neither]
    own = np.array([[2, 9]])
    _, kept = run(own, untrained_noise=True)
    assert noisy == [both] * 4 and kept.x[0][:, 0].tolist() == [2, 0]
    run(own)
    assert noisy == [neither, neither, [True, False], neither]


@pytest.mark.slow
def test_dpm_solver_between_stochastic_steps():
    """Without a stochastic step the rollout is the solver's own trajectory; after one it starts
    anew, row by row.
    """
    policy, trainable, frozen = setup()
    schedule = flow_sigmas(6, 3.0)
    table = StepTable.make(schedule, sde.SDEConfig("flow_sde", 0.7), ode_solver="dpmpp_2m")
    step, key, text = make_step(policy, table, 1.0), jax.random.key(3), text_batch(2)
    module = policy.module(trainable, frozen)
    samples = jnp.arange(2, dtype=jnp.int32)
    noise = initial_noise(key, samples, SHAPE)
    sigmas = schedule.sigmas.astype(np.float64)

    def run(window, x=noise, first=0):
        return rollout(
            step,
            trainable,
            frozen,
            x,
            text,
            key=key,
            samples=samples,
            steps=range(first, 6),
            window=window,
            multistep=True,
        )

    def solved(x, first=0):
        return reference.dpm_solver_pp_2m(
            np.asarray(x, np.float64),
            lambda x, i: np.asarray(
                compiled_velocity(
                    module, jnp.asarray(x, jnp.float32), schedule.timesteps[first + i], text, 1.0
                ),
                np.float64,
            ),
            sigmas[first:],
        )

    path = solved(noise)
    np.testing.assert_allclose(run(np.arange(0))[0], path[-1], atol=5e-5)
    final, kept = run(np.array([[2, 9]]))  # the first video's step; the second one has none here
    np.testing.assert_allclose(kept.x[0][0], path[2][0], atol=5e-5)
    np.testing.assert_allclose(final[1], path[-1][1], atol=5e-5)
    # the solver on steps 3 to 5 alone
    again = solved(np.stack([kept.x_next[0][0], path[3][1]]), first=3)
    np.testing.assert_allclose(final[0], again[-1][0], atol=5e-5)
    assert np.abs(again[-1][1] - path[-1][1]).max() > 1e-3  # what starting anew changes
    # a segment that begins at step 3, for all and by row
    for window in (np.arange(0), np.array([[9, 9]])):
        middle = run(window, jnp.asarray(path[3], jnp.float32), first=3)[0]
        np.testing.assert_allclose(middle, solved(path[3], first=3)[-1], atol=5e-5)
    # and with one window for all
    final, kept = run(np.array([2]))
    again = solved(kept.x_next[0], first=3)
    np.testing.assert_allclose(final, again[-1], atol=5e-5)
