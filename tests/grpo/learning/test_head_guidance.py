"""Reward guidance in the rollout: the shift of a step, the head's update by its formula, what a resumed
run repeats, and settings that are refused.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import tiny_ocr
from grpo.learning.head_guidance import (
    RATE,
    HeadGuidance,
    HeadState,
    fit_error,
    initial_head,
    noised,
    read_structure,
    refit_head,
)
from grpo.random_streams import Stream
from grpo.rollout import make_step
from grpo.settings import parse
from tests.grpo import tiny_policy
from tests.grpo.here import train_here
from tests.grpo.specs import devices_mesh
from tests.grpo.tiny_policy import SHAPE, TABLE
from tests.grpo.tiny_run import MEASURES, PICTURE, arrays_of, assert_same, result, write_recipe
from wan_jax.errors import UserError
from wan_jax.inference import reward_guidance
from wan_jax.models import flat_params
from wan_jax.storage import model_dir

VALID = np.array([True, True, False, True])
REWARDS = np.array([0.5, -1.0, 7.0, 2.0], np.float32)


def write_head(path, model, seed=0) -> str:
    """Write a random head for a model folder, and return its path."""
    opened = model_dir.open_model(model)
    config = reward_guidance.head_config(opened.config("transformer"), heads=1, layers=1)
    about = {"wan_jax_model": opened.fingerprint, "model": str(model)}
    reward_guidance.save_head(path, reward_guidance.make_head(config, seed), about)
    return str(path)


@pytest.fixture(scope="module")
def guidance(tmp_path_factory):
    """(guidance with a weight of 2, the head's state)."""
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    config = reward_guidance.head_config(tiny_policy.CONFIG, heads=1, layers=1)
    reward_guidance.save_head(path, reward_guidance.make_head(config))
    made = HeadGuidance(*read_structure(str(path), tiny_policy.CONFIG), 2.0)
    head = reward_guidance.load_head(path, tiny_policy.CONFIG)
    arrays = flat_params.flatten(nnx.state(head, nnx.Param))
    opt = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made.state.opt)
    return made, HeadState(arrays, opt, jnp.zeros((), jnp.int32))


def test_the_error_is_that_of_the_videos_that_count(guidance):
    made, state = guidance
    head, key, text = made.module(state.arrays), jax.random.key(3), tiny_policy.text_batch(4)
    x0 = jax.random.normal(jax.random.key(1), (4, *SHAPE))
    error = jax.jit(lambda x0, rewards: fit_error(head, key, x0, text, rewards, VALID))
    level_key, noise_key = jax.random.split(key)
    sigma = jax.random.uniform(level_key, (4,))
    s, noise = np.reshape(sigma, (4, 1, 1, 1, 1)), jax.random.normal(noise_key, x0.shape)
    x = (1 - s) * x0 + s * noise
    np.testing.assert_allclose(noised(noise_key, x0, sigma), x, rtol=1e-6, atol=1e-6)
    predicted = np.asarray(reward_guidance.predict(head, x, 1000 * sigma, text), np.float64)
    wanted = np.mean((predicted[VALID] - REWARDS[VALID]) ** 2)
    assert float(error(x0, REWARDS)) == pytest.approx(wanted, rel=1e-4)
    others = jnp.where(VALID[:, None, None, None, None], x0, 50.0), np.where(VALID, REWARDS, 99)
    assert float(error(x0, REWARDS)) == float(error(*others))


