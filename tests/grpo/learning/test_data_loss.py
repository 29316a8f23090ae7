"""The loss on data by its formula, under each item's own prompt; which items, levels and noise an
optimiser step has; and what is the same without data.
"""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.compiled.functions import Functions
from grpo.credit import compute_credit
from grpo.data.labels import Labels, read_labels
from grpo.data.latent_folder import LatentData, open_data
from grpo.learning import data_loss
from grpo.learning.data_loss import DataSource, Rollout, draw_numbers, draw_shares, with_data
from grpo.learning.optimiser import GradientInputs
from grpo.methods.dpo import DPO
from grpo.methods.nft import NFT
from grpo.methods.rwr import RWR
from grpo.methods.tgo import TGO
from grpo.random_streams import Stream
from grpo.rollout import initial_noise, sample_noise
from grpo.update import data_share, kl_share, update_epoch
from tests.grpo import tiny_policy
from tests.grpo.data_folders import MODEL, write_data
from tests.grpo.epoch_inputs import rollout_of, scores_of, session_of, states_of
from tests.grpo.specs import devices_mesh, tiny_spec
from tests.grpo.tiny_policy import SHAPE
from wan_jax.diffusion.experts import segments
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.inference.pipeline import TEXT_ROWS, TextTable

ITEMS = 5
SEED = 3


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data", SHAPE, height=32, width=32)


@pytest.fixture(scope="module")
def source(written):
    table = TextTable((), np.zeros((1, 12), np.float32), 6)
    return DataSource.make(written[0], table, np.float32)


def spec_of(batch_size=3, micro=2, rollout_levels=True, boundary=None, steps=20):
    """Return the part of a `RunSpec` that a batch of data follows from."""
    schedule = flow_sigmas(steps, 3.0)
    return types.SimpleNamespace(
        recipe=types.SimpleNamespace(
            seed=SEED,
            data=types.SimpleNamespace(batch_size=batch_size),
            sample=types.SimpleNamespace(batch_size=micro),
        ),
        method=types.SimpleNamespace(rollout_levels=rollout_levels),
        preset=types.SimpleNamespace(boundary=boundary),
        segments=segments(schedule.timesteps, boundary),
        schedule=schedule,
        mesh=devices_mesh(1),
    )


# --- the draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("total, size", [(10, 4), (3, 5), (4, 4), (7, 1)])
def test_every_pass_has_every_item_once(total, size):
    updates = [draw_numbers(SEED, update, total, size) for update in range(3 * total)]
    order = np.concatenate(updates)
    for start in range(0, len(order) - total + 1, total):
        assert sorted(order[start : start + total]) == list(range(total))
    again = draw_numbers(SEED, 2, total, size)
    np.testing.assert_array_equal(again, updates[2])
    first = np.random.default_rng([SEED, 0, 0xDA7A]).permutation(total)
    np.testing.assert_array_equal(order[:total], first)
    if total > 4:
        assert not np.array_equal(order[:total], order[total : 2 * total])
        assert not np.array_equal(order[:total], draw_numbers(SEED + 1, 0, total, total))


def test_levels_are_one_in_each_part_of_the_distribution():
    shares = draw_shares(SEED, 4, 0, 8)
    assert sorted((shares * 8).astype(int)) == list(range(8))
    for other in ((SEED + 1, 4, 0), (SEED, 5, 0), (SEED, 4, 1)):
        assert not np.array_equal(draw_shares(*other, 8), shares)


def test_levels_are_those_of_the_method_and_the_expert(source):
    spec = spec_of(batch_size=8, boundary=0.875)
    for segment, inside in ((0, lambda t: t >= 875), (1, lambda t: t < 875)):
        of_rollout = source.batch(spec, segment, 0)
        assert inside(of_rollout.timestep).all()
        assert np.isin(np.asarray(of_rollout.sigma), spec.schedule.sigmas).all()
        spec.method.rollout_levels = False
        drawn = source.batch(spec, segment, 0)
        assert inside(drawn.timestep).all()
        assert not np.isin(np.asarray(drawn.sigma), spec.schedule.sigmas).any()
        np.testing.assert_allclose(drawn.timestep, 1000 * drawn.sigma, rtol=1e-6)
        spec.method.rollout_levels = True
        np.testing.assert_array_equal(of_rollout.draw, [spec.segments[segment].expert])


def test_methods_have_the_levels_that_they_train_at():
    assert NFT.rollout_levels and not RWR.rollout_levels
    assert tiny_spec().method.rollout_levels  # Flow-GRPO


