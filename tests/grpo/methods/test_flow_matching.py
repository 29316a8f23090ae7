"""DiffusionNFT, Flow-DPO, Flow-RWR and SFT: losses, selections and noise levels by their formulas,
and whole runs.
"""

import dataclasses
import functools
import math
import pathlib
import shutil
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grpo.methods.flow_matching import ForwardConfig, noise_levels

from configs import tiny_ocr, wan21_1_3b_ocr, wan22_a14b_ocr
from grpo import train
from grpo.compiled import costs
from grpo.compiled.functions import Run
from grpo.learning.optimiser import Held
from grpo.methods import flow_matching, selection
from grpo.rollout import sample_noise
from grpo.sde_windows import step_quotas
from grpo.settings import parse
from tests import reference
from tests.grpo import test_programs, test_update
from tests.grpo.test_train import arrays_of, assert_same, result
from wan_jax.command_line.cli import UserError
from wan_jax.diffusion.experts import segments
from wan_jax.diffusion.guidance import velocity
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.models import presets

start = test_programs.start
SHAPE = test_update.SHAPE


def test_half_optimal_videos_leave_the_old_policy_alone():
    """And at the old policy better than half pulls towards the video, worse pushes away from it."""
    rng = np.random.default_rng(0)
    x0, noise, v = (jnp.asarray(rng.standard_normal((3, 2, 4)), jnp.float32) for _ in range(3))
    sigma = jnp.array([0.2, 0.5, 0.9])
    x = (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * noise

    def gradient(r):
        return jax.grad(
            lambda new: flow_matching.nft_loss(x, x0, sigma, new, v, jnp.full(3, r), 0.3).sum()
        )(v)

    better, half, worse = map(gradient, (1.0, 0.5, 0.0))
    assert np.abs(half).max() < 1e-6 < 1e-3 < np.abs(better).max()
    np.testing.assert_allclose(better, -worse, atol=1e-6)
    assert (np.asarray(better * (v - (noise - x0))).sum((1, 2)) > 0).all()


def test_a_group_decides_who_is_trained_on():
    rewards = np.array([0.2, 0.9, 0.4, 0.5, 0.5, 0.5, 0.3, 1.0, -2.0])
    valid = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1], bool)
    best, worst, spread = selection.best_and_worst(rewards, valid, 3)
    assert (
        best.tolist() == [1, 3, 6]
        and worst.tolist() == [0, 3, 8]
        and spread.tolist() == [True, False, True]
    )
    none = selection.best_and_worst(rewards, np.zeros(9, bool), 3)
    assert not none[2].any()
    for temperature in (1.0, 0.1):
        weights = selection.regression_weights(rewards, valid, 3, temperature)
        np.testing.assert_allclose(
            weights, reference.regression_weights(rewards, valid, 3, temperature), rtol=1e-6
        )
    assert (selection.regression_weights(rewards * 1e4, np.zeros(9, bool), 3, 1.0) == 0).all()
    np.testing.assert_allclose(
        selection.optimality(np.array([-9.0, -2.5, 0.0, 5.0]), 5.0), [0, 0.25, 0.5, 1]
    )


@pytest.mark.parametrize(
    "rows, updates, batch, shards, expected",
    [
        (48, 1, 9, 1, (6, 8)),
        (8, 1, 32, 1, (1, 8)),
        (8, 2, 32, 3, (1, 6)),
        (64, 1, 32, 4, (2, 32)),
        (10, 2, 4, 1, (2, 3)),
    ],
)
def test_batches_hold_every_row_once(rows, updates, batch, shards, expected):
    assert selection.layout(rows, updates, batch, shards) == expected
    whole = selection.Selection(
        np.arange(rows) + 100, None, np.arange(rows, dtype=np.float32), np.ones(rows, bool)
    )
    parts = whole.batches(updates, batch, shards)
    assert len(parts) == updates and all(p.videos.shape == p.valid.shape == expected for p in parts)
    counted = [np.sort(p.videos[p.valid]) for p in parts]
    # in the same update whatever the devices
    np.testing.assert_array_equal(np.concatenate(counted), whole.videos)
    assert all((p.videos == p.weight + 100).all() for p in parts)


