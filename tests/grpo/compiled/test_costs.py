"""The cost of an epoch in evaluations, by hand."""

import pytest

from configs import quickstart
from grpo.compiled.costs import epochs_in_evaluations
from tests.grpo import specs


@pytest.mark.parametrize(
    "values, cost",
    [
        # 64 videos of 10 steps; 4 levels, five passes each; against 64 x 10 steps with guidance
        ({}, (64 * 10 + 64 * 4 * 5) / (64 * 10 * 2)),
        # with guidance in sampling, which the loss of NFT does not have
        ({"sample.guidance": 2.0}, (64 * 10 * 2 + 64 * 4 * 5) / (64 * 10 * 2)),
        # half of the prompts, and once more without guidance
        (
            {"eval.num_prompts": 32, "eval.also_unguided": True},
            (64 * 10 + 64 * 4 * 5) / (32 * 10 * 3),
        ),
        # evaluations of 9 frames have three latent frames
        ({"eval.frames": 9}, (64 * 10 + 64 * 4 * 5) / (64 * 10 * 2 * 3)),
    ],
)
def test_an_epoch_in_evaluations(values, cost):
    spec = specs.spec_of(quickstart, "wan2.1-1.3b", **values)
    assert spec.settings.videos == 64
    assert epochs_in_evaluations(spec) == pytest.approx(cost)