def test_updates_repeat_after_a_checkpoint(guidance):
    """Each is a function of (seed, number), and goes on with AdamW's moments."""
    made, state = guidance
    refit = made.make_refit(devices_mesh(1))
    text, x0 = tiny_policy.text_batch(4), jax.random.normal(jax.random.key(1), (4, *SHAPE))

    def run(state, updates, valid=VALID, rewards=REWARDS):
        state = jax.tree.map(jnp.copy, state)  # the update donates it
        for _ in range(updates):
            state = refit(state, jax.random.key(0), x0, text, rewards, valid)
        return state

    whole, half = run(state, 4), run(state, 2)
    assert int(whole.updates) == 4
    stored = jax.tree.map(np.asarray, half.tree())
    again = run(state.of_tree(jax.tree.map(jnp.asarray, stored)), 2)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(again)):
        np.testing.assert_array_equal(one, other)
    # the first step of AdamW moves each weight by its rate, but for those without a gradient
    first = run(state, 1)
    moved = [np.abs(first.arrays[k] - state.arrays[k]).max() for k in state.arrays]
    assert max(moved) == pytest.approx(RATE, rel=0.02)
    # the reward of a video that does not count says nothing
    other = run(state, 1, rewards=np.where(VALID, REWARDS, 99).astype(np.float32))
    for name in first.arrays:
        np.testing.assert_array_equal(first.arrays[name], other.arrays[name])
    # each update has draws of its own
    repeated = run(dataclasses.replace(first, updates=state.updates), 1)
    assert any((repeated.arrays[k] != half.arrays[k]).any() for k in half.arrays)
    # each step goes towards the rewards
    errors = [
        float(fit_error(made.module(each.arrays), jax.random.key(5), x0, text, REWARDS, VALID))
        for each in (state, run(state, 30))
    ]
    assert errors[1] < errors[0]
    # without a video that counts nothing is learnt
    still = run(half, 1, np.zeros(4, bool))
    assert int(still.updates) == 3
    for name in half.arrays:
        np.testing.assert_array_equal(still.arrays[name], half.arrays[name])


def test_a_step_of_the_rollout_is_shifted(guidance):
    """x_next moves by dt times -shift; the head's weights are arguments."""
    made, state = guidance
    policy, trainable, frozen = tiny_policy.setup()
    x, key = jax.random.normal(jax.random.key(2), (4, *SHAPE)), jax.random.key(0)
    text, samples = tiny_policy.text_batch(4), jnp.arange(4)
    plain, guided = (make_step(policy, TABLE, 1.0, head=head) for head in (None, made))
    rest = frozen, x, 1, False, text, key, samples
    t, sigma, sigma_next, _ = TABLE.at(1)
    for factor in (1.0, 3.0):
        arrays = jax.tree.map(lambda a, f=factor: f * a, state.arrays)
        shift = reward_guidance.shift(made.module(arrays), x, sigma, t, text)
        moved = guided((trainable, arrays), *rest)[0] - plain(trainable, *rest)[0]
        assert float(jnp.abs(shift).max()) > 0
        wanted = -2.0 * (sigma_next - sigma) * np.asarray(shift, np.float64)
        # latents of size 1 in float32
        np.testing.assert_allclose(moved, wanted, rtol=1e-3, atol=2e-6)
    assert guided._cache_size() == 1


def test_an_epoch_fits_its_batches_in_turn():
    """Videos without a reward are marked."""
    seen = []

    def refit(head, key, x0, text, rewards, valid):
        seen.append((x0, np.asarray(text).tolist(), np.asarray(rewards), np.asarray(valid)))
        wanted = Stream.HEAD_REFIT.key(jax.random.key(9))
        np.testing.assert_array_equal(*map(jax.random.key_data, (key, wanted)))
        return head + 1

    recipe = types.SimpleNamespace(
        seed=9,
        sample=types.SimpleNamespace(batch_size=2),
        reward=types.SimpleNamespace(head_refit=3),
    )
    spec = types.SimpleNamespace(recipe=recipe, mesh=devices_mesh(1))
    functions = types.SimpleNamespace(spec=spec, refit=refit)
    rollout = types.SimpleNamespace(
        finished=["first", "second"], prompt_of=np.array([4, 4, 7, 7]), texts=lambda p: p
    )
    credit = types.SimpleNamespace(
        valid=np.array([True, False, True, True]), total=np.array([0.5, np.nan, 1.0, 2.0])
    )
    assert refit_head(functions, 0, rollout, credit) == 3
    assert [batch for batch, *_ in seen] == ["first", "second", "first"]
    assert [text for _, text, *_ in seen] == [[4, 4], [7, 7], [4, 4]]
    batches = [([0.5, 0.0], [True, False]), ([1.0, 2.0], [True, True])]
    found = [(rewards.tolist(), valid.tolist()) for *_, rewards, valid in seen]
    assert found == [batches[0], batches[1], batches[0]]
    functions.refit = None
    assert refit_head(functions, 0, rollout, credit) == 0


