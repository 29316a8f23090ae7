"""The optimiser step against its formulas, by gradients that are given, with the optimiser's state on
the device and in host memory.
"""

import dataclasses
import re
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.compiled import offload
from grpo.learning import optimiser
from grpo.learning.kl import AdaptiveKL
from grpo.learning.optimiser import OptimiserConfig
from tests.grpo.specs import devices_mesh
from wan_jax.distributed import sharding as sharding_lib

CONFIG = OptimiserConfig(
    learning_rate=1e-2, warmup_updates=4, weight_decay=0.1, max_grad_norm=1e-3, ema_decay=0.26
)
ADAPTIVE = AdaptiveKL(0.1, target=0.02, horizon=3.0, bounds=(1e-3, 0.2))


class Metrics(NamedTuple):
    kl: jax.Array
    count: jax.Array


def given(trainable, held, frozen, batch):
    """Return the batch as the gradient."""
    grads, kl = batch
    return grads, Metrics(2 * kl, jnp.asarray(2.0))


def arrays(seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": (3, 4)}
    values = {k: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    return sharding_lib.shard_params(values, devices_mesh(1))


def updates(module, count: int = 3, config: OptimiserConfig = CONFIG):
    """Return the state after each of several updates with a lagged copy and an adaptive KL, the
    norms, and the function. The given gradients are `arrays(1)`, `arrays(2)`, ...
    """
    trainable = arrays(0)
    policy = types.SimpleNamespace(trainable=jax.eval_shape(lambda: trainable))
    options = {"adaptive_kl": ADAPTIVE, "lagged": ("old",)}
    update = module.make_update(given, policy, config, devices_mesh(1), **options)
    state, states, norms = module.init_state(trainable, config, **options), [], []
    for n in range(count):
        batch = arrays(n + 1), jnp.asarray(0.01 * n)
        state, _, measured = update(state, None, batch, {"old": 0.75})
        # donated to the next update
        states.append(jax.tree.map(np.asarray, state))
        norms.append({k: float(v) for k, v in measured.items()})
    return states, norms, update


def test_weights_averages_and_copies_follow_their_formulas():
    """AdamW with clipping and warm-up, in float64 NumPy."""
    states, norms, update = updates(optimiser)
    assert update._cache_size() == 1
    weights = {k: np.asarray(v, np.float64) for k, v in arrays(0).items()}
    ema, old = dict(weights), dict(weights)
    m, v = ({k: np.zeros(w.shape) for k, w in weights.items()} for _ in range(2))
    for n, (state, measured) in enumerate(zip(states, norms), start=1):
        grads = {k: np.asarray(g, np.float64) for k, g in arrays(n).items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert measured["grad_norm"] == pytest.approx(norm, rel=1e-5)
        rate, moved = 1e-2 * n / 4, 0.0
        decay = min((1 + n) / (10 + n), 0.26)
        for name, gradient in grads.items():
            clipped = gradient * min(1.0, 1e-3 / norm)
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.999 * v[name] + 0.001 * clipped**2
            step = m[name] / (1 - 0.9**n) / (np.sqrt(v[name] / (1 - 0.999**n)) + 1e-8)
            change = -rate * (step + 0.1 * weights[name])
            weights[name] = weights[name] + change
            moved += (change**2).sum()
            ema[name] = decay * ema[name] + (1 - decay) * weights[name]
            old[name] = 0.75 * old[name] + 0.25 * weights[name]
            # Adam divides by the root of a sum of squares: a few roundings of fp32 on values near 1
            for found, wanted in ((state.trainable, weights), (state.ema, ema)):
                np.testing.assert_allclose(found[name], wanted[name], atol=2e-6)
            np.testing.assert_allclose(state.lagged["old"][name], old[name], atol=2e-6)
        assert measured["update_norm"] == pytest.approx(np.sqrt(moved), rel=1e-4)
        assert int(state.updates) == n


def test_the_weight_of_the_kl_follows_the_kl_of_the_updates():
    states, norms, _ = updates(optimiser)
    control = ADAPTIVE.init()
    for n, (state, measured) in enumerate(zip(states, norms)):
        assert measured["kl_weight"] == pytest.approx(float(control.weight), rel=1e-6)
        control = ADAPTIVE.step(control, jnp.asarray(0.01 * n), jnp.asarray(n == 0))
        assert float(state.kl.weight) == pytest.approx(float(control.weight), rel=1e-5)
        assert float(state.kl.average) == pytest.approx(float(control.average), abs=1e-8)


@pytest.mark.parametrize("average", [0.26, 0.0])
def test_a_state_in_host_memory_is_the_same(average):
    """Up to rounding: another function steps each array by itself."""
    config = dataclasses.replace(CONFIG, ema_decay=average)
    (states, norms, _), (hosted, host_norms, update) = (
        updates(module, config=config) for module in (optimiser, offload)
    )
    assert update.gradient._cache_size() == 1
    assert jax.tree.structure(states) == jax.tree.structure(hosted)
    for a, b in zip(jax.tree.leaves((states, norms)), jax.tree.leaves((hosted, host_norms))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_moments_in_host_memory_are_rounded_by_the_same_noise():
    """A first moment's neighbours in bfloat16 differ by 0.4 to 0.8 %; where fp32 differs by rounding, the
    noise may fall to the other side. Arrays of one shape have noise of their own.
    """
    config = dataclasses.replace(CONFIG, moments_dtype="bfloat16")
    (state, *_), (hosted, *_) = (updates(module, 1, config)[0] for module in (optimiser, offload))
    one, other = (np.concatenate([x.ravel() for x in moments(s)]) for s in (state, hosted))
    assert (one == other).mean() > 0.95 and len(one) == 2 * (12 + 5 + 12)
    rule, equal = optimiser.adamw(config), dict.fromkeys("ab", jnp.full(1000, 0.3))
    adam = rule.update(equal, rule.init(equal), equal)[1][0]
    for moment in (adam.mu, adam.nu):
        a, b = (np.asarray(moment[name], np.float64) for name in "ab")
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15  # 0.03 is a standard deviation


@pytest.mark.parametrize("module", [optimiser, offload])
def test_a_given_weight_of_the_kl_is_an_argument(module):
    """Another weight reaches the gradient, and compiles nothing."""
    trainable = arrays(0)
    policy = types.SimpleNamespace(trainable=jax.eval_shape(lambda: trainable))

    def weighted(trainable, held, frozen, batch):
        grads, metrics = given(trainable, held, frozen, batch)
        return jax.tree.map(lambda g: held.kl_weight * g, grads), metrics

    update = module.make_update(weighted, policy, CONFIG, devices_mesh(1))
    state, norms = module.init_state(trainable, CONFIG), []
    for weight in (0.5, 2.0):
        state, _, measured = update(state, None, (arrays(1), jnp.zeros(())), {}, weight)
        norms.append(float(measured["grad_norm"]))
    assert norms[1] == pytest.approx(4 * norms[0], rel=1e-5)
    assert getattr(update, "gradient", update)._cache_size() == 1


@pytest.mark.parametrize("module", [optimiser, offload])
def test_without_an_average_the_weights_are_the_averaged_ones(module):
    config = dataclasses.replace(CONFIG, ema_decay=0.0)
    (kept, _, _), (left_out, _, update) = updates(module), updates(module, config=config)
    assert getattr(update, "gradient", update)._cache_size() == 1
    for one, other in zip(kept, left_out):
        assert other.ema == {} and other.averaged is other.trainable and one.averaged is one.ema
        for name, weight in one.trainable.items():
            np.testing.assert_allclose(other.trainable[name], weight, rtol=1e-6, atol=1e-8)


def moments(state) -> list[np.ndarray]:
    return [x for x in jax.tree.leaves(state.opt) if x.ndim]


@pytest.mark.parametrize("module", [optimiser, offload])
def test_moments_in_bfloat16_are_computed_in_fp32(module):
    """A first update is that of fp32, whose moments are 0 before; later ones know the moments to 0.8 %."""
    config = dataclasses.replace(CONFIG, moments_dtype="bfloat16")
    (exact, _, _), (rounded, _, update) = updates(module), updates(module, config=config)
    assert getattr(update, "gradient", update)._cache_size() == 1
    for n, (one, other) in enumerate(zip(exact, rounded)):
        assert {x.dtype for x in moments(other)} == {jnp.dtype(jnp.bfloat16)}
        assert {x.dtype for x in moments(one)} == {jnp.dtype(np.float32)}
        for a, b in zip(moments(one), moments(other)):
            np.testing.assert_allclose(b.astype(np.float32), a, rtol=0.01 * (n + 1), atol=1e-9)
        for name, weight in one.trainable.items():
            # steps of at most the learning rate of 1e-2
            atol = 1e-8 if n == 0 else 2e-4 * n
            np.testing.assert_allclose(other.trainable[name], weight, rtol=1e-6, atol=atol)
    again, _, _ = updates(module, config=config)
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(again)):
        np.testing.assert_array_equal(a, b)


def test_a_second_moment_in_bfloat16_falls_as_in_fp32():
    """By 0.1 % an update, a fraction of what neighbouring values differ by."""
    rule = optimiser.adamw(dataclasses.replace(CONFIG, moments_dtype="bfloat16"))
    weights = jnp.zeros(1000)
    step = jax.jit(lambda gradient, state: rule.update(gradient, state, weights)[1])
    state = step(jnp.ones(1000), rule.init(weights))
    for _ in range(500):
        state = step(jnp.zeros(1000), state)
    second = np.asarray(state[0].nu, np.float64)
    # 500 roundings with a deviation of at most half of 0.8 %: 9 % of a value, 0.3 % of their mean
    assert second.mean() == pytest.approx(0.001 * 0.999**500, rel=0.02)
    assert second.std() > 0


def test_stochastic_rounding():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=200), 1e-20 * rng.normal(size=200), [0.0, -1.5, 2.0]])
    values = values.astype(np.float32)
    seeds = jnp.arange(4000, dtype=jnp.uint32)
    drawn = jax.vmap(lambda seed: optimiser.round_stochastically(jnp.asarray(values), seed))(seeds)
    assert drawn.dtype == jnp.bfloat16
    drawn = np.asarray(drawn, np.float64)
    spacing = 2.0 ** (np.floor(np.log2(np.abs(values), where=values != 0, out=np.zeros(403))) - 7)
    assert (np.abs(drawn - values) < spacing).all()
    assert (np.abs(drawn.mean(0) - values) < 5 * spacing / np.sqrt(4 * 4000)).all()
    np.testing.assert_array_equal(drawn[:, -3:], np.tile([0.0, -1.5, 2.0], (4000, 1)))
    odd = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(
        np.asarray(optimiser.round_stochastically(odd, seeds[0]), np.float32), odd
    )


