"""Evaluations of a stand-in for the model: which noise, text, target and score belong to which prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.data.prompts import PromptSet
from grpo.records.statistics import bootstrap_interval
from grpo.rollout import initial_noise
from grpo.scoring import guard
from grpo.scoring.heldout import Evaluator
from rewards.base import Score
from rewards.pool import RewardPool
from tests.grpo.specs import devices_mesh
from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.solvers import SolverState, make_solver
from wan_jax.inference.pipeline import TextTable, Videos

PROMPTS, SEED, SHAPE = 10, 11, (1, 1, 1, 2)


class Red:
    """The red of a video plus a thousandth of its green; the record is what was read."""

    def score(self, frames, record):
        red, green, _ = frames[0, 0, 0].astype(float)
        value = red + green / 1000
        return Score(value, text=record, parts=(("red", value), ("ocr", green)))


def step(added):
    """A denoising step that adds a number and the text to the second channel."""

    def run(weights, state, i, text):
        return SolverState(
            state.x.at[..., 1].add(added + weights * text.embeddings[:, :1, :1, None])
        )

    return run


def decode(state, latents):
    """Green is the noise, red the text; blue says nothing."""
    x = np.asarray(latents)[:, :, :, 0]  # [B, 1, 1, 2]
    green, red = np.rint(128 + 20 * x[..., 0]), np.rint(x[..., 1])
    frames = np.stack([red, green, 0 * red], -1).reshape(-1, 1, 1, 1, 3).astype(np.uint8)
    return lambda: Videos(frames, np.ones(len(x), bool))


@pytest.fixture
def evaluator(monkeypatch):
    def only_first(key, samples, shape):
        return initial_noise(key, samples, shape).at[..., 1].set(0)

    monkeypatch.setattr("grpo.scoring.heldout.initial_noise", only_first)
    table = TextTable(
        tuple(np.full((1, 1), 10.0 * n, np.float32) for n in range(PROMPTS)), np.zeros((1, 1)), 1
    )
    with RewardPool(Red, workers=0) as pool:
        yield Evaluator(
            prompts=PromptSet(
                tuple(f"prompt {n}" for n in range(PROMPTS)),
                tuple(f"target {n}" for n in range(PROMPTS)),
            ),
            table=table,
            solver=make_solver("euler", 1, 3.0),
            steps=(step(3.0),),
            parts=(Segment(0, range(1)),),
            decode=decode,
            vae_state={},
            pool=pool,
            mesh=devices_mesh(1),
            shape=SHAPE,
            batch_size=4,  # the last batch wraps around
            seed=SEED,
            previews=3,
            main="red",
        )


def green_of(videos):
    """The greens of videos, whose noise is of (seed, number)."""
    noise = initial_noise(jax.random.key(SEED), jnp.arange(videos, dtype=jnp.int32), SHAPE)
    return np.rint(128 + 20 * np.asarray(noise)[:, 0, 0, 0, 0]).astype(np.float64)


def test_every_prompt_has_its_own_noise_text_target_and_score(evaluator):
    evaluation = evaluator(lambda expert: 2.0, 4)
    record, green = evaluation.record, green_of(PROMPTS)
    wanted = 3 + 20 * np.arange(PROMPTS) + green / 1000
    np.testing.assert_allclose(record["rewards"], wanted, rtol=1e-12)
    assert record["texts"] == [f"target {n}" for n in range(PROMPTS)]
    assert record["prompts"] == [f"prompt {n}" for n in range(PROMPTS)]
    assert (record["epoch"], record["num"], record["main"]) == (4, PROMPTS, "red")
    interval = record["reward"], record["low"], record["high"]
    assert interval == bootstrap_interval(np.array(record["rewards"]), seed=SEED)
    halves = guard.halves(np.array(record["rewards"]), SEED)
    assert {name: record[name] for name in halves} == halves
    assert record["measures"] == {"ocr": (pytest.approx(green.mean()), pytest.approx(green.std()))}
    np.testing.assert_array_equal(evaluation.videos[:, 0, 0, 0, 0], [3, 23, 43])
    # another epoch has the same noise
    assert evaluator(lambda expert: 2.0, 9).record["rewards"] == record["rewards"]


def test_the_best_of_the_candidates_of_a_prompt(evaluator):
    """Video n is of prompt n % 10; its preview is of the chosen one."""
    evaluation = dataclasses.replace(evaluator, best_of=3)(lambda expert: 2.0, 4)
    green = green_of(3 * PROMPTS).reshape(3, PROMPTS)
    wanted = 3 + 20 * np.arange(PROMPTS) + green.max(0) / 1000
    np.testing.assert_allclose(evaluation.record["rewards"], wanted, rtol=1e-12)
    assert evaluation.record["texts"] == [f"target {n}" for n in range(PROMPTS)]
    assert evaluation.record["best_of"]["candidates"] == 3
    np.testing.assert_array_equal(evaluation.videos[:, 0, 0, 0, 0], [3, 23, 43])
    np.testing.assert_array_equal(evaluation.videos[:, 0, 0, 0, 1], green.max(0)[:3])


def test_without_guidance_the_other_steps_run(evaluator):
    both = dataclasses.replace(evaluator, unguided=(step(8.0),))
    record = both(lambda expert: 2.0, 4).record
    np.testing.assert_allclose(np.subtract(record["unguided"]["rewards"], record["rewards"]), 5.0)
    assert not {"prompts", "epoch", "unguided"} & record["unguided"].keys()
