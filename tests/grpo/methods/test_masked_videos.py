"""A video without a reward is as if it had not been sampled, in every method on finished videos."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo import methods
from grpo.credit import Credit, compute_credit
from grpo.learning.finished_batch import FinishedBatch
from grpo.learning.optimiser import GradientInputs
from grpo.run import RunSpec
from tests.grpo import tiny_policy
from tests.grpo.epoch_inputs import rollout_of, scores_of
from tests.grpo.specs import tiny_spec
from wan_jax.diffusion.guidance import TextBatch

ON_FINISHED_VIDEOS = [each.name for each in methods.all_methods() if not each.keeps_steps]
# three groups of four: one video of the first and of the last has no reward, and none of the second
FAILED = np.array([1, 4, 5, 6, 7, 11])
LEFT = np.setdiff1d(np.arange(12), FAILED)
BASE = {"dark": (0.5, 0.1)}


def spec_of(method: str, groups: int, group_size: int) -> RunSpec:
    values = {"sample.groups": groups, "sample.group_size": group_size}
    values |= {"sample.batch_size": group_size, "train.updates_per_epoch": 1}
    values |= {"train.method": method, "train.timesteps": 2, "train.kl_weight": 0.1}
    values |= {"train.kl_gate": 0.4, "reward.panel": ("dark",), "train.nft_beta": 0.3}
    return tiny_spec(**values, **{"train.dgpo_beta": 3.0, "train.dpo_beta": 5.0})


def credit_of(spec: RunSpec, videos: np.ndarray, failed: np.ndarray) -> Credit:
    """Return the credit of some of twelve videos, of which the failed ones have no reward."""
    rng = np.random.default_rng(2)
    rewards, dark = rng.random(12), rng.random(12)
    rewards[failed] = np.nan
    prompts = np.repeat([7, 2, 5], 4)[videos]
    scores = scores_of(rewards[videos], {"dark": dark[videos]})
    return compute_credit(spec, scores, prompts, BASE)


@pytest.fixture(scope="module")
def weights():
    """(policy, new weights, old weights, frozen) of latents with 16 channels."""
    config = dataclasses.replace(tiny_policy.CONFIG, in_channels=16, out_channels=16)
    policy, old, frozen = tiny_policy.setup(config=config)
    new = {
        path: x + 0.03 * jax.random.normal(jax.random.key(i), x.shape)
        for i, (path, x) in enumerate(sorted(old.items()))
    }
    return policy, new, old, frozen


def texts(prompt_of: np.ndarray) -> TextBatch:
    """Return an embedding of 6 rows for each prompt, which follows from its number."""
    rows = [np.random.default_rng(prompt).standard_normal((6, 12)) for prompt in prompt_of]
    return TextBatch(jnp.asarray(np.array(rows, np.float32)), jnp.zeros((6, 12)), 10)


def only(batch: FinishedBatch, weight: np.ndarray, gate: np.ndarray) -> FinishedBatch:
    """Return one micro-batch of the rows that count, with these weights and gates."""
    valid = np.asarray(batch.valid).ravel()

    def rows(x):  # [M, B, ...]
        return x.reshape(-1, *x.shape[2:])[valid][None]

    def levels(x):  # [M, K, B]
        return jnp.moveaxis(rows(jnp.moveaxis(x, 1, 2)), 2, 1)

    text = dataclasses.replace(
        batch.text,
        embeddings=rows(batch.text.embeddings),
        negative=batch.text.negative[:1],
    )
    return dataclasses.replace(
        batch,
        x0=rows(batch.x0),
        worse=None if batch.worse is None else rows(batch.worse),
        text=text,
        video=rows(batch.video),
        sigma=levels(batch.sigma),
        timestep=levels(batch.timestep),
        weight=jnp.asarray(weight)[None],
        valid=rows(batch.valid),
        kl_gate=jnp.asarray(gate)[None],
    )


@pytest.mark.parametrize("method", methods.names())
def test_the_credit_is_that_of_the_videos_with_rewards(method):
    masked = credit_of(spec_of(method, 3, 4), np.arange(12), FAILED)
    removed = credit_of(spec_of(method, 2, 3), LEFT, FAILED)
    assert np.flatnonzero(masked.counted).tolist() == LEFT.tolist() and removed.counted.all()
    for name in ("total", "valid", "advantages", "value", "spread", "kl_gate", "weak"):
        np.testing.assert_array_equal(getattr(masked, name)[LEFT], getattr(removed, name), name)
    assert not masked.spread[FAILED].any() and not masked.advantages[FAILED].any()
    assert not masked.kl_gate[FAILED].any() and 0 < removed.kl_gate.sum() < len(LEFT)
    assert masked.groups == removed.groups


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("method", ON_FINISHED_VIDEOS)
def test_a_masked_video_equals_a_removed_one(weights, method):
    """The same gradient and metrics, whatever its latents are."""
    policy, new, old, frozen = weights
    spec, few = spec_of(method, 3, 4), spec_of(method, 2, 3)
    credit = credit_of(spec, np.arange(12), FAILED)
    latents = np.random.default_rng(0).standard_normal((3, 4, *spec.shape)).astype(np.float32)
    latents.reshape(12, -1)[FAILED] = 30.0
    finished = [jnp.asarray(x) for x in latents]
    rollout = rollout_of(spec, finished=finished, prompt_of=np.repeat([7, 2, 5], 4), texts=texts)
    ((numbers, batch, _),) = spec.method.batches(spec, 3, 0, rollout, credit, 0)

    # what is selected without the failed videos
    of_few = credit_of(few, LEFT, FAILED)
    selection = few.method.select(of_few, 3)
    assert selection.valid.all() and set(numbers) == set(LEFT[selection.numbers])
    removed = only(batch, selection.weight, of_few.kl_gate[selection.videos])
    assert removed.valid.shape == (1, 2 if spec.method.one_per_group else 6)
    for found, wanted in ((removed.x0, selection.videos), (removed.worse, selection.worse)):
        if found is not None:
            np.testing.assert_array_equal(found[0], latents.reshape(12, *spec.shape)[LEFT[wanted]])

    gradient = jax.jit(spec.method.make_gradient(policy, None, 1.0))
    lagged = dict.fromkeys(spec.method.lagged, old)
    results = [
        gradient(new, GradientInputs(None, lagged), frozen, each) for each in (batch, removed)
    ]
    (masked, metrics), (alone, of_alone) = results
    assert float(metrics.count) == float(of_alone.count) == 2 * removed.valid.size
    averages = of_alone.averages()
    # fp32 sums in another order; losses of both signs cancel in part
    assert metrics.averages() == pytest.approx(averages, rel=1e-4, abs=1e-5)
    masked, alone = map(tiny_policy.flat_vector, (masked, alone))
    np.testing.assert_allclose(masked, alone, rtol=1e-3, atol=1e-4 * np.abs(alone).max())
    assert np.abs(alone).max() > 0