def test_noise_levels_lie_with_their_expert_and_cover_it():
    schedule = flow_sigmas(20, 12.0)
    parts, quotas = segments(schedule.timesteps, 0.875), (3, 2)
    for method in ("nft", "dpo"):
        draw = functools.partial(
            noise_levels,
            ForwardConfig(method),
            7,
            3,
            4000,
            parts=parts,
            quotas=quotas,
            schedule=schedule,
            boundary=0.875,
        )
        first, second = draw(expert=0), draw(expert=1)
        assert (
            first.sigma.shape == (4000, 3)
            and second.sigma.shape == (4000, 2)
            and first.sigma.dtype == np.float32
        )
        assert first.timestep.min() >= 875 > second.timestep.max() and second.sigma.min() >= 0
        assert first.draw.tolist() == [0, 1, 2] and second.draw.tolist() == [3, 4]
        # strata, in their order
        assert (np.diff(first.sigma.mean(0)) * (-1 if method == "nft" else 1) > 0).all()
        np.testing.assert_array_equal(draw(expert=0).sigma, first.sigma)
    with pytest.raises(
        ValueError, match=r"train\.timesteps=1 must be from 2 .* to 20 \(.* in the rollout\)"
    ):
        step_quotas(parts, ("one", "two"), ("one", "two"), 1, 0, 20, "train.timesteps")
    steps = noise_levels(
        ForwardConfig("nft"), 0, 1, 9, 0, segments(schedule.timesteps, None), (20,), schedule, None
    )
    # as many as steps: each once
    np.testing.assert_array_equal(steps.sigma, np.tile(schedule.sigmas[:-1], (9, 1)))
    whole = noise_levels(
        ForwardConfig("rwr"), 0, 1, 999, 0, segments(schedule.timesteps, None), (4,), schedule, None
    )
    normal = NormalDist()
    for level in (0.1, 0.5, 0.8):
        assert np.mean(whole.sigma < level) == pytest.approx(
            normal.cdf(math.log(level / (1 - level))), abs=0.02
        )


@pytest.fixture(scope="module")
def model():
    """(policy, new weights, old weights, frozen)."""
    policy, old, frozen = test_update.setup()
    new = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(9), p.shape), old)
    return policy, new, old, frozen


def batch_of(config, weight, valid, updates=1):
    """(batch, latents) of four groups of two in batches of four, two noise levels each."""
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    latents = [jax.random.normal(jax.random.key(i), (4, *SHAPE)) for i in range(2)]
    numbers = np.arange(8)
    chosen = (
        selection.Selection(numbers, None, weight, valid)
        if config.method != "dpo"
        else selection.Selection(numbers[::2], numbers[1::2], weight[::2], valid[::2])
    )
    (chosen,) = chosen.batches(1, 4, 1)
    schedule = flow_sigmas(4, 3.0)
    levels = noise_levels(
        config, 0, 1, 8, 0, segments(schedule.timesteps, None), (2,), schedule, None
    )
    texts = [test_update.text_batch(chosen.videos.shape[1])] * len(chosen.videos)
    return flow_matching.stack(
        chosen, latents, texts, levels, jax.random.key(5), mesh
    ), np.concatenate(latents)