def test_a_batch_has_the_latents_of_its_items_and_their_own_prompts(source, written):
    _, latents, texts = written
    seen = set()
    for update in range(4):
        batch = source.batch(spec_of(), 0, update)
        numbers = draw_numbers(SEED, update, ITEMS, 3)
        assert batch.x0.shape == (2, 2, *SHAPE) and batch.sigma.shape == (2, 1, 2)
        np.testing.assert_array_equal(batch.valid, [[True, True], [True, False]])
        x0 = np.asarray(batch.x0).reshape(4, *SHAPE)
        embeddings = np.asarray(batch.text.embeddings).reshape(4, 6, 12)
        assert batch.text.padding == TEXT_ROWS - 6
        for place, number in enumerate(numbers):
            np.testing.assert_array_equal(x0[place], latents[number])
            rows = len(texts[number])
            np.testing.assert_array_equal(embeddings[place, :rows], texts[number])
            assert not embeddings[place, rows:].any()
        seen |= set(numbers.tolist())
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 3), update)
        np.testing.assert_array_equal(jax.random.key_data(batch.key), jax.random.key_data(key))
    assert seen == set(range(ITEMS))


@pytest.mark.parametrize(
    ("values", "numbers", "steps"),
    [
        ({}, (6, 9, 11), {0, 2}),
        ({"sample.shared_noise": True}, (4, 8, 8), {0, 2}),
        ({"sample.sde_window": "one_per_group", "sample.sde_steps": 1}, (6, 9, 11), None),
    ],
    ids=["own noise", "shared noise", "one step a group"],
)
def test_noise_and_levels_of_the_rollout(source, values, numbers, steps):
    """The pairs have the initial noise of the videos in turn, and the levels of the stochastic steps."""
    own = {
        "sample.groups": 3,
        "sample.sde_window": "spaced",
        "sample.steps": 4,
        "data.batch_size": 5,
    }
    own |= {"sample.sde_range": (0, 4), "sample.batch_size": 4, "train.updates_per_epoch": 1}
    spec = tiny_spec(**own | values)
    rollout = Rollout(2, jax.random.key(8), np.array([6, 9, 11]))
    batch = source.batch(spec, 0, 3, rollout)
    plain = source.batch(spec, 0, 3)
    assert jax.tree.structure(batch) == jax.tree.structure(plain)
    for found, wanted in zip(jax.tree.leaves(batch), jax.tree.leaves(plain)):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(batch.x0, plain.x0)
    # as the loss draws it
    size = 5
    for place in range(size):
        m, b = divmod(place, batch.video.shape[1])
        (draw,) = batch.draw
        noise = sample_noise(batch.key, batch.video[m, b : b + 1], draw, SHAPE)
        wanted = initial_noise(rollout.key, jnp.array([numbers[place % 3]]), SHAPE)
        np.testing.assert_array_equal(noise, wanted)
    sigma, timestep = (np.asarray(x).ravel()[:size] for x in (batch.sigma, batch.timestep))
    index = [spec.schedule.sigmas.tolist().index(s) for s in sigma]
    np.testing.assert_array_equal(timestep, spec.schedule.timesteps[index])
    if steps is None:  # each video's own
        (window,) = spec.windows.of_epoch(spec.recipe.seed, 2)
        assert index == [window[0, (6, 9, 11)[place % 3]] for place in range(size)]
    else:
        assert set(index) == steps


def test_only_the_rows_of_its_devices_are_read(source, written, monkeypatch):
    """A process on several hosts reads those of its own devices."""
    read = []

    def latents(self, numbers):
        read.append(numbers.tolist())
        return written[1][numbers]

    monkeypatch.setattr(LatentData, "latents", latents)
    spec = spec_of()
    spec.mesh = devices_mesh(2)
    batch = source.batch(spec, 0, 0)
    first, second, third = draw_numbers(SEED, 0, ITEMS, 3).tolist()
    # the last row of the two micro-batches fills up
    assert sorted(read) == sorted([[first], [second], [third], [first]])
    np.testing.assert_array_equal(batch.x0[0], written[1][[first, second]])


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


# --- an epoch's updates ---------------------------------------------------------------------------


def test_the_share_of_the_data_in_the_loss():
    values = {"policy_loss": -0.5, "kl": 2.0, "data_error": 3.0}
    grpo, nft = tiny_spec().method, NFT(kl_weight=0.1)
    # |w D| / (|policy| + |KL| + |w D|); NFT's logged loss has the KL
    assert data_share(values, grpo, 0.1, 0.2) == {"data_share": pytest.approx(0.6 / 1.3)}
    assert data_share(values, nft, 0.1, 0.2) == {"data_share": pytest.approx(0.6 / (0.7 + 0.8))}
    assert data_share(values | {"kl_weight": 0.0}, nft, 0.1, 0.2)["data_share"] == pytest.approx(
        0.6 / 1.1
    )
    assert data_share({"policy_loss": 1.0, "kl": 0.0}, grpo, 0.1, 0.2) == {}
    assert data_share(values, grpo, 0.1, 0.0) == {"data_share": 0.0}
    assert kl_share(values, grpo, 0.1) == {"kl_share": pytest.approx(0.2 / 0.7)}, "as before"


