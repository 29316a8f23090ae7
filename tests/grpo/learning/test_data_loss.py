"""The loss on data by its formula, under each item's own prompt; and on given pairs and ratings."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.data.labels import read_labels
from grpo.learning import data_loss
from grpo.learning.data_loss import DataSource, draw_numbers, draw_shares, with_data
from grpo.learning.optimiser import GradientInputs
from grpo.learning.velocity_loss import FlowMetrics
from grpo.methods.dpo import DPO
from grpo.methods.tgo import TGO
from grpo.rollout import sample_noise
from tests.grpo import tiny_policy
from tests.grpo.data_folders import write_data
from tests.grpo.data_spec import ITEMS, SEED, spec_of
from tests.grpo.tiny_policy import SHAPE
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.inference.pipeline import TEXT_ROWS, TextTable

# --- the loss -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    """(policy, trained arrays, frozen)."""
    return tiny_policy.setup()


@pytest.fixture(scope="module")
def velocity_of(weights):
    """The velocity of the policy: (trained arrays, x, timestep, text) -> v."""
    policy, _, frozen = weights
    return jax.jit(
        lambda arrays, x, t, text: velocity(policy.module(arrays, frozen), x, t, text, 1.0)
    )


def expected_errors(velocity_of, trainable, written, spec, update, swapped=False):
    """Return the error of each pair in float64, from the velocity alone. swapped: each pair has the
    prompt of the next one.
    """
    _, latents, texts = written
    size = spec.recipe.data.batch_size
    numbers = draw_numbers(SEED, update, ITEMS, size)
    share = draw_shares(SEED, update, 0, size)
    step = (share * len(spec.schedule.timesteps)).astype(int)
    sigma, timestep = spec.schedule.sigmas[step], spec.schedule.timesteps[step]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 3), update)
    errors = []
    for place, number in enumerate(numbers):
        noise = np.asarray(sample_noise(key, jnp.array([place]), 0, SHAPE))[0].astype(np.float64)
        x0, s = latents[number].astype(np.float64), float(sigma[place])
        rows = np.zeros((1, 6, 12), np.float32)
        own = texts[numbers[(place + swapped) % size]]
        rows[0, : len(own)] = own
        text = TextBatch(jnp.asarray(rows), jnp.zeros((6, 12)), TEXT_ROWS - 6)
        x = ((1 - s) * x0 + s * noise)[None].astype(np.float32)
        v = np.asarray(velocity_of(trainable, x, timestep[place : place + 1], text), np.float64)[0]
        errors.append(np.mean((v - (noise - x0)) ** 2))
    return np.array(errors)


@pytest.mark.slow
def test_loss_and_gradient_with_data(weights, velocity_of, written, source):
    """L = L_method + w mean of the valid pairs' errors; a masked row has no say, nor have the copies
    of earlier weights.
    """
    policy, trainable, frozen = weights
    spec, update, weight = spec_of(), 2, 0.5

    def of_method(trainable, inputs, frozen, batch):
        assert inputs.lagged.keys() == {"old"}
        return jax.tree.map(lambda x: 2 * x, trainable), {"count": batch}

    gradient = jax.jit(with_data(of_method, policy, weight))
    errors = expected_errors(velocity_of, trainable, written, spec, update)
    batch = source.batch(spec, 0, update)
    inputs = GradientInputs(jnp.asarray(7.0), {"old": trainable})
    both = data_loss.AnchoredBatch(jnp.asarray(4.0), batch)
    grads, metrics = gradient(trainable, inputs, frozen, both)
    assert float(metrics.data.count) == len(errors) == 3 and float(metrics.method["count"]) == 4
    # float32 means of 64 values
    assert float(metrics.data.flow_error) / 3 == pytest.approx(errors.mean(), rel=1e-5)

    # beyond the method's gradient it is w times the slope of the mean error
    pull = jax.tree.map(lambda g, x: (g - 2 * x) / weight, grads, trainable)
    way = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape) * 1e-3, trainable)
    ends = []
    for side in (1, -1):
        moved = jax.tree.map(lambda p, d, side=side: p + side * d, trainable, way)
        ends.append(expected_errors(velocity_of, moved, written, spec, update).mean())
    slope = sum(float((pull[k] * way[k]).sum()) for k in way)
    assert (ends[0] - ends[1]) / 2 == pytest.approx(slope, rel=1e-2)

    # what is masked has no say; without a valid pair the gradient is the method's
    def changed(**values):
        data = dataclasses.replace(batch, **values)
        return gradient(trainable, inputs, frozen, dataclasses.replace(both, data=data))

    mask = np.asarray(batch.valid)[..., None, None, None, None]
    other, _ = changed(x0=jnp.where(mask, batch.x0, 1e3))
    nothing, empty = changed(valid=jnp.zeros_like(batch.valid))
    for name in grads:
        np.testing.assert_array_equal(grads[name], other[name])
        np.testing.assert_array_equal(nothing[name], 2 * trainable[name])
    assert empty.data.averages()["flow_error"] == 0


def test_the_weight_of_the_kl_follows_the_method_not_the_data():
    """An adaptive weight and the log take the count and the KL of the method's rows."""
    method, data = (
        FlowMetrics(*map(jnp.asarray, (n, 1.0, 2.0 * n, 3.0 * n)), {}) for n in (4.0, 6.0)
    )
    found = data_loss.AnchoredMetrics(method, data)
    assert (float(found.count), float(found.kl)) == (4.0, 12.0)
    averages = {"policy_loss": 0.25, "flow_error": 2.0, "kl": 3.0, "data_error": 2.0}
    assert found.averages() == averages


