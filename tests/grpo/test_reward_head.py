"""The reward head: it learns a reward that latents show, its gradient is the shift, and the shift
raises the reward.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from grpo.data.prompts import load_prompts
from grpo.reward_head import LEVELS, Examples, check_one_size, collect, explained, fit, train
from tests.grpo import tiny_policy
from tests.grpo.specs import tiny_spec
from wan_jax.command_line.cli import UserError
from wan_jax.diffusion.solvers import make_solver
from wan_jax.inference import pipeline, reward_guidance
from wan_jax.models import flat_params
from wan_jax.storage.trained_weights import load_transformers

pytestmark = pytest.mark.slow
SHAPE, PADDING = (1, 4, 4, 4), 10
TEXT = tiny_policy.text_batch(4)


@pytest.fixture(scope="module")
def head():
    """Taught that a video is worth the mean of its first channel; with the data."""
    rng = np.random.default_rng(0)
    rewards = rng.standard_normal(64)
    latents = rng.standard_normal((64, *SHAPE)).astype(np.float32)
    latents[..., 0] += (
        rewards[:, None, None, None] - latents[..., 0].mean((1, 2, 3))[:, None, None, None]
    )
    text = np.zeros((64, 6, 12), np.float32)
    config = reward_guidance.head_config(tiny_policy.CONFIG, heads=1, layers=1)
    fresh = reward_guidance.make_head(config)
    trained = fit(
        fresh, Examples(latents, text, PADDING, rewards), updates=300, batch=32, rate=3e-3, seed=0
    )
    return trained, latents, text, rewards


def test_what_latents_show_is_learnt(head):
    trained, latents, text, rewards = head
    shares = explained(trained, Examples(latents, text, PADDING, rewards), 24, rewards.mean())
    assert (
        list(shares) == list(LEVELS)
        and shares[0.1] > 0.8
        and shares[0.1] > shares[0.5] > shares[0.9]
    )


def test_the_shift_is_the_gradient_times_the_noise_ratio(head):
    trained, latents, *_ = head
    x, way = jnp.asarray(latents[:4]), jax.random.normal(jax.random.key(1), (4, *SHAPE))
    reward = jax.jit(lambda x: reward_guidance.predict(trained, x, 300.0, TEXT))
    shift = jax.jit(lambda x, sigma, text: reward_guidance.shift(trained, x, sigma, 300.0, text))
    slope = np.asarray(reward(x + 1e-2 * way) - reward(x - 1e-2 * way), np.float64) / 2e-2
    for sigma, factor in ((0.3, 3 / 7), (0.75, 3.0), (0.999999, 10.0), (1.0, 10.0), (0.0, 0.0)):
        found = np.asarray(shift(x, sigma, TEXT) * way).sum((1, 2, 3, 4))
        np.testing.assert_allclose(found, factor * slope, rtol=2e-2, atol=2e-3)
    alone = shift(x[:1], 0.3, dataclasses.replace(TEXT, embeddings=TEXT.embeddings[:1]))
    np.testing.assert_allclose(alone, shift(x, 0.3, TEXT)[:1], atol=1e-5)


def test_a_head_of_the_models_first_blocks():
    """Their weights and the embeddings' in fp32, adapters left out, a last layer of its own; it
    learns from there.
    """
    policy, trainable, frozen = tiny_policy.setup(dtype=jnp.bfloat16)
    adapted = nnx.split(policy.module(trainable, frozen))[1]
    head = reward_guidance.from_model(tiny_policy.CONFIG, adapted, 1)
    theirs, ours = flat_params.flatten(frozen), flat_params.flatten(nnx.state(head, nnx.Param))
    assert (
        head.config.num_layers == 1 < tiny_policy.CONFIG.num_layers
        and head.config.out_channels == 1
    )
    patch, width = tiny_policy.CONFIG.patch_size, theirs["proj_out/kernel"].shape[0]
    assert ours["proj_out/kernel"].shape == (width, np.prod(patch))  # one output a patch element
    for name, value in ours.items():
        assert value.dtype == jnp.float32
        if not name.startswith("proj_out/"):
            np.testing.assert_array_equal(
                value, theirs[name][:1] if name.startswith("blocks/") else theirs[name]
            )
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((64, *SHAPE)).astype(np.float32)
    data = Examples(
        latents, np.zeros((64, 6, 12), np.float32), PADDING, latents[..., 0].mean((1, 2, 3))
    )
    shares = [train(head, data, 8, updates=updates, rate=1e-3, seed=0)[1] for updates in (1, 60)]
    assert shares[1][0.1] > shares[0][0.1]
    with pytest.raises(
        ValueError, match=f"layers=9 must be from 1 to {tiny_policy.CONFIG.num_layers}"
    ):
        reward_guidance.from_model(tiny_policy.CONFIG, frozen, 9)


def test_guidance_raises_the_reward(head):
    trained, solver = head[0], make_solver("unipc", 6, 3.0)
    policy, trainable, frozen = tiny_policy.setup()
    noise = jax.random.normal(jax.random.key(2), (4, *SHAPE))

    def sample(steer):
        step = pipeline.make_ode_step(policy.module, solver, 1.0, steer)
        state = solver.init(jnp.copy(noise))
        for i in range(6):
            state = step((trainable, frozen), state, i, TEXT)
        return np.asarray(state.x)

    plain, guided = sample(None), sample(lambda *args: reward_guidance.shift(trained, *args))
    assert (guided[..., 0].mean((1, 2, 3)) > plain[..., 0].mean((1, 2, 3)) + 0.1).all()


def test_examples_have_the_text_and_the_reward_of_their_own_video(start, tmp_path):
    """The reward is the brightness of a video and the length of its prompt."""
    words = ("sea", "harbour", "at night")
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f'A sign that says "{word}".\n' for word in words))
    spec, model, *_ = start(
        1,
        **{
            "prompts.train": str(path),
            "reward.workers": 1,
            "reward.own": (("own", "tests.rewards.own_rewards:Parts"),),
            "reward.own_weights": (("own", 1.0),),
            "reward.weights.ocr": None,
            "reward.panel": (),
        },
    )
    recipe, settings = spec.recipe, spec.settings
    weights = load_transformers(model, None, settings.dtype, spec.backend, spec.mesh, "never")
    found = collect(spec, model, weights, 16, lambda rows, **_: rows)
    assert len(found) == 16 and found.latents.shape == (16, *spec.shape)
    vae, state = pipeline.load_vae(model, spec.mesh)
    frames = pipeline.make_decoder(vae)(state, jnp.asarray(found.latents))().frames
    lengths = found.rewards - frames.reshape(16, -1).mean(1) - 16.0  # frames a second
    prompts = load_prompts(path, lambda prompt: ()).prompts
    table = pipeline.embed_prompts(model, prompts, recipe.prompts.negative, dtype=settings.dtype)
    texts = table.padded(table.prompts)
    own = [next(i for i, text in enumerate(texts) if np.array_equal(text, t)) for t in found.text]
    # decoded in another batch: a unit of few of the pixels
    np.testing.assert_allclose(lengths, [len(prompts[i]) for i in own], atol=0.1)
    assert sorted(np.bincount(own)) == [5, 5, 6]


def test_videos_of_several_sizes_are_refused():
    large = {"eval.height": 32, "eval.width": 32, "eval.shift": 3.0}
    check_one_size(tiny_spec(**{"eval.more_sizes": ((32, 32, 1),), "eval.frames": 5}))
    check_one_size(tiny_spec(**large, **{"sample.height": 32, "sample.width": 32}))
    for values in (large, large | {"sample.size_schedule": ((2, 32, 32, 3.0),)}):
        with pytest.raises(UserError, match=r"sample\.size_schedule=.*eval\.height=32"):
            check_one_size(tiny_spec(**values))


def test_a_file_holds_a_head(head, tmp_path):
    path, x = tmp_path / "head.safetensors", jnp.asarray(head[1][:4])
    reward_guidance.save_head(path, head[0])
    again = reward_guidance.load_head(path, tiny_policy.CONFIG)
    ours, theirs = (reward_guidance.predict(h, x, 500.0, TEXT) for h in (again, head[0]))
    np.testing.assert_array_equal(ours, theirs)  # one function, equal weights
    steer = reward_guidance.guidance(path, 2.5, tiny_policy.CONFIG)
    np.testing.assert_allclose(
        steer(x, 0.5, 500.0, TEXT),
        2.5 * reward_guidance.shift(head[0], x, 0.5, 500.0, TEXT),
        rtol=1e-6,
    )
    assert reward_guidance.guidance(None, 2.5, tiny_policy.CONFIG) is None
    with pytest.raises(UserError, match="text_dim=12, this model has 4096"):
        reward_guidance.load_head(path, dataclasses.replace(tiny_policy.CONFIG, text_dim=4096))
    (tmp_path / "other").write_bytes(b"nothing")
    for name in ("other", "none"):
        with pytest.raises(UserError, match=r"is not a reward head .*grpo\.reward_head"):
            reward_guidance.load_head(tmp_path / name, tiny_policy.CONFIG)