class Counted:
    """A source that hands out the numbers of its updates."""

    def batch(self, spec, segment, update, rollout=None):
        return (segment, update) if rollout is None else rollout

    batches = DataSource.batches


def test_every_optimiser_step_has_the_data_of_its_number():
    """Counted by the state, so that a run that is resumed goes on with the next ones."""
    spec = tiny_spec(**{"train.updates_per_epoch": 2})
    session, made = session_of(spec, data=Counted())
    rollout = rollout_of(spec)
    credit = compute_credit(spec, scores_of(np.linspace(0, 1, 8)), rollout.prompt_of, {})
    states = states_of(spec)
    for epoch in (1, 2):
        states, _ = update_epoch(session, states, epoch, rollout_of(spec), credit)
    assert [batch.data for batch, _ in made] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert all(batch.method.valid.all() for batch, _ in made)


def test_data_can_have_the_noise_of_the_videos_that_count():
    """data.noise=rollout: of each optimiser step, in the epoch."""
    values = {"train.updates_per_epoch": 2, "data.noise": "rollout", "data.path": "data"}
    spec = tiny_spec(**values)
    session, made = session_of(spec, data=Counted())
    rollout = rollout_of(spec)
    rewards = np.array([0.1, np.nan, 0.3, 0.4, 0.5, 0.5, np.nan, 0.9])
    credit = compute_credit(spec, scores_of(rewards), rollout.prompt_of, {})
    update_epoch(session, states_of(spec), 7, rollout, credit)
    used = [batch.data for batch, _ in made]
    assert [u.epoch for u in used] == [7, 7] and all(u.key is rollout.key for u in used)
    assert [u.videos.tolist() for u in used] == [[0, 2, 3], [4, 5, 7]]


def test_an_epoch_on_data_alone():
    values = {"train.method": "sft", "train.updates_per_epoch": 2, "train.timesteps": 2}
    spec = tiny_spec(**values)
    session, made = session_of(spec, data=Counted())
    states, record = update_epoch(session, states_of(spec), 1, None, None)
    assert made == [((0, 0), {}), ((0, 1), {})] and int(states["transformer"].updates) == 2
    assert record["updates"] == 2 and record["videos_trained"] == 0


# --- without data, and the abstract arrays ---------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of 16 x 32 pictures for Wan 2.1."""
    path = tmp_path_factory.mktemp("wan") / "data"
    write_data(path, (1, 2, 4, 16), height=16, width=32, text_dim=4096)
    return path


@pytest.mark.slow
def test_without_a_weight_the_update_is_the_same_function(folder):
    """Its text, before compilation, is that of a run without data; with a weight it is another."""

    def text(**values):
        program = Functions(tiny_spec(**values)).update(0)
        return program.jitted.lower(*program.args).as_text()

    plain, path = text(), {"data.path": str(folder)}
    assert text(**path | {"data.weight": 0.0}) == plain
    assert text(**path | {"data.weight": 0.1}) != plain


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("method", ["grpo", "sft", "dpo"])
def test_batches_have_the_shapes_that_were_compiled(folder, method, devices):
    """Of another size than the videos; also on two devices, where a row fills the batch up."""
    values = {"train.method": method, "train.timesteps": 2, "train.updates_per_epoch": 1}
    values |= {"data.path": str(folder), "data.batch_size": 3, "data.only": method != "grpo"}
    values |= {"data.labels": "pairs.jsonl"} if method == "dpo" else {}
    spec = dataclasses.replace(
        tiny_spec(**values, **{"sample.height": 64}), mesh=devices_mesh(devices)
    )
    functions = Functions(spec, text_rows=6)
    abstract = functions.update_batch(0)
    if method == "grpo":
        assert isinstance(abstract, data_loss.AnchoredBatch)
        abstract = abstract.data
    table = TextTable((), np.zeros((1, 4096), np.float32), 6)
    data = open_data(folder, MODEL)
    if method == "dpo":
        items = np.arange(2)
        data = dataclasses.replace(data, labels=Labels("pairs", items, items + 2, None, ""))
    made = DataSource.make(data, table, np.float32).batch(spec, 0, 1)
    assert made.valid.sum() == 3 and made.valid.size == (3 if devices == 1 else 4)
    assert jax.tree.structure(made) == jax.tree.structure(abstract)
    for found, wanted in zip(jax.tree.leaves(made), jax.tree.leaves(abstract)):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert made.x0.sharding.is_equivalent_to(abstract.x0.sharding, made.x0.ndim)
    names = [program.name for program in functions.training_steps()]
    assert names == (["rollout step", "update"] if method == "grpo" else ["update"])


def test_streams_of_data_are_their_own():
    assert Stream.DATA_NOISE.value == ("key", 3)
    numbers = [stream.index for stream in Stream if stream.value[0] == "host"]
    assert len(set(numbers)) == len(numbers)