def test_swapped_prompts_would_be_seen(weights, velocity_of, written):
    """The error depends on the prompts by far more than the tolerance of the test above."""
    own, others = (
        expected_errors(velocity_of, weights[1], written, spec_of(), 2, swapped)
        for swapped in (False, True)
    )
    assert abs(own.mean() - others.mean()) > 1e-4 * own.mean()


# --- given pairs and ratings ----------------------------------------------------------------------

PAIRS = [(0, 2), (3, 1), (4, 0), (5, 3)]  # of items with two prompts in turn
SCORES = {1: 0.25, 2: 1.0, 3: 0.5, 5: 0.0}


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """(data, latents, embeddings) of six items with two prompts, and a source that makes labels."""
    folder = tmp_path_factory.mktemp("paired")
    written = write_data(folder / "data", SHAPE, height=32, width=32, items=6, prompts=2)
    lines = [{"preferred": f"{a}.png", "rejected": f"{b}.png"} for a, b in PAIRS]
    rated = [{"file": f"{item}.png", "score": score} for item, score in SCORES.items()]
    table, sources = TextTable((), np.zeros((1, 12), np.float32), 6), {}
    for kind, content in (("pairs", lines), ("ratings", rated)):
        path = folder / f"{kind}.jsonl"
        path.write_text("\n".join(map(json.dumps, content)))
        labels = read_labels(str(path), written[0], kind)
        data = dataclasses.replace(written[0], labels=labels)
        sources[kind] = DataSource.make(data, table, np.float32)
    return written, sources


def test_a_batch_of_pairs_has_both_latents_and_the_prompt_of_the_two(paired):
    (_, latents, texts), sources = paired
    seen = []
    for update in range(4):
        batch = sources["pairs"].batch(spec_of(), 0, update)
        drawn = draw_numbers(SEED, update, len(PAIRS), 3)
        seen += drawn.tolist()
        np.testing.assert_array_equal(batch.valid, [[True, True], [True, False]])
        x0, worse = (np.asarray(x).reshape(4, *SHAPE) for x in (batch.x0, batch.worse))
        embeddings = np.asarray(batch.text.embeddings).reshape(4, 6, 12)
        for place, number in enumerate(drawn):
            better, other = PAIRS[number]
            np.testing.assert_array_equal(x0[place], latents[better])
            np.testing.assert_array_equal(worse[place], latents[other])
            for item in (better, other):  # they have one prompt
                np.testing.assert_array_equal(embeddings[place, : len(texts[item])], texts[item])
                assert not embeddings[place, len(texts[item]) :].any()
    assert sorted(seen) == sorted([*range(4)] * 3), "three passes over all pairs"