@pytest.mark.parametrize("method", ["grpo", "awm", "dgpo"])
def test_a_method_with_a_ratio_is_refused(method):
    config = tiny_ocr.get_config()
    config.sample.reward_guidance, config.sample.reward_head = 5.0, "head.safetensors"
    config.sample.sde_steps, config.sample.sde_range = 2, (0, 3)
    parse.recipe_from_config(config)
    config.train.method = method
    with pytest.raises(UserError, match=f"reward_guidance=5.0.*train.method={method}"):
        parse.recipe_from_config(config)


def test_guidance_without_a_head_is_refused():
    config = tiny_ocr.get_config()
    config.sample.reward_guidance = 5.0
    with pytest.raises(UserError, match=r"reward_guidance=5\.0.*reward_head=''"):
        parse.recipe_from_config(config)


def test_the_head_of_another_model_is_refused(model, two_experts, tmp_path):
    """Before the first epoch, though its latents and prompts have the same shapes."""
    path = write_head(tmp_path / "head.safetensors", model)

    def start(folder):
        opened = model_dir.open_model(folder)
        sample = types.SimpleNamespace(reward_guidance=1.0, reward_head=path)
        spec = types.SimpleNamespace(
            recipe=types.SimpleNamespace(sample=sample),
            preset=types.SimpleNamespace(transformer=opened.config("transformer")),
            mesh=devices_mesh(1),
        )
        return initial_head(spec, opened)

    assert int(start(model).updates) == 0
    with pytest.raises(UserError, match=r"head\.safetensors"):
        start(two_experts)


@pytest.mark.slow
def test_a_guided_run_resumes_bit_for_bit(model, tmp_path):
    """Weights, head and its moments, also after a head of another content took the file's place, and with
    confidence as a reward. The evaluation of the base model is that without guidance.
    """
    common = (*MEASURES, *PICTURE, "train.method=nft", "train.timesteps=2", "eval.every=1")
    common += ("eval.num_prompts=2", "eval.previews=1", "sample.reward_guidance=3")
    common += ("reward.head_refit=3", "reward.confidence=0.2")
    results = []
    for name, ends in (("whole", (2,)), ("parts", (1, 2))):
        folder = tmp_path / name
        folder.mkdir()
        config, run = write_recipe(model, folder)
        head = write_head(tmp_path / "head.safetensors", model)
        start = reward_guidance.load_head(head, model_dir.open_model(model).config("transformer"))
        for end in ends:
            if name == "parts" and end == 2:
                write_head(head, model, seed=1)
            train_here(config, *common, f"sample.reward_head={head}", f"epochs={end}")
        results.append(result(run))
    assert_same(*results)
    arrays = arrays_of(run)
    first = flat_params.flatten(nnx.state(start, nnx.Param))
    name = "proj_out/kernel"
    (learnt,) = (
        v
        for k, v in arrays.items()
        if k.startswith("state['reward_head']") and name in k and "arrays" in k
    )
    assert np.abs(learnt - first[name]).max() > 3 * RATE
    (updates,) = (v for k, v in arrays.items() if k == "state['reward_head']['updates']")
    assert updates == 6
    plain = tmp_path / "plain"
    plain.mkdir()
    config, run = write_recipe(model, plain)
    train_here(config, *common, "sample.reward_guidance=0", "epochs=2")
    assert result(run)[2][1][0] == results[0][2][1][0]  # the evaluation of epoch 0
    assert result(run)[2][0] != results[0][2][0]
