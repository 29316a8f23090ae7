"""Rollout and update: against the float64 reference, on policy, masked, accumulated."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.defaults import defaults
from grpo import train_state
from grpo.compiled import offload
from grpo.learning import optimiser as update_lib
from grpo.learning.optimiser import (
    Held,
    OptimiserConfig,
    init_state,
    make_gradient,
    make_update,
    objective,
    stack_batches,
)
from grpo.learning.policy import make_policy
from grpo.learning.policy_loss import LossConfig
from grpo.rollout import (
    StepTable,
    branch,
    group_leaders,
    initial_noise,
    make_step,
    prefix,
    rollout,
    rollout_batches,
    sample_noise,
)
from grpo.settings.budget import Spent
from tests import reference
from wan_jax.diffusion import sde
from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.models.config import TransformerConfig
from wan_jax.models.lora import LoRAConfig
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.storage.checkpoint import Checkpoints

CONFIG = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=4,
    out_channels=4,
    text_dim=12,
    freq_dim=16,
    ffn_dim=64,
    num_layers=2,
)
SHAPE, STEPS, WINDOW = (1, 4, 4, 4), 4, np.array([0, 2])
LORA = LoRAConfig(rank=4, alpha=8.0)
TABLE = StepTable.make(flow_sigmas(STEPS, 3.0), sde.SDEConfig("flow_sde", 0.7))
OPTIMISER = OptimiserConfig(learning_rate=1e-2, ema_decay=0.9)


def setup(lora=LORA, mesh=None, dtype=jnp.float32, remat="none", config=CONFIG):
    """Return (policy, trainable, frozen) of a random model; adapters are moved away from zero so
    that they matter.

    The trained arrays are a copy that may be donated. The rest is shared by all calls with the same
    arguments.
    """
    policy, trainable, frozen = shared_setup(lora, mesh, dtype, remat, config)
    return policy, copies(trainable), frozen


@cache
def shared_setup(lora, mesh, dtype, remat, config):
    mesh = mesh or mesh_lib.make_mesh(devices=jax.devices()[:1])
    state = jax.jit(
        lambda: nnx.split(WanTransformer3D(config, dtype=dtype, attention="xla", rngs=nnx.Rngs(0)))[
            1
        ]
    )()
    frozen = mesh_lib.shard_params(state, mesh)
    policy, trainable = make_policy(
        config,
        frozen,
        mesh,
        lora=lora,
        key=jax.random.key(1),
        dtype=dtype,
        attention="xla",
        remat=remat,
    )
    moved = jax.jit(
        lambda trainable: {
            k: v + 0.05 * jax.random.normal(jax.random.fold_in(jax.random.key(2), i), v.shape)
            for i, (k, v) in enumerate(sorted(trainable.items()))
        }
    )(trainable)
    return policy, mesh_lib.shard_params(moved, mesh), frozen


# by `step_of`'s arguments; a step keeps its policy, so that no other one gets the same id
STEPS_OF = {}


def step_of(policy, guidance=1.0, kl_kind=None):
    """Return the jitted denoising step with TABLE, the same function for the same arguments."""
    key = id(policy), guidance, kl_kind
    if key not in STEPS_OF:
        STEPS_OF[key] = make_step(policy, TABLE, guidance, kl_kind=kl_kind)
    return STEPS_OF[key]


compiled_velocity = nnx.jit(velocity, static_argnums=4)


def text_batch(batch: int, mesh=None) -> TextBatch:
    rng = np.random.default_rng(0)
    embeddings, negative = rng.standard_normal((batch, 6, 12)), rng.standard_normal((6, 12))
    mesh = mesh or mesh_lib.make_mesh(devices=jax.devices()[:1])
    return TextBatch(
        jax.device_put(embeddings.astype(np.float32), mesh_lib.batch_sharding(mesh)),
        jax.device_put(negative.astype(np.float32), mesh_lib.replicated(mesh)),
        10,
    )


def sampled(policy, trainable, frozen, samples, guidance=1.0, text=None, mesh=None, shape=SHAPE):
    mesh = mesh or mesh_lib.make_mesh(devices=jax.devices()[:1])
    step = step_of(policy, guidance)
    samples = jax.device_put(jnp.asarray(samples, jnp.int32), mesh_lib.batch_sharding(mesh))
    text = text or text_batch(len(samples), mesh)
    key = jax.random.key(3)
    return rollout(
        step,
        trainable,
        frozen,
        initial_noise(key, samples, shape),
        text,
        key=key,
        samples=samples,
        steps=range(STEPS),
        window=WINDOW,
    )


def flat_vector(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for _, x in sorted(tree.items())])


copies = jax.jit(partial(jax.tree.map, jnp.copy))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_rollout_keeps_what_the_formulas_say(guidance):
    policy, trainable, frozen = setup()
    final, kept = sampled(policy, trainable, frozen, range(3), guidance)
    module = policy.module(trainable, frozen)
    assert kept.x.shape == (2, 3, *SHAPE) and kept.log_prob.shape == (2, 3)
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


@pytest.mark.parametrize(("lora", "kl_kind"), [(LORA, "flow_grpo"), (None, "velocity")])
def test_loss_and_gradient_against_float64(lora, kl_kind):
    """The objective's value, and its gradient through the model: NumPy's gradient of the loss with
    respect to the velocity, pulled back through the model's own Jacobian. `test_losses` has both
    kinds of KL by themselves.
    """
    policy, trainable, frozen = setup(lora)
    _, kept = sampled(policy, trainable, frozen, range(4))
    later = jax.jit(
        lambda tree: jax.tree.map(
            lambda p: p + 0.01 * jax.random.normal(jax.random.key(9), p.shape), tree
        )
    )(trainable)
    config = LossConfig(clip_low=2e-3, clip_high=3e-3, kl_beta=0.5, kl_kind=kl_kind)
    advantages, valid = np.array([1.5, -0.7, 0.4, -2.0]), np.array([True, True, False, True])
    i, text = int(WINDOW[1]), text_batch(4)
    args = (
        kept.x[1],
        kept.x_next[1],
        kept.log_prob[1],
        i,
        None,
        text,
        jnp.asarray(advantages, jnp.float32),
        jnp.asarray(valid),
        Held(),
    )
    (loss, metrics), grads = jax.jit(
        jax.value_and_grad(
            lambda w: objective(policy, TABLE, 1.0, config, w, frozen, *args), has_aux=True
        )
    )(later)

    @jax.jit
    def velocity_and_pulled_back(w, cotangent):
        v, pull_back = jax.vjp(
            lambda w: velocity(policy.module(w, frozen), kept.x[1], TABLE.timestep[i], text, 1.0), w
        )
        return v, pull_back(cotangent)[0]

    v_new, v_old = (velocity_and_pulled_back(w, kept.x[1])[0] for w in (later, trainable))
    v_ref = compiled_velocity(policy.reference(frozen), kept.x[1], TABLE.timestep[i], text, 1.0)
    row = [np.full(4, float(v[i])) for v in (TABLE.sigma, TABLE.sigma_next, TABLE.g)]
    values = [np.asarray(v, np.float64) for v in (kept.x[1], kept.x_next[1], v_new, v_old, v_ref)]
    expected = reference.grpo_objective(
        *values,
        *row,
        advantages,
        clip_low=2e-3,
        clip_high=3e-3,
        kl_beta=0.5,
        kl_kind=kl_kind,
        mask=valid,
    )
    np.testing.assert_allclose(loss / 3, expected["loss"], rtol=1e-4)
    _, wanted = velocity_and_pulled_back(later, jnp.asarray(expected["gradient"] * 3, jnp.float32))
    wanted, got = flat_vector(wanted), flat_vector(grads)
    assert np.linalg.norm(got - wanted) < 2e-3 * np.linalg.norm(wanted)
    assert float(metrics.count) == 3


def test_first_update_is_on_policy_and_moves_towards_the_better_samples():
    policy, trainable, frozen = setup()
    _, kept = sampled(policy, trainable, frozen, range(4))
    update = make_update(policy, TABLE, 1.0, LossConfig(kl_beta=0.0), OPTIMISER)
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


def test_first_update_in_bfloat16_is_on_policy():
    """Rollout and update round alike, though XLA fuses them differently: 8e-6 seen, 4e-4 with
    excess precision.
    """
    config = dataclasses.replace(CONFIG, num_attention_heads=4, attention_head_dim=64, ffn_dim=768)
    policy, trainable, frozen = setup(dtype=jnp.bfloat16, remat="block", config=config)
    _, kept = sampled(policy, trainable, frozen, range(9), guidance=4.5, shape=(9, 8, 16, 4))
    update = make_update(policy, TABLE, 4.5, LossConfig(kl_beta=0.0), OPTIMISER)
    batch = stack_batches([kept], np.linspace(-1, 1, 9)[None], np.ones((1, 9), bool))
    _, metrics, _ = update(init_state(copies(trainable), OPTIMISER), frozen, batch)
    values = metrics.averages()
    assert max(values["ratio_max"] - 1, 1 - values["ratio_min"]) < 5e-5, values


def test_optimiser_and_ema_follow_their_formulas():
    policy, trainable, frozen = setup()
    _, kept = sampled(policy, trainable, frozen, range(4))
    config = OptimiserConfig(
        learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1e-3, ema_decay=0.9
    )
    advantages = np.array([[2.0, -1.0, 0.5, -1.5]])
    update = make_update(policy, TABLE, 1.0, LossConfig(kl_beta=0.0), config)
    p0 = {k: np.asarray(v, np.float64) for k, v in trainable.items()}
    batch = stack_batches([kept], advantages, np.ones((1, 4), bool))
    state, _, norms = update(init_state(copies(trainable), config), frozen, batch)

    def loss(w):
        rows = [
            objective(
                policy,
                TABLE,
                1.0,
                LossConfig(kl_beta=0.0),
                w,
                frozen,
                kept.x[k],
                kept.x_next[k],
                kept.log_prob[k],
                int(WINDOW[k]),
                None,
                text_batch(4),
                jnp.asarray(advantages[0], jnp.float32),
                jnp.ones(4, bool),
                Held(),
            )[0]
            for k in range(2)
        ]
        return sum(rows) / 8

    g = {k: np.asarray(v, np.float64) for k, v in jax.jit(jax.grad(loss))(trainable).items()}
    norm = np.sqrt(sum((v**2).sum() for v in g.values()))
    np.testing.assert_allclose(norms["grad_norm"], norm, rtol=1e-4)
    for k, v in state.trainable.items():
        clipped = g[k] * 1e-3 / norm  # AdamW's first step: m / sqrt(v) = g / |g|
        wanted = p0[k] - 1e-2 * (clipped / (np.abs(clipped) + 1e-8) + 0.1 * p0[k])
        close = np.isclose(v, wanted, atol=2e-4)
        assert close.mean() > 0.97  # where the gradient is near 0 its sign, and eps, are rounding
        decay = 2 / 11  # (1 + 1) / (10 + 1)
        np.testing.assert_allclose(
            state.ema[k], decay * p0[k] + (1 - decay) * np.asarray(v, np.float64), atol=1e-6
        )
    assert int(state.updates) == 1


def test_micro_batches_add_up_and_masked_equals_removed():
    policy, trainable, frozen = setup()
    update = make_update(policy, TABLE, 1.0, LossConfig(kl_beta=0.01), OPTIMISER)
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
    update = make_update(policy, table, 1.0, config, OPTIMISER)
    batch = stack_batches([kept], np.array([[2.0, -1.0, 0.5, -1.5]]), np.ones((1, 4), bool))
    _, metrics, norms = update(init_state(copies(trainable), OPTIMISER), frozen, batch)
    values = metrics.averages()
    assert max(values["ratio_max"] - 1, 1 - values["ratio_min"]) < 2e-6, values
    assert float(norms["grad_norm"]) > 0


def test_branches_of_a_shared_prefix_are_the_rollouts_from_one_noise():
    """Three groups of two: the prefix of each computed once, and the same as when every video goes
    all the way.
    """
    policy, trainable, frozen = setup()
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
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
    start = branch([trunk], jnp.asarray(of), mesh_lib.batch_sharding(mesh))
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
        np.testing.assert_array_equal(kept.x[0, group], kept.x[0, group + 1])
        assert np.abs(x[group] - x[group + 1]).max() > 0.1
    assert prefix(part, np.arange(0)) == range(STEPS) and not prefix(part, np.array([0, 3]))
    np.testing.assert_array_equal(group_leaders(3, 4, 2), [[0, 4], [8, 0]])


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
        grads, metrics = gradient(trainable, Held(), frozen, batch)
        values = metrics.averages()
        assert max(values["ratio_max"] - 1, 1 - values["ratio_min"]) < 2e-6, values
        return final, kept, flat_vector(grads) * np.sum(valid)

    final, kept, grads = run(own, [False, True, True])
    assert kept.x.shape == (1, 3, *SHAPE)
    np.testing.assert_array_equal(kept.step, [[0, 0, 1]])
    parts = []
    for row in (1, 2):
        parts.append(run(np.full((1, 3), own[0, row]), np.arange(3) == row)[2])
        alone, one = sample(own[0, row : row + 1])
        np.testing.assert_allclose(final[row], alone[row], atol=2e-5)
        for a, b in ((kept.x, one.x), (kept.x_next, one.x_next), (kept.log_prob, one.log_prob)):
            np.testing.assert_allclose(a[0, row], b[0, row], atol=2e-5)
    assert np.linalg.norm(grads - sum(parts)) < 1e-3 * np.linalg.norm(grads)
    assert np.linalg.norm(parts[0]) > 0 < np.linalg.norm(parts[1])


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
                reference.mean_std(np.asarray(kept.x[k, row], np.float64), u[row], *of_step)
                for u in (v, v_ref)
            )
            wanted = reference.kl("flow_grpo", mean, mean_ref, None, None, std, of_step[2])
            assert float(kept.kl[k, row]) == pytest.approx(wanted, rel=1e-3) and wanted > 0
    gradient = jax.jit(make_gradient(policy, TABLE, 1.0, LossConfig(kl_beta=0.0)))

    def of(advantages):
        batch = stack_batches([kept], np.array([advantages]), np.ones((1, 3), bool))
        return flat_vector(gradient(trainable, Held(), frozen, batch)[0])

    first, second, zero = [1.0, -2.0, 1.5], [0.5, 1.0, -1.0], [0.0] * 3
    both = of([first, second])
    np.testing.assert_allclose(
        both, of([first, zero]) + of([zero, second]), atol=1e-5 * np.abs(both).max()
    )
    assert np.linalg.norm(of([first, zero])) > 0 < np.linalg.norm(of([zero, second]))


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

    def run(window):
        return rollout(
            step,
            trainable,
            frozen,
            noise,
            text,
            key=key,
            samples=samples,
            steps=range(6),
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
    np.testing.assert_allclose(kept.x[0, 0], path[2][0], atol=5e-5)
    np.testing.assert_allclose(final[1], path[-1][1], atol=5e-5)
    # the solver on steps 3 to 5 alone
    again = solved(np.stack([kept.x_next[0, 0], path[3][1]]), first=3)
    np.testing.assert_allclose(final[0], again[-1][0], atol=5e-5)
    assert np.abs(again[-1][1] - path[-1][1]).max() > 1e-3  # what starting anew changes


def test_guidance_is_distilled_into_the_model_without_it():
    """The loss is the distance to the reference's v_u + 4 (v_c - v_u), and updates without a reward
    make it smaller.
    """
    policy, trainable, frozen = setup()
    _, kept = sampled(policy, trainable, frozen, range(4))
    config = LossConfig(kl_beta=0.0, distill_weight=1.0, distill_guidance=4.0)
    update, state = (
        make_update(policy, TABLE, 1.0, config, OPTIMISER),
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


def test_the_kl_may_adapt_its_weight_and_be_to_an_average_of_the_trained_weights(tmp_path):
    """Three updates, with the optimiser's state on the device and on the host, and a checkpoint
    that holds it all.

    The KL is 0 while nothing is trained, then the distance to the average, which follows by its
    formula. The weight follows the KL that the updates report.
    """
    config = LossConfig(
        kl_beta=0.1,
        kl_kind="velocity",
        kl_target=0.02,
        kl_horizon=3.0,
        kl_range=(1e-3, 0.2),
        reference_decay=0.75,
    )
    policy, trainable, frozen = setup()
    _, kept = sampled(policy, trainable, frozen, range(4))
    batch, results = (
        stack_batches([kept], np.array([[2.0, -1.0, 0.5, -1.5]]), np.ones((1, 4), bool)),
        [],
    )
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    for module in (update_lib, offload):
        update = module.make_update(policy, TABLE, 1.0, config, OPTIMISER, mesh)
        state = module.init_state(copies(trainable), OPTIMISER, config, keeps_old=True)
        weight, mean_kl = 0.1, 0.0
        for number in range(3):
            new, average = copies(state.trainable), copies(state.old)
            state, metrics, norms = update(state, frozen, batch, 0.75)
            kl = metrics.averages()["kl"]
            v, v_ref = (
                np.stack(
                    [
                        compiled_velocity(
                            policy.module(weights, frozen),
                            kept.x[k],
                            TABLE.timestep[i],
                            text_batch(4),
                            1.0,
                        )
                        for k, i in enumerate(WINDOW)
                    ]
                )
                for weights in (new, average)
            )
            assert kl == pytest.approx(np.mean((v - v_ref) ** 2), rel=1e-3, abs=1e-9)
            assert (kl > 1e-6) == (number > 0)
            np.testing.assert_allclose(
                flat_vector(state.old),
                0.75 * flat_vector(average) + 0.25 * flat_vector(state.trainable),
                atol=1e-6,
            )
            assert float(norms["kl_weight"]) == pytest.approx(weight, rel=1e-5)
            mean_kl = kl if number == 0 else 0.9 * mean_kl + 0.1 * kl
            weight = min(max(weight * np.exp((mean_kl - 0.02) / 0.02 / 3), 1e-3), 0.2)
            assert float(state.kl.weight) == pytest.approx(weight, rel=1e-4) and weight not in (
                0.1,
                1e-3,
                0.2,
            )
        results.append(state)
        assert getattr(update, "gradient", update)._cache_size() == 1  # compiled once
    np.testing.assert_allclose(*(flat_vector(state.trainable) for state in results), atol=1e-5)
    checkpoints = Checkpoints(tmp_path)
    train_state.save(
        checkpoints, 1, {"transformer": results[0]}, defaults().to_dict(), None, Spent()
    )
    restored = train_state.restore(checkpoints, 1, {"transformer": results[0]})["transformer"]
    jax.tree.map(np.testing.assert_array_equal, restored, results[0])


@pytest.mark.parametrize("kind", ["flow_grpo_wan", "flow_sde", "dance", "cps"])
def test_rectified_credit_gives_every_step_a_gradient_of_one_size(kind):
    """The root mean square, over the noise, of weight x d log-prob / d v is the same at every step."""
    schedule, config = flow_sigmas(10, 3.0), sde.SDEConfig(kind)
    table = StepTable.make(schedule, config, "rectified", slice(0, 6))
    s, g = (
        schedule.sigmas.astype(np.float64),
        sde.diffusion_coefficient(config, schedule).astype(np.float64),
    )
    mean_std = reference.cps_mean_std if kind == "cps" else reference.mean_std
    sizes = []
    for i in range(9):
        (a, std), (b, _) = (mean_std(0.3, v, s[i], s[i + 1], g[i]) for v in (0.0, 1.0))
        sizes.append(table.weight[i] * abs(b - a) / std)
    np.testing.assert_allclose(sizes, sizes[0], rtol=1e-5)
    assert np.mean(table.weight[:6]) == pytest.approx(1, rel=1e-6)
    if kind == "flow_sde":
        longcat = StepTable.make(schedule, config, "longcat").weight
        np.testing.assert_allclose(
            table.weight[1:] / longcat[1:], table.weight[1] / longcat[1], rtol=1e-5
        )


def test_rectified_credit_of_wans_published_schedule():
    """Flash-GRPO's constants for 20 steps with shift 3 are these up to a factor: 7.4770 at 999,
    3.7754 at 785.
    """
    schedule = flow_sigmas(20, 3.0, "legacy")
    weight = StepTable.make(schedule, sde.SDEConfig(), "rectified").weight
    at = dict(zip(schedule.timesteps.astype(int).tolist(), weight))
    assert at[999] / at[785] == pytest.approx(7.4770 / 3.7754, rel=1e-4)