def errors_of(velocity_of, arrays, latents, text, batch, place):
    """Return mean((v - (e - x0))^2) in float64 of each of the latents [F, H, W, C], at the noise and
    the level of a row of a batch of data.
    """
    m, b = divmod(place, batch.valid.shape[1])
    sigma = float(batch.sigma[m, 0, b])
    noise = np.asarray(sample_noise(batch.key, jnp.array([place]), 0, SHAPE))[0].astype(np.float64)
    rows = np.zeros((1, 6, 12), np.float32)
    rows[0, : len(text)] = text
    text = TextBatch(jnp.asarray(rows), jnp.zeros((6, 12)), TEXT_ROWS - 6)
    errors = []
    for x0 in latents:
        x = ((1 - sigma) * x0.astype(np.float64) + sigma * noise)[None].astype(np.float32)
        v = np.asarray(velocity_of(arrays, x, batch.timestep[m, 0, b : b + 1], text), np.float64)[0]
        errors.append(np.mean((v - (noise - x0)) ** 2))
    return np.array(errors)


@pytest.fixture(scope="module")
def reference_of(weights):
    """The velocity of the base model, as `velocity_of`."""
    policy, _, frozen = weights
    return jax.jit(lambda _, x, t, text: velocity(policy.reference(frozen), x, t, text, 1.0))


def loss_on(method, weights, batch) -> float:
    """Return the mean loss of the three rows of a batch."""
    policy, trainable, frozen = weights
    gradient = jax.jit(method.make_gradient(policy, tiny_policy.TABLE, 1.0))
    _, metrics = gradient(trainable, GradientInputs(None, {}), frozen, batch)
    assert float(metrics.count) == 3
    return float(metrics.policy_loss) / 3


@pytest.mark.slow
def test_the_loss_on_given_pairs(weights, velocity_of, reference_of, paired):
    """-log sigmoid(-beta / 2 ((e_w - r_w) - (e_l - r_l))) with one noise and one level for both, under
    their own prompt: with that of other items it would be another.
    """
    (_, latents, texts), sources = paired
    method, update = DPO(beta=20.0), 1
    batch = sources["pairs"].batch(spec_of(), 0, update)

    def expected(swapped):
        losses = []
        for place, number in enumerate(draw_numbers(SEED, update, len(PAIRS), 3)):
            pair = list(PAIRS[number])
            common = latents[pair], texts[(pair[0] + swapped) % 2], batch, place
            excess = errors_of(velocity_of, weights[1], *common)
            excess -= errors_of(reference_of, None, *common)
            losses.append(np.log1p(np.exp(0.5 * method.beta * (excess[0] - excess[1]))))
        return np.mean(losses)

    # float32 means of 64 values, times beta / 2
    loss, tolerance = loss_on(method, weights, batch), 2e-5
    assert loss == pytest.approx(expected(swapped=False), rel=tolerance)
    assert loss != pytest.approx(expected(swapped=True), rel=5 * tolerance)


@pytest.mark.slow
def test_the_loss_on_given_ratings(weights, velocity_of, reference_of, paired):
    """-w log sigmoid(+-h) by the median of all scores, 0.375, with each item under its own prompt."""
    (_, latents, texts), sources = paired
    method, update, items = TGO(temperature=0.1), 1, [*SCORES]
    spec = spec_of()
    spec.method.rated_weights = method.rated_weights
    batch = sources["ratings"].batch(spec, 0, update)

    def expected(swapped):
        losses = []
        for place, number in enumerate(draw_numbers(SEED, update, len(items), 3)):
            item = items[number]
            common = latents[[item]], texts[(item + swapped) % 2], batch, place
            excess = errors_of(velocity_of, weights[1], *common)
            h = (errors_of(reference_of, None, *common) - excess)[0] / method.temperature
            likely, far = 1 / (1 + np.exp(-h)), abs(SCORES[item] - 0.375)
            losses.append(-(1 + 5 * far) * np.log(likely if SCORES[item] > 0.375 else 1 - likely))
        return np.mean(losses)

    loss, tolerance = loss_on(method, weights, batch), 2e-5  # as above, divided by T
    assert loss == pytest.approx(expected(swapped=False), rel=tolerance)
    assert loss != pytest.approx(expected(swapped=True), rel=5 * tolerance)
