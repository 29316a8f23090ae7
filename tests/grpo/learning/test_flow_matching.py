"""The methods that train on finished videos: losses and gradients by their formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.credit import compute_credit
from grpo.learning import finished_batch
from grpo.learning.optimiser import GradientInputs
from grpo.learning.sde_windows import step_quotas
from grpo.learning.selection import Selection
from grpo.methods.awm import AWM
from grpo.methods.dgpo import DGPO
from grpo.methods.dpo import DPO
from grpo.methods.nft import NFT
from grpo.methods.rvm import RVM
from grpo.methods.rwr import RWR
from grpo.methods.sft import SFT
from grpo.methods.tgo import TGO
from grpo.random_streams import Stream
from grpo.rollout import sample_noise
from tests import reference
from tests.grpo import tiny_policy
from tests.grpo.epoch_inputs import rollout_of, scores_of
from tests.grpo.specs import devices_mesh, levels_spec, tiny_spec
from tests.grpo.tiny_policy import SHAPE
from wan_jax.diffusion.experts import segments
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.diffusion.schedule import flow_sigmas


def test_fewer_levels_than_trained_experts_are_refused():
    parts = segments(flow_sigmas(20, 12.0).timesteps, 0.875)
    with pytest.raises(ValueError, match=r"train\.timesteps=1 must be from 2 .* to 20"):
        step_quotas(parts, ("one", "two"), ("one", "two"), 1, 0, 20, "train.timesteps")


@pytest.fixture(scope="module")
def weights():
    """(policy, new weights, old weights, frozen)."""
    policy, old, frozen = tiny_policy.setup()

    @jax.jit
    def moved(old):
        return jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(9), p.shape), old)

    return policy, moved(old), old, frozen


def batch_of(method, weight, valid, cells=None):
    """Return (batch, latents) of four groups of two in batches of four, two noise levels each."""
    latents = [jax.random.normal(jax.random.key(i), (4, *SHAPE)) for i in range(2)]
    numbers = np.arange(8)
    selection = Selection(numbers, None, weight, valid)
    if method.pairs:
        selection = Selection(numbers[::2], numbers[1::2], weight[::2], valid[::2])
    (selected,) = selection.batches(1, 4, 1)
    levels = method.noise_levels(levels_spec(flow_sigmas(4, 3.0), (2,), videos=8), 1, 0)
    texts = [tiny_policy.text_batch(selected.videos.shape[1])] * len(selected.videos)
    key, mesh = jax.random.key(5), devices_mesh(1)
    batch = finished_batch.stack(selected, latents, texts, levels, key, mesh, cells=cells)
    return batch, np.concatenate(latents)


METHODS = {
    "nft": NFT(beta=0.3, kl_weight=0.1),
    "dpo": DPO(beta=30.0),
    "rwr": RWR(kl_weight=0.1),
    "rwr-guided": RWR(kl_weight=0.1, train_guided=True),
    "awm": AWM(kl_weight=0.1, clip=1.0, kl_outside=True),
    "rvm": RVM(kl_weight=0.1),
    "sft": SFT(kl_weight=0.1),
    "tgo": TGO(kl_weight=0.1, temperature=0.1),
    "dgpo": DGPO(kl_weight=0.1, beta=2.0, clip=float("inf")),  # each video is a group here
}


def random_cells():
    """Weights of the cells of eight videos, with a mean of 1, float32 [8, F, H, W, 1]."""
    cells = np.random.default_rng(4).uniform(0.2, 1.8, (8, *SHAPE[:-1], 1))
    return (cells / cells.mean(axis=(1, 2, 3, 4), keepdims=True)).astype(np.float32)


@pytest.mark.slow
def test_a_given_weight_of_the_kl_replaces_the_methods(weights):
    """The loss is linear in it, and the gradient changes; nothing compiles again."""
    policy, new, _, frozen = weights
    method = RWR(kl_weight=5.0)
    batch, _ = batch_of(method, np.linspace(0, 1, 8, dtype=np.float32), np.ones(8, bool))
    gradient = jax.jit(method.make_gradient(policy, None, 1.0))
    (low, at), (high, above) = (
        gradient(new, GradientInputs(jnp.asarray(given), {}), frozen, batch)
        for given in (1.0, 30.0)
    )
    assert gradient._cache_size() == 1
    low, high = tiny_policy.flat_vector(low), tiny_policy.flat_vector(high)
    assert np.abs(high - low).max() > 1e-3 * np.abs(low).max()
    at, above = at.averages(), above.averages()
    assert above["policy_loss"] - at["policy_loss"] == pytest.approx(29 * at["kl"], rel=1e-3)


@pytest.fixture(scope="module")
def velocities_of(weights):
    """A function: velocities_of(guidance) is the jitted function (x0, sigma, noise, timestep) -> the
    velocities of the new weights, the base and the old weights at x_s.
    """
    policy, new, old, frozen = weights

    @functools.cache
    def made(guidance):
        @jax.jit
        def velocities(x0, sigma, noise, timestep):
            modules = (
                policy.module(new, frozen),
                policy.reference(frozen),
                policy.module(old, frozen),
            )
            x, text = (1 - sigma) * x0 + sigma * noise, tiny_policy.text_batch(4)
            return [velocity(module, x, timestep, text, guidance) for module in modules]

        return velocities

    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "by_cell"),
    [(method, name in ("nft", "dpo", "awm", "dgpo", "tgo")) for name, method in METHODS.items()],
    ids=METHODS,
)
def test_loss_and_gradient_of_an_update(weights, velocities_of, method, by_cell):
    policy, new, old, frozen = weights
    guidance = 3.0 if method.guided else 1.0
    weight, valid = np.linspace(0, 1, 8, dtype=np.float32), np.array([1, 1, 1, 1, 0, 1, 1, 1], bool)
    lagged = dict.fromkeys(method.lagged, old)
    if method.name == "awm":  # the average is another copy: the base model
        lagged["average"] = {k: v * (not k.endswith("lora_b")) for k, v in old.items()}
    held = GradientInputs(None, lagged)
    cells = random_cells() if by_cell else None
    batch, x0 = batch_of(method, weight, valid, cells)
    cells = np.ones(8) if cells is None else cells
    gate = np.ones(8, np.float32)
    if by_cell:
        gate[[0, 3, 5]] = 0
        batch = dataclasses.replace(batch, kl_gate=jnp.asarray(gate[np.asarray(batch.video)]))
    gradient = jax.jit(method.make_gradient(policy, None, guidance))
    grads, metrics = gradient(new, held, frozen, batch)

    # the loss, row by row
    velocities = velocities_of(guidance)
    losses, errors, distances = [], [], []
    key = jax.random.fold_in(jax.random.key(5), Stream.RENOISING.index)
    for m in range(batch.video.shape[0]):
        for k, draw in enumerate(batch.draw):
            numbers, sigma = np.asarray(batch.video[m]), batch.sigma[m, k].reshape(-1, 1, 1, 1, 1)
            noise = sample_noise(key, batch.video[m], draw, SHAPE)
            level = sigma, noise, batch.timestep[m, k]
            v, v_ref, v_old = (np.asarray(v, np.float64) for v in velocities(x0[numbers], *level))
            v_worse = velocities(x0[numbers + 1], *level) if method.pairs else None
            for b in np.flatnonzero(batch.valid[m]):
                n, e, s = numbers[b], np.asarray(noise[b], np.float64), float(sigma[b, 0, 0, 0, 0])
                error, old_error, reference_error = (
                    np.mean(cells[n] * (u[b] - (e - x0[n])) ** 2) for u in (v, v_old, v_ref)
                )
                distance = (v[b] - v_ref[b]) ** 2
                if method.kl_outside:  # over the cells without text
                    distance = distance[np.broadcast_to(cells[n] <= 1, distance.shape)]
                errors.append(error)
                distances.append(gate[n] * np.mean(distance))
                if method.pairs:
                    better = x0[n], e, v[b], v_ref[b], cells[n]
                    pairs = better, (x0[n + 1], e, v_worse[0][b], v_worse[1][b], cells[n + 1])
                    losses.append(reference.dpo_loss(*pairs, 30.0))
                    continue
                if method.name == "nft":
                    args = x0[n], e, s, v[b], v_old[b], weight[n], 0.3, cells[n]
                    loss = 5.0 * reference.nft_loss(*args)
                else:
                    loss = weight[n] * error
                    if method.name == "awm":
                        loss = -weight[n] * np.exp(old_error - error)
                    if method.name == "rvm":
                        loss /= 2
                    excess = error - reference_error
                    if method.name == "dgpo":
                        loss /= 1 + np.exp(-2.0 * weight[n] * excess)
                    if method.name == "tgo":
                        loss = weight[n] * np.log1p(np.exp(excess / 0.1))
                losses.append(loss + 0.1 * distances[-1])
    assert float(metrics.count) == len(losses) == (6 if method.pairs else 14)
    averages = metrics.averages()
    assert averages["policy_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    # of the better videos of pairs
    assert averages["flow_error"] == pytest.approx(np.mean(errors), rel=1e-4)
    if method.needs_reference or method.kl_copy is not None:
        assert averages["kl"] == pytest.approx(np.mean(distances), rel=1e-3)

    # the gradient is the loss's slope, where nothing of it is held constant
    if method.name not in ("nft", "dgpo"):
        way = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape) * 1e-3, new)
        ends = [
            gradient(
                jax.tree.map(lambda p, d, side=side: p + side * d, new, way), held, frozen, batch
            )[1].averages()["policy_loss"]
            for side in (1, -1)
        ]
        slope = sum(float((grads[k] * way[k]).sum()) for k in way)
        assert (ends[0] - ends[1]) / 2 == pytest.approx(slope, rel=1e-2)

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
    if method.name == "nft":
        bases = {k: v * (0 if k.endswith("lora_b") else 1) for k, v in old.items()}
        half = dataclasses.replace(batch, weight=jnp.full_like(batch.weight, 0.5))
        still, _ = gradient(bases, GradientInputs(None, {"old": bases}), frozen, half)
        assert max(float(jnp.abs(g).max()) for g in still.values()) < 1e-5
        assert max(float(jnp.abs(g).max()) for g in grads.values()) > 1e-3


LEAST_SPREAD = 0.02  # of the rewards of a group, their standard deviation


def expected_rows(method, rewards, credit):
    """Return (numbers of the videos or better videos that are trained, the weight of each video, the worse
    video of each) of groups of two.
    """
    groups = rewards.reshape(-1, 2)
    differ = np.isfinite(groups).all(1) & (np.ptp(groups, axis=1) > 2 * LEAST_SPREAD)
    trained, ones = np.flatnonzero(differ.repeat(2)), np.ones(16)
    if method in ("sft", "dpo"):
        best, worst = 2 * np.arange(8) + groups.argmax(1), 2 * np.arange(8) + groups.argmin(1)
        worse = dict(zip(best.tolist(), worst.tolist())) if method == "dpo" else {}
        return best[differ].tolist(), ones, worse
    advantages = credit.advantages.astype(np.float64)
    if method == "nft":
        weight = np.clip(advantages / 5, -1, 1) / 2 + 0.5
    elif method == "rwr":
        weight = reference.regression_weights(rewards, differ.repeat(2), 2, 1.0)
    elif method == "tgo":
        away = rewards - np.median(rewards[trained])
        weight = np.where(away >= 0, 1, -1) * (1 + 5 * np.abs(away))
    else:
        weight = {"awm": 1.0, "dgpo": 1.0, "rvm": 0.1}[method] * advantages
    return trained.tolist(), weight, {}


@pytest.mark.parametrize("method", ["nft", "awm", "rvm", "rwr", "tgo", "dgpo", "sft", "dpo"])
def test_rows_are_those_of_their_videos(method):
    """Latents, prompts, levels, weights and gates of eight groups of two in batches of four, two updates of
    each of two experts; one group is equal, one has less spread than train.min_group_std, and one video has
    no reward.
    """
    values = {"train.method": method, "train.timesteps": 3, "sample.steps": 8}
    values |= {"sample.groups": 8, "sample.group_size": 2, "sample.batch_size": 4}
    values |= {"train.kl_gate": 0.4, "train.kl_weight": 0.1, "reward.panel": ("dark",)}
    values |= {"train.min_group_std": LEAST_SPREAD}
    spec = tiny_spec("wan2.2-a14b", **values)
    numbers, prompts = np.arange(16), np.repeat([7, 2, 0, 5, 1, 6, 3, 4], 2)
    finished = [
        jnp.broadcast_to(part.reshape(4, 1, 1, 1, 1), (4, *spec.shape)).astype(jnp.float32)
        for part in np.split(numbers, 4)
    ]
    rewards = np.random.default_rng(0).random(16)
    rewards[2:4], rewards[6:8], rewards[11] = (0.30, 0.31), 0.5, np.nan
    scores = scores_of(rewards, {"dark": np.random.default_rng(1).random(16)})
    credit = compute_credit(spec, scores, prompts, {"dark": (0.5, 0.1)})
    assert credit.spread.sum() == 10 and 0 < credit.kl_gate.sum() < 12
    texts = lambda of: TextBatch(jnp.asarray(of), jnp.zeros(1), 1)  # noqa: E731
    rollout = rollout_of(spec, finished=finished, prompt_of=prompts, texts=texts)
    trained, weight, worse = expected_rows(method, rewards, credit)
    for segment in (0, 1):
        levels, found = spec.method.noise_levels(spec, 9, segment), []
        for videos, batch, _ in spec.method.batches(spec, 9, segment, rollout, credit, 0):
            rows = np.argwhere(batch.valid)
            own = [int(batch.x0[m, b].ravel()[0]) for m, b in rows]
            for (m, b), video in zip(rows, own):
                assert batch.text.embeddings[m, b] == prompts[video]
                noise = video // 2 if method == "dgpo" else video  # a group shares it
                assert batch.video[m, b] == noise
                np.testing.assert_array_equal(batch.sigma[m, :, b], levels.sigma[video])
                np.testing.assert_array_equal(batch.timestep[m, :, b], levels.timestep[video])
                assert batch.weight[m, b] == pytest.approx(weight[video], rel=1e-5)
                assert batch.kl_gate[m, b] == credit.kl_gate[video]
                if worse:
                    assert (batch.worse[m, b] == worse[video]).all()
                else:
                    assert batch.worse is None
            assert sorted(videos) == sorted([*own, *(worse[video] for video in own if worse)])
            np.testing.assert_array_equal(batch.draw, levels.draw)
            found += own
        assert sorted(found) == trained
        assert len(set(map(tuple, levels.sigma))) > 1