@pytest.mark.parametrize(
    "config",
    [CONFIG, dataclasses.replace(CONFIG, ema_decay=0.0, moments_dtype="bfloat16")],
    ids=["whole", "compact"],
)
def test_abstract_states_are_those_of_init_state(config):
    trainable = arrays(0)
    policy = types.SimpleNamespace(trainable=jax.eval_shape(lambda: trainable))
    for options in ({}, {"adaptive_kl": ADAPTIVE, "lagged": ("old", "older")}):
        shapes = optimiser.state_shapes(policy, config, **options)
        state = jax.eval_shape(lambda s: s, optimiser.init_state(trainable, config, **options))
        parameters = sum(x.size for x in trainable.values())
        held = sum(x.size * x.dtype.itemsize for x in (*moments(state), *state.ema.values()))
        assert held == config.bytes_per_parameter * parameters
        assert jax.tree.structure(shapes) == jax.tree.structure(state)
        for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(state)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert state.gradient_inputs().lagged.keys() == set(options.get("lagged", ()))


@pytest.mark.parametrize(
    "key, value",
    [
        ("learning_rate", 0.0),
        ("learning_rate", 1.0),
        ("ema_decay", 1.0),
        ("max_grad_norm", 0.0),
        ("moments_dtype", "float16"),
    ],
)
def test_bad_configuration(key, value):
    with pytest.raises(ValueError, match=re.escape(f"train.{key}={value!r}")):
        dataclasses.replace(CONFIG, **{key: value})


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_learning_rate_is_that_of_adamw(warmup):
    """The first update of AdamW moves every weight by the rate; so does each of a constant gradient."""
    config = OptimiserConfig(
        learning_rate=0.01, warmup_updates=warmup, weight_decay=0.0, adam_eps=1e-30
    )
    rule, weights, gradient = optimiser.adamw(config), jnp.zeros(1), jnp.ones(1)
    state = rule.init(weights)
    for update in range(7):
        change, state = rule.update(gradient, state, weights)
        assert float(-change[0]) == pytest.approx(optimiser.learning_rate(config, update), rel=1e-4)
