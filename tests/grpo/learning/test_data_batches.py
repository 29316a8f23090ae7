"""Batches of data: which items, levels and noise an optimiser step has, the shapes that it is compiled
with, and what is the same without data.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo import methods
from grpo.compiled.functions import Functions
from grpo.data.labels import Labels
from grpo.data.latent_folder import LatentData, open_data
from grpo.learning import data_loss
from grpo.learning.data_loss import DataSource, Rollout, draw_numbers, draw_shares
from grpo.random_streams import Stream
from grpo.rollout import initial_noise, sample_noise
from tests.grpo.data_folders import MODEL, write_data
from tests.grpo.data_spec import ITEMS, SEED, spec_of
from tests.grpo.specs import devices_mesh, tiny_spec
from tests.grpo.tiny_policy import SHAPE
from wan_jax.inference.pipeline import TEXT_ROWS, TextTable

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
    first = [draw_shares(SEED, update, 0, 8)[0] for update in range(200)]
    assert {int(8 * share) for share in first} == set(range(8)), "in any order"
    for other in ((SEED + 1, 4, 0), (SEED, 5, 0), (SEED, 4, 1)):
        assert not np.array_equal(draw_shares(*other, 8), shares)


def test_levels_are_those_of_the_method_and_the_expert(source):
    spec = spec_of(batch_size=8, boundary=0.875)
    for segment, inside in ((0, lambda t: t >= 875), (1, lambda t: t < 875)):
        of_rollout = source.batch(spec, segment, 0)
        assert inside(of_rollout.timestep).all()
        # the shares are drawn for each expert
        steps, share = spec.segments[segment].steps, draw_shares(SEED, 0, segment, 8)
        wanted = steps.start + (share * len(steps)).astype(int)
        valid = np.asarray(of_rollout.valid)
        for found, values in (
            (of_rollout.sigma, spec.schedule.sigmas),
            (of_rollout.timestep, spec.schedule.timesteps),
        ):
            np.testing.assert_array_equal(np.asarray(found)[:, 0][valid], values[wanted])
        spec.method.rollout_levels = False
        drawn = source.batch(spec, segment, 0)
        assert inside(drawn.timestep).all()
        assert not np.isin(np.asarray(drawn.sigma), spec.schedule.sigmas).any()
        np.testing.assert_allclose(drawn.timestep, 1000 * drawn.sigma, rtol=1e-6)
        spec.method.rollout_levels = True
        np.testing.assert_array_equal(of_rollout.draw, [spec.segments[segment].expert])


def test_methods_have_the_levels_that_they_train_at():
    """Some those of the rollout's steps, the others logit-normal ones."""
    found = {method.name for method in methods.all_methods() if method.rollout_levels}
    assert found == {"grpo", "nft", "awm", "dgpo"}


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


def test_levels_of_the_rollout_are_those_of_the_experts_stochastic_steps(source):
    values = {"sample.sde_window": "spaced", "sample.steps": 6, "sample.sde_range": (0, 6)}
    values |= {"sample.sde_steps": 3, "data.batch_size": 5}
    spec = tiny_spec("wan2.2-a14b", **values)
    rollout = Rollout(2, jax.random.key(8), np.array([6, 1]))
    for segment, steps in enumerate([{0}, {2, 4}]):
        batch = source.batch(spec, segment, 3, rollout)
        sigma = np.asarray(batch.sigma)[np.asarray(batch.valid)[:, None]]
        assert {spec.schedule.sigmas.tolist().index(s) for s in sigma} == steps


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
@pytest.mark.parametrize(
    "method, alone",
    [("grpo", False), ("dpo", False), ("tgo", False), ("sft", True), ("dpo", True)],
    ids=lambda x: {True: "alone", False: "anchor"}.get(x, x),
)
def test_batches_have_the_shapes_that_were_compiled(folder, method, alone, devices):
    """Of another size than the videos; also on two devices, where a row fills the batch up. An anchor has no
    labels, whatever the method could train on.
    """
    values = {"train.method": method, "train.timesteps": 2, "train.updates_per_epoch": 1}
    values |= {"data.path": str(folder), "data.batch_size": 3, "data.only": alone}
    values |= {"data.labels": "pairs.jsonl"} if alone and method == "dpo" else {}
    spec = dataclasses.replace(
        tiny_spec(**values, **{"sample.height": 64}), mesh=devices_mesh(devices)
    )
    functions = Functions(spec, text_rows=6)
    abstract = functions.update_batch(0)
    if not alone:
        assert isinstance(abstract, data_loss.AnchoredBatch)
        abstract = abstract.data
    table = TextTable((), np.zeros((1, 4096), np.float32), 6)
    data = open_data(folder, MODEL)
    if not alone:
        data = data_loss.open_run_data(spec, MODEL)
        assert data.labels is None
    elif method == "dpo":
        items = np.arange(2)
        data = dataclasses.replace(data, labels=Labels("pairs", items, items + 2, None, ""))
    made = DataSource.make(data, table, np.float32).batch(spec, 0, 1)
    assert made.valid.sum() == 3 and made.valid.size == (3 if devices == 1 else 4)
    assert jax.tree.structure(made) == jax.tree.structure(abstract)
    for found, wanted in zip(jax.tree.leaves(made), jax.tree.leaves(abstract)):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert made.x0.sharding.is_equivalent_to(abstract.x0.sharding, made.x0.ndim)
    names = [program.name for program in functions.training_steps()]
    assert names == (["update"] if alone else ["rollout step", "update"])


def test_streams_of_data_are_their_own():
    assert Stream.DATA_NOISE.value == ("key", 3)
    numbers = [stream.index for stream in Stream if stream.value[0] == "host"]
    assert len(set(numbers)) == len(numbers)
