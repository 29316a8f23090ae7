"""One epoch of the PyTorch loop at a tiny size: that it computes what `grpo` does, from its own draws."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import lora
from grpo.data.prompts import epoch_prompts
from grpo.learning.optimiser import OptimiserConfig, apply_gradient, init_state, make_optimiser
from grpo.learning.policy import COMPILER_OPTIONS, make_policy
from grpo.learning.policy_loss import LossConfig
from grpo.methods.grpo import make_gradient, stack_batches
from grpo.rollout import StepTable, Trajectory, initial_noise
from grpo.scoring.advantages import group_advantages
from grpo.settings import parse
from rewards.base import Score
from rewards.pool import RewardPool
from tests.grpo import tiny_run
from tests.grpo.specs import devices_mesh
from wan_jax.diffusion import sde
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage import lora_files, lora_names, model_dir

pytestmark = [pytest.mark.slow, pytest.mark.parity]
LORA = LoRAConfig(rank=4, alpha=64.0)
VALUES = {
    "sample.guidance": 2.0,
    "sample.sde": "flow_sde",
    "sample.noise_level": 0.7,
    "sample.steps": 4,
    "sample.sde_range": (0, 3),
    "eval.solver": "euler",
    "train.advantage_std": "group",
    "train.updates_per_epoch": 1,
    "train.kl_weight": 0.01,
    "train.clip_low": 0.2,
    "train.clip_high": 0.2,
}


class Brightness:
    """A reward of every picture, since nothing can be read in those of a random model."""

    def score(self, video, targets):
        return Score(float(video.mean()) / 255, "", (0,))


@pytest.fixture(scope="module")
def peer():
    for name in ("peft", "diffusers", "transformers"):
        pytest.importorskip(name)
    import torch

    from benchmarks import peer_training

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that several threads only wait for each other
    yield peer_training
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model in both layouts, `source` and `model`, and a recipe of it."""
    path = tmp_path_factory.mktemp("race")
    tiny_run.write_recipe(tiny_run.make_model(path), path)
    return path


@pytest.fixture(scope="module")
def recipe(folder):
    text = (folder / "recipe.py").read_text()
    return parse.recipe_from_config(tiny_run.config_of(text, **VALUES))


@pytest.fixture(scope="module")
def run(peer, folder, recipe):
    """The PyTorch run before its first epoch, with adapters that matter."""
    from benchmarks.peer_policy import Average

    run = peer.Training(recipe, folder / "source", "fp32", True, "cpu")
    for name, parameter in run.policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    run.average = Average(run.policy, recipe.train.ema_decay)
    return run


@pytest.fixture(scope="module")
def ours(folder, recipe):
    """Our policy of the same model, with its embeddings and steps."""
    model, mesh = model_dir.open_model(folder / "model"), devices_mesh(1)
    frozen = model_dir.build("transformer", model, dtype=jnp.float32, mesh=mesh)[1]
    policy, _ = make_policy(
        model.config("transformer"),
        frozen,
        mesh,
        lora=LORA,
        key=jax.random.key(0),
        dtype=jnp.float32,
        attention="xla",
        remat="none",
    )
    prompts = [
        f'A sign that says "{word}".' for word in tiny_run.WORDS
    ]  # those of training, then those held out
    table = pipeline.embed_prompts(model, prompts)
    schedule = flow_sigmas(recipe.sample.steps, recipe.sample.shift)
    return types.SimpleNamespace(
        policy=policy,
        frozen=frozen,
        table=table,
        steps=StepTable.make(schedule, sde.SDEConfig("flow_sde", 0.7)),
        kernels=lora_names.dense_layers(model.config("transformer")),
    )


def latents(tensor):
    """Return [B, C, F, H, W] in PyTorch as [B, F, H, W, C] here."""
    return jnp.asarray(tensor.detach().numpy().transpose(0, 2, 3, 4, 1))