@pytest.mark.parametrize(
    "config",
    [
        ForwardConfig("nft", nft_beta=0.3, kl_beta=0.1),
        ForwardConfig("dpo", dpo_beta=30.0),
        ForwardConfig("rwr", kl_beta=0.1),
        ForwardConfig("rwr", kl_beta=0.1, guided=True),
    ],
    ids=lambda c: c.method + "-guided" * c.guided,
)
def test_loss_and_gradient_of_an_update(model, config):
    policy, new, old, frozen = model
    old, guidance = old if config.keeps_old else None, 3.0 if config.guided else 1.0
    weight, valid = np.linspace(0, 1, 8, dtype=np.float32), np.array([1, 1, 1, 1, 0, 1, 1, 1], bool)
    held = Held(old=old)
    batch, x0 = batch_of(config, weight, valid)
    gradient = jax.jit(flow_matching.make_gradient(policy, config, guidance))
    grads, metrics = gradient(new, held, frozen, batch)

    # the loss, row by row
    @jax.jit
    def velocities(x0, sigma, noise, timestep):
        modules = [
            policy.module(new, frozen),
            policy.reference(frozen),
            policy.module(old or new, frozen),
        ]
        text = test_update.text_batch(4)
        return [
            velocity(module, (1 - sigma) * x0 + sigma * noise, timestep, text, guidance)
            for module in modules
        ]

    losses = []
    for m in range(batch.video.shape[0]):
        for k, draw in enumerate(batch.draw):
            numbers, sigma = np.asarray(batch.video[m]), batch.sigma[m, k].reshape(-1, 1, 1, 1, 1)
            noise = sample_noise(
                jax.random.fold_in(jax.random.key(5), flow_matching.KEY),
                batch.video[m],
                draw,
                SHAPE,
            )
            level = sigma, noise, batch.timestep[m, k]
            v, v_ref, v_old = (np.asarray(v, np.float64) for v in velocities(x0[numbers], *level))
            v_worse = velocities(x0[numbers + 1], *level) if config.method == "dpo" else None
            for b in np.flatnonzero(batch.valid[m]):
                n, e, s = numbers[b], np.asarray(noise[b], np.float64), float(sigma[b, 0, 0, 0, 0])
                if config.method == "dpo":
                    pairs = (x0[n], e, v[b], v_ref[b]), (x0[n + 1], e, v_worse[0][b], v_worse[1][b])
                    losses.append(reference.dpo_loss(*pairs, 30.0))
                    continue
                if config.method == "nft":
                    loss = 5.0 * reference.nft_loss(x0[n], e, s, v[b], v_old[b], weight[n], 0.3)
                else:
                    loss = weight[n] * np.mean((v[b] - (e - x0[n])) ** 2)
                losses.append(loss + 0.1 * np.mean((v[b] - v_ref[b]) ** 2))
    assert float(metrics.count) == len(losses) == (6 if config.method == "dpo" else 14)
    assert metrics.averages()["policy_loss"] == pytest.approx(np.mean(losses), rel=1e-4)

    # the gradient is the loss's slope, where nothing of it is held constant
    if config.method != "nft":
        way = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape) * 1e-3, new)
        ends = [
            gradient(
                jax.tree.map(lambda p, d, side=side: p + side * d, new, way), held, frozen, batch
            )[1]
            for side in (1, -1)
        ]
        slope = (ends[0].averages()["policy_loss"] - ends[1].averages()["policy_loss"]) / 2
        assert slope == pytest.approx(sum(float((grads[k] * way[k]).sum()) for k in way), rel=1e-2)

    # what is masked has no say
    mask = np.asarray(batch.valid)[..., None, None, None, None]
    other, _ = gradient(
        new, held, frozen, dataclasses.replace(batch, x0=jnp.where(mask, batch.x0, 1e3))
    )
    for name in grads:
        np.testing.assert_array_equal(grads[name], other[name])
    nothing, _ = gradient(
        new, held, frozen, dataclasses.replace(batch, valid=jnp.zeros_like(batch.valid))
    )
    assert all((np.asarray(g) == 0).all() for g in nothing.values())
    # optimality 1/2 everywhere, at the old policy, which is the base model here
    if config.method == "nft":
        bases = {k: v * (0 if k.endswith("lora_b") else 1) for k, v in old.items()}
        half = dataclasses.replace(batch, weight=jnp.full_like(batch.weight, 0.5))
        still, _ = gradient(bases, Held(old=bases), frozen, half)
        assert max(float(jnp.abs(g).max()) for g in still.values()) < 1e-5
        assert max(float(jnp.abs(g).max()) for g in grads.values()) > 1e-3


def test_how_the_old_weights_follow():
    nft = ForwardConfig("nft", old_rate=0.01, old_most=0.05)
    kept = [nft.old_kept(updates, updates % 2 == 0) for updates in range(1, 9)]
    assert kept == [(1.0,), (0.02,), (1.0,), (0.04,), (1.0,), (0.05,), (1.0,), (0.05,)]
    online = ForwardConfig("dpo", reference_every=3)
    assert [online.old_kept(updates, updates % 2 == 0)[0] for updates in range(1, 7)] == [
        1,
        1,
        0,
        1,
        1,
        0,
    ]
    assert online.keeps_old and not online.needs_reference
    for config in (ForwardConfig("dpo"), ForwardConfig("rwr")):
        assert config.old_kept(1, True) == () and not config.keeps_old
    assert ForwardConfig("dpo").needs_reference and not ForwardConfig("rwr").needs_reference


def test_nft_samples_with_the_old_policy_and_resumes_bit_for_bit(start, capsys):
    """Two devices, two updates an epoch; after each epoch the old policy has followed by the
    formula.
    """
    c, s, *rest = start(2, **{"train.method": "nft", "train.timesteps": 2, "train.old_rate": 0.1})
    run = pathlib.Path(c.run_dir)
    train.train(c, s, *rest)
    last = result(run)
    shutil.rmtree(run / "checkpoints" / "2")  # as if killed before it was saved
    first = arrays_of(run)
    for name in [n for n in first if "'old'" in n]:
        new, old = last[1][name.replace("'old'", "'trainable'")], first[name]
        np.testing.assert_allclose(last[1][name], 0.4 * old + 0.6 * new, atol=1e-7, err_msg=name)
        assert name.endswith("lora_a']") or np.abs(last[1][name] - new).max() > 0
    assert sum("'old'" in n for n in first) == sum("'trainable'" in n for n in first) > 0
    train.train(c, s, *rest)
    assert_same(result(run), last)
    out = capsys.readouterr().out
    assert (
        "continuing" in out
        and "epoch 2/2" in out
        and "ratio error" not in out
        and "compiled again" not in out
    )


