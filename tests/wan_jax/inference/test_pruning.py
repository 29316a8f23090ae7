"""Pruning of candidates: which go on, and that they end as without pruning."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from tests.grpo.tiny_policy import CONFIG, text_batch
from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.solvers import SolverState
from wan_jax.errors import UserError
from wan_jax.inference import sampling
from wan_jax.inference.placement import choose_placement
from wan_jax.inference.pruning import Pruning, before_and_after, collect, step_at, survivors
from wan_jax.inference.reward_guidance import head_config, make_head, predict
from wan_jax.inference.settings import Given, choose_settings
from wan_jax.storage import model_dir


def test_the_better_ones_go_on():
    nan = math.nan
    predicted = np.array([0.1, 0.4, 0.3, nan, 0.5, 0.5, nan, nan])
    assert survivors(predicted, 4, 2).tolist() == [1, 2, 4, 5]
    assert survivors(predicted, 4, 3).tolist() == [0, 1, 2, 4, 5, 6]
    assert survivors(predicted, 2, 1).tolist() == [1, 2, 4, 6]


def test_segments_are_split_at_a_step():
    two = (Segment(0, range(4)), Segment(1, range(4, 10)))
    parts = {
        2: (((0, 0, 2),), ((0, 2, 4), (1, 4, 10))),
        4: (((0, 0, 4),), ((1, 4, 10),)),
        7: (((0, 0, 4), (1, 4, 7)), ((1, 7, 10),)),
    }
    for step, expected in parts.items():
        found = before_and_after(two, step)
        assert expected == tuple(
            tuple((s.expert, s.steps.start, s.steps.stop) for s in side) for side in found
        )


def test_the_step_of_a_noise_level():
    sigmas = np.array([1.0, 0.9, 0.72, 0.5, 0.2, 0.0])
    assert [step_at(sigmas, level) for level in (1.0, 0.7, 0.5, 0.01)] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="--steps=1"):
        step_at(np.array([1.0, 0.0]), 0.5)


@pytest.mark.slow
def test_states_and_predictions_are_of_the_videos_alone():
    """Without those that the last batch repeats."""
    head, text = make_head(head_config(CONFIG, heads=1, layers=1), seed=1), text_batch(4)
    x = jax.random.normal(jax.random.key(0), (2, 4, 1, 4, 4, 4))
    states = [SolverState(part, (part + 1,)) for part in x]
    rows = [np.arange(4), np.arange(4, 6)]
    kept, predicted = collect(Pruning(head, 1, 1), iter(states), [text, text], 700.0, rows)
    whole = np.asarray(x).reshape(8, 1, 4, 4, 4)[:6]
    np.testing.assert_array_equal(kept.x, whole)
    np.testing.assert_array_equal(kept.history[0], whole + 1)
    expected = [np.asarray(predict(head, part, 700.0, text)) for part in x]
    np.testing.assert_allclose(predicted, np.concatenate(expected)[:6], atol=1e-5)
    assert np.ptp(predicted) > 1e-4


@pytest.mark.slow
def test_survivors_end_as_without_pruning(folders, monkeypatch):
    """Whatever the solver's history and the batches; those that the head prefers go on, judged at the
    timestep of the step that they have before them.
    """
    levels = []

    def recorded(pruning, every, texts, timestep, batches):
        levels.append(float(timestep))
        return collect(pruning, every, texts, timestep, batches)

    monkeypatch.setattr(sampling, "collect", recorded)
    model = model_dir.open_model(folders[1])
    head = make_head(head_config(model.config("transformer"), heads=1, layers=1), seed=1)
    request = sampling.SampleRequest(
        model=model,
        checkpoint=None,
        prompts=("sea", "sky"),
        negative="",
        samples=3,
        frames=1,
        height=32,
        width=48,
        settings=choose_settings(model, 32, 48, Given(steps=5, solver="unipc", guidance=1.0)),
        place=choose_placement(model, 6, 1, devices=1, batch_size=4),
    )
    table, rankings = sampling.encode(request), []
    for pruning in (None, Pruning(head, 3, 1)):
        networks = sampling.load(request)
        batches = sampling.denoise(dataclasses.replace(request, pruning=pruning), table, networks)
        found = [(rows, np.asarray(x)[: len(rows)]) for rows, x, _ in batches]
        rankings.append({n: y for rows, x in found for n, y in zip(rows.tolist(), x)})
    whole, pruned = rankings
    assert levels == [request.settings.make_solver().schedule.timesteps[3]]
    assert sorted(whole) == list(range(6)) and [n // 3 for n in pruned] == [0, 1]
    for number, latents in pruned.items():
        np.testing.assert_allclose(latents, whole[number], atol=1e-4)
