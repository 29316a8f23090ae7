"""Self-confidence: the probes and the reward by their formulas, and where it counts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_grpo
from grpo.credit import compute_credit
from grpo.learning import confidence as confidence_module
from grpo.learning.confidence import (
    PROBES,
    confidence,
    make_probe,
    measure_confidence,
    measure_errors,
    probed_guidance,
    probed_steps,
)
from grpo.random_streams import Stream
from grpo.rollout import sample_noise
from grpo.settings import parse
from tests.grpo import tiny_policy
from tests.grpo.epoch_inputs import rollout_of, scores_of
from tests.grpo.specs import tiny_spec
from tests.grpo.tiny_policy import SHAPE
from wan_jax.choices import EXPERTS
from wan_jax.diffusion.guidance import velocity
from wan_jax.errors import UserError


def test_the_error_of_the_probes():
    """Mean over probes of mean((v + x0 - e)^2), with the noise of the group."""
    policy, trainable, frozen = tiny_policy.setup()
    text, key, step, sigma = tiny_policy.text_batch(4), jax.random.key(5), 7, 0.4
    x0, group = jax.random.normal(jax.random.key(1), (4, *SHAPE)), jnp.array([2, 2, 3, 3])
    probe = make_probe(policy, 1.0)
    found = probe(trainable, frozen, x0, text, key, group, step, sigma, 400.0)
    run = jax.jit(
        lambda z: velocity(policy.module(trainable, frozen), z, jnp.full(4, 400.0), text, 1.0)
    )
    errors = []
    for number in range(step * PROBES, step * PROBES + PROBES):
        noise = sample_noise(Stream.PROBES.key(key), jnp.array([2, 3]), number, SHAPE)
        noise = np.repeat(np.asarray(noise, np.float64), 2, axis=0)
        z = (1 - sigma) * np.asarray(x0, np.float64) + sigma * noise
        v = np.asarray(run(z.astype(np.float32)), np.float64)
        errors.append(np.mean((v + x0 - noise) ** 2, axis=(1, 2, 3, 4)))
    # float32 means of 64 values
    np.testing.assert_allclose(found, np.mean(errors, 0), rtol=1e-5)


def expected_rewards(errors, sigma):
    """The reward of the videos of a batch, video by video."""
    levels = []
    for row in -np.log(errors):
        spread = row.std()
        levels.append((row - row.mean()) / spread if spread else 0 * row)
    weights = [s * (1 - s) for s in sigma]
    return sum(w * z for w, z in zip(weights, levels)) / sum(weights)


def test_the_reward_is_standardised_by_level():
    """A masked video equals a removed one; a level where all are alike says nothing."""
    errors = np.random.default_rng(0).uniform(0.1, 2.0, (3, 6))
    errors[1] = 0.5
    sigma, valid = np.array([0.6, 0.4, 0.1], np.float32), np.array([1, 1, 0, 1, 1, 1], bool)
    found = confidence(errors, sigma, valid)
    wanted = expected_rewards(errors[:, valid], sigma)
    np.testing.assert_allclose(found[valid], wanted, rtol=1e-5)
    assert np.isnan(found[2])
    errors[0, 4] = np.nan  # not finite: masked too
    left = np.array([0, 1, 3, 5])
    found = confidence(errors, sigma, valid)
    np.testing.assert_allclose(found[left], expected_rewards(errors[:, left], sigma), rtol=1e-5)
    assert np.isnan(found[[2, 4]]).all()
    assert np.isnan(confidence(errors, sigma, np.zeros(6, bool))).all()
    # the surer video has the larger reward
    surer = confidence(np.array([[0.1, 0.2], [0.3, 0.4]]), sigma[:2], np.ones(2, bool))
    assert surer[0] > 0 > surer[1]


def test_every_video_is_probed_at_the_second_half_of_the_steps():
    """Each step by its expert, of which one is not trained; with the noise of the video's group of four
    and its own prompt, in batches of two.
    """
    values = {"train.method": "nft", "sample.steps": 10, "sample.shift": 12.0}
    values |= {"reward.confidence": 0.5, "sample.batch_size": 2, "train.experts": EXPERTS[:1]}
    spec = tiny_spec("wan2.2-a14b", **values)
    assert spec.segments[1].steps == range(7, 10)
    asked = []

    def probe_of(expert):
        def probe(weights, frozen, x0, text, key, group, step, sigma, timestep):
            assert (weights, frozen) == (f"weights of {expert}", f"frozen {expert}")
            assert step in spec.segments[expert].steps
            asked.append((step, np.asarray(group).tolist(), text.tolist(), sigma, timestep))
            return jnp.full(len(group), float(step)) + group / 10

        return probe

    session = types.SimpleNamespace(
        spec=spec,
        functions=types.SimpleNamespace(probes=(probe_of(0), probe_of(1))),
        frozen=lambda expert: f"frozen {expert}",
        start={EXPERTS[1]: "weights of 1"},
    )
    states = {EXPERTS[0]: types.SimpleNamespace(trainable="weights of 0")}
    errors = measure_errors(session, states, rollout_of(spec, texts=lambda prompts: prompts))
    assert list(probed_steps(spec)) == [5, 6, 7, 8, 9]
    steps = np.arange(5, 10)
    np.testing.assert_allclose(errors, steps[:, None] + np.repeat([0, 0.1], 4), rtol=1e-6)
    batches = [([0, 0], [3, 3])] * 2 + [([1, 1], [5, 5])] * 2  # groups, prompts
    wanted = [(step, *batch) for part in ((5, 6), (7, 8, 9)) for batch in batches for step in part]
    assert [tuple(call[:3]) for call in asked] == wanted
    for step, *_, sigma, timestep in asked:
        assert sigma == float(spec.schedule.sigmas[step])
        assert timestep == float(spec.schedule.timesteps[step])


@pytest.mark.parametrize("guided, expected", [(True, (3.0,)), (False, (1.0,))])
def test_the_probed_velocity_is_that_of_training(guided, expected):
    values = {"train.method": "nft", "train.timesteps": 2, "sample.guidance": 3.0}
    assert probed_guidance(tiny_spec(**values, **{"train.guided": guided})) == expected


def test_the_confidence_of_an_epoch(monkeypatch):
    """The reward of the videos with a score, and their mean S for the log; nothing without a weight."""
    values = {"train.method": "nft", "sample.steps": 4, "train.timesteps": 2}
    spec = tiny_spec(**values, **{"reward.confidence": 0.5})
    errors = np.random.default_rng(0).uniform(0.1, 2.0, (2, 8))
    errors[1, 6] = np.inf
    monkeypatch.setattr(confidence_module, "measure_errors", lambda *_: errors)
    session, valid = types.SimpleNamespace(spec=spec), np.arange(8) != 3
    counted = [0, 1, 2, 4, 5, 7]
    rewards, logged = measure_confidence(session, {}, None, valid)
    wanted = expected_rewards(errors[:, counted], spec.schedule.sigmas[[2, 3]])
    np.testing.assert_allclose(rewards[counted], wanted, rtol=1e-5)
    assert np.isnan(rewards[[3, 6]]).all()
    assert logged == {"confidence": pytest.approx(-np.log(errors[:, counted]).mean())}
    rewards, logged = measure_confidence(session, {}, None, np.zeros(8, bool))
    assert np.isnan(rewards).all() and logged == {"confidence": 0.0}
    session = types.SimpleNamespace(spec=tiny_spec(**values))
    assert measure_confidence(session, {}, None, valid) == (None, {})


def test_it_counts_with_its_weight():
    spec = tiny_spec(**{"train.method": "nft", "train.timesteps": 2, "reward.confidence": 0.5})
    scores, prompts = scores_of(np.full(8, 0.25)), np.repeat([3, 5], 4)
    sure = np.array([1.0, 0.0, -1.0, np.nan, 0.0, 0.0, 0.0, 0.0])
    credit = compute_credit(spec, scores, prompts, {}, sure)
    np.testing.assert_allclose(credit.total[:3], [0.75, 0.25, -0.25])
    assert credit.valid.tolist() == [True] * 3 + [False] + [True] * 4
    assert credit.spread.tolist() == [True] * 3 + [False] * 5
    assert compute_credit(spec, scores, prompts, {}).spread.tolist() == [False] * 8


def test_a_method_that_keeps_steps_is_refused():
    config = tiny_grpo.get_config()
    config.reward.confidence = 0.5
    with pytest.raises(UserError, match=r"reward\.confidence=0\.5.*train\.method=grpo"):
        parse.recipe_from_config(config)