def adapters(run, ours, arrays):
    """Return arrays of PEFT's trained parameters, in their order, as arrays of our policy."""
    names = [name for name, p in run.policy.model.named_parameters() if p.requires_grad]
    tensors = {name: array.detach().numpy().copy() for name, array in zip(names, arrays)}
    settings = lora.peft_settings(LORA, ours.kernels)
    file = lora_files.from_tensors(tensors, settings, ours.kernels, "peer")
    found = lora.fit(file, LORA, ours.kernels)
    assert found.keys() == ours.policy.trainable.keys()
    return sharding_lib.shard_params(found, devices_mesh(1))


def texts(ours, indices) -> TextBatch:
    table = ours.table
    rows = table.padded([table.prompts[i] for i in indices])
    padding = pipeline.TEXT_ROWS - table.rows
    return TextBatch(jnp.asarray(rows), jnp.asarray(table.padded([table.negative])[0]), padding)


@pytest.fixture(scope="module")
def forward(ours):
    """Our velocity: (adapters, x, step, text) -> [B, ...]."""
    policy, frozen, table = ours.policy, ours.frozen, ours.steps

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(trainable, x, step, text):
        t = jnp.asarray(table.timestep)[step]
        return velocity(policy.module(trainable, frozen), x, t, text, VALUES["sample.guidance"])

    return run


@pytest.fixture(scope="module")
def epoch(peer, run):
    """The batches and rewards of the first epoch."""
    with RewardPool(Brightness) as pool:
        return run.rollout(1, pool, peer.Clock("cpu"))


def test_the_text_is_the_same(run, ours):
    for i, rows in enumerate(ours.table.prompts):
        theirs = run.table.prompts[i, : len(rows)].numpy()
        # fp32 through two layers of another framework
        np.testing.assert_allclose(theirs, rows, atol=1e-5 * np.abs(rows).max())


def test_log_probs_of_the_rollout(run, ours, forward, epoch, recipe):
    batches, _ = epoch
    trainable, table = adapters(run, ours, run.policy.trained), ours.steps
    chosen = epoch_prompts(recipe.seed, 0, len(run.prompts), recipe.sample.groups)
    prompt_of = np.repeat(chosen, recipe.sample.group_size).reshape(len(batches), -1)
    for (transitions, _, _), rows in zip(batches, prompt_of):
        assert len(transitions) == recipe.sample.sde_steps
        for kept in transitions:
            v = forward(trainable, latents(kept.x), kept.step, texts(ours, rows))
            _, sigma, sigma_next, g = table.at(kept.step)
            mean, std = sde.sde_mean_std(latents(kept.x), v, sigma, sigma_next, g)
            log_prob = sde.log_prob(latents(kept.x_next), mean, std)
            # an error of 1e-5 of v moves z by 1e-5 |dt| / std, and the mean of z^2 / 2 by less
            np.testing.assert_allclose(kept.log_prob.numpy(), log_prob, atol=2e-5)
            z = (latents(kept.x_next) - mean) / std
            assert abs(float(z.std()) - 1) < 0.2


def test_advantages_of_the_groups(epoch, recipe):
    batches, rewards = epoch
    theirs = np.concatenate([advantages.numpy() for _, _, advantages in batches])
    groups = np.repeat(np.arange(recipe.sample.groups), recipe.sample.group_size)
    valid = np.ones(rewards.size, bool)
    ours = group_advantages(rewards.flatten(), groups, valid, std="group", clip=5.0)
    assert np.ptp(theirs) > 1
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)  # float64, rounded once


def test_deterministic_steps_of_an_evaluation(run, ours, forward, peer):
    import torch

    trainable, table = adapters(run, ours, run.policy.trained), ours.steps
    rows, shape = np.arange(4), np.moveaxis(np.empty(run.shape), 0, -1).shape
    x = initial_noise(jax.random.key(1), rows, shape)
    noise = torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())
    theirs, kept = peer.sample(run.policy, noise, run.table.text(rows), ())
    for step in range(len(table.timestep)):
        v = forward(trainable, x, step, texts(ours, rows))
        x = x + v * (table.sigma_next[step] - table.sigma[step])
    assert not kept
    # fp32 through four steps
    np.testing.assert_allclose(latents(theirs), x, atol=3e-5 * float(jnp.abs(x).max()))