def test_online_dpo_runs(start, capsys):
    """Pairs gathered from two devices, more than there are groups with spread; the reference is the
    last policy.
    """
    c, s, *rest = start(
        2,
        **{
            "train.method": "dpo",
            "train.reference_every": 1,
            "train.timesteps": 1,
            "epochs": 1,
            "train.updates_per_epoch": 1,
        },
    )
    train.train(c, s, *rest)
    arrays = arrays_of(pathlib.Path(c.run_dir))
    assert "epoch 1/1" in capsys.readouterr().out
    for name in [n for n in arrays if "'old'" in n]:
        np.testing.assert_array_equal(arrays[name], arrays[name.replace("'old'", "'trainable'")])
    assert any(np.abs(v).max() > 0 for k, v in arrays.items() if "'old'" in k and "lora_b" in k)


def run_of(module, model, **values):
    recipe = module.get_config()
    recipe.update_from_flattened_dict(values)
    return Run(presets.PRESETS[model], recipe, mesh_lib.make_mesh(devices=jax.devices()[:1]), "xla")


def test_what_is_planned():
    """The programs' batches, the old weights in memory, the reference where one is asked, the
    FLOPs.
    """
    run = run_of(wan22_a14b_ocr, "wan2.2-a14b", **{"train.method": "nft", "train.timesteps": 5})
    batch = run.update_batch(1)
    m, b = run.settings.batches // run.recipe.train.updates_per_epoch, run.recipe.sample.batch_size
    assert batch.x0.shape == (m, b, *run.shape) and batch.sigma.shape == (
        m,
        run.trained_steps(1),
        b,
    )
    assert run.trained_steps(0) + run.trained_steps(1) == 5 and batch.worse is None
    assert run.state.old.keys() == run.state.trainable.keys() and run.updates[0] is run.updates[1]
    assert run.trajectories == (run.latents(),) * run.settings.batches and not run.unstacked
    pairs = run_of(
        wan21_1_3b_ocr,
        "wan2.1-1.3b",
        **{"train.method": "dpo", "lora.rank": 0, "train.kl_weight": 0.0},
    )
    assert (
        pairs.frozen is not None
        and pairs.state.old is None
        and pairs.update_batch(0).worse is not None
    )
    pairs.recipe.train.reference_every = 9
    online = dataclasses.replace(pairs)
    assert online.frozen is None and online.state.old is not None
    grpo, rwr = (
        costs.work(
            run_of(
                wan21_1_3b_ocr,
                "wan2.1-1.3b",
                **{"train.method": method, "train.kl_weight": 0.004, "sample.sde_steps": 4},
            )
        )
        for method in ("grpo", "rwr")
    )
    assert rwr.sample == grpo.sample and rwr.update == pytest.approx(grpo.update / 2)  # no guidance


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("train.method", "ppo", "choose one of grpo, nft, dpo, rwr, sft"),
        ("train.timesteps", 0, "timesteps=0"),
        ("train.timesteps", 11, "train.timesteps=11 must be at most sample.steps=10"),
        ("train.nft_beta", 0.0, "nft_beta"),
        ("sample.shared_noise", True, "all videos of a group would be one"),
        ("train.old_most", 1.0, "old_most=1.0"),
        ("train.dpo_beta", -1.0, "dpo_beta"),
        ("train.temperature", 0.0, "temperature"),
        ("train.reference_every", -1, "reference_every=-1"),
        ("train.kl_weight", -1.0, "train.kl_weight=-1.0"),
        ("train.updates_per_epoch", 2, "does not divide sample.groups=9"),
        ("sample.sde", "cps", "is of Flow-GRPO"),
        (
            "train.objective",
            "guard",
            "objective=guard is of Flow-GRPO: set --config.train.method=grpo",
        ),
    ],
)
def test_bad_settings_are_refused(key, value, message):
    c = tiny_ocr.get_config()
    c.train.method = "dpo"
    c.sample.groups, c.sample.batch_size = 9, 6
    c.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        parse.from_config(c)