def test_gradient_update_and_average(run, ours, epoch, recipe, monkeypatch):
    batches, _ = epoch
    before, table = adapters(run, ours, run.policy.trained), ours.steps
    # PyTorch
    ratios = run.policy.accumulate(batches, run.kl)
    assert float((ratios - 1).abs().max()) < 1e-5  # fp32: one layout of the batch
    theirs = adapters(run, ours, [p.grad for p in run.policy.trained])
    # ours, from the same steps
    chosen = epoch_prompts(recipe.seed, 0, len(run.prompts), recipe.sample.groups)
    prompt_of = np.repeat(chosen, recipe.sample.group_size).reshape(len(batches), -1)

    def stacked(values):
        return jnp.stack([*values])

    trajectories = [
        Trajectory(
            x=stacked(latents(kept.x) for kept in transitions),
            x_next=stacked(latents(kept.x_next) for kept in transitions),
            log_prob=stacked(jnp.asarray(kept.log_prob.numpy()) for kept in transitions),
            step=jnp.asarray([kept.step for kept in transitions], jnp.int32),
            text=texts(ours, rows),
        )
        for (transitions, _, _), rows in zip(batches, prompt_of)
    ]
    advantages = np.stack([advantages.numpy() for _, _, advantages in batches])
    batch = stack_batches(trajectories, advantages, np.ones(advantages.shape, bool))
    loss = LossConfig(clip_low=0.2, clip_high=0.2, kl_beta=recipe.train.kl_weight)
    gradient = make_gradient(ours.policy, table, recipe.sample.guidance, loss)
    optimiser = OptimiserConfig(learning_rate=recipe.train.learning_rate)
    state = init_state(before, optimiser)
    options = COMPILER_OPTIONS | {"xla_backend_optimization_level": 0}
    found, metrics = jax.jit(gradient, compiler_options=options)(
        before, state.gradient_inputs(), ours.frozen, batch
    )
    assert metrics.averages()["kl"] > 1e-4
    norm = np.sqrt(sum(float((v**2).sum()) for v in found.values()))
    for name, value in found.items():
        # fp32 through two blocks, forward and backward, and cancellation between videos
        assert np.linalg.norm(theirs[name] - value) < 2e-4 * norm, name
    # AdamW after clipping, and the average, from PyTorch's gradient
    import torch

    torch.nn.utils.clip_grad_norm_(run.policy.trained, run.policy.options.max_norm)
    run.policy.optimiser.step()
    run.policy.optimiser.zero_grad()
    run.average.update()
    after, _ = apply_gradient(make_optimiser(optimiser), 0.9, state, theirs, {})
    for theirs_after, ours_after in (
        (run.policy.trained, after.trainable),
        (run.average.values, after.ema),
    ):
        for name, value in adapters(run, ours, theirs_after).items():
            # a step has the size of the learning rate; fp32 rounds weights of about 1
            np.testing.assert_allclose(value, ours_after[name], atol=1e-3 * 1e-4 + 3e-7, rtol=0)


def test_settings_that_the_loop_lacks_are_refused(peer, folder):
    text = (folder / "recipe.py").read_text()
    for key, value in (("train.objective", "guard"), ("sample.sde", "cps")):
        config = tiny_run.config_of(text, **VALUES | {key: value})
        with pytest.raises(UserError, match=f"{key}={value}"):
            peer.check(parse.recipe_from_config(config))


def test_a_run_writes_what_the_race_reads(peer, folder):
    from benchmarks import race_tables

    values = {"epochs": 2, "eval.every": 1, "run_dir": str(folder / "run"), "sample.height": 64}
    config = tiny_run.config_of((folder / "recipe.py").read_text(), **VALUES | values)
    peer.train(parse.recipe_from_config(config), folder / "source", "autocast", False, "cpu")
    found = race_tables.measure(folder / "run", 0.15, 0.0, "limit")
    assert [point[0] for point in found["curve"]] == [0, 1, 2] and found["epoch"] == 2
    assert found["curve"][2][1] > found["curve"][1][1] > 0 and found["compile"] > 0
    assert found["device"].startswith("cpu, torch") and found["seconds"] > 0
    assert set(found["stages"]) == {"sample", "decode", "score_wait", "update"}
