"""The cost of an epoch in evaluations, by hand."""

import pytest

from configs import quickstart
from grpo.compiled.costs import data_flops, epochs_in_evaluations
from grpo.compiled.functions import Functions
from tests.grpo import specs
from tests.grpo.data_folders import write_data
from wan_jax.models import flops as model_flops

ROLLOUT = {"sample.steps": 10, "sample.guidance": 1.0}


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
        # four epochs of the size of evaluations, six of twice as many tokens
        (
            {
                "epochs": 10,
                "sample.size_schedule": ((5, 64, 256, 4.0),),
                "eval.height": 64,
                "eval.width": 128,
                "eval.shift": 3.0,
            },
            (64 * 10 + 64 * 4 * 5) / (64 * 10 * 2) * (4 + 6 * 2) / 10,
        ),
    ],
)
def test_an_epoch_in_evaluations(values, cost):
    spec = specs.spec_of(quickstart, "wan2.1-1.3b", **(ROLLOUT | values))
    assert spec.settings.videos == 64
    assert epochs_in_evaluations(spec) == pytest.approx(cost)


@pytest.mark.parametrize(
    "values, cost",
    [
        # 16 pairs of a quarter of the tokens, three passes each, beside the epoch above
        ({"data.batch_size": 16}, (64 * 10 + 64 * 4 * 5 + 16 * 3 / 4) / (64 * 10 * 2)),
        # as many as a rollout batch, 32
        ({}, (64 * 10 + 64 * 4 * 5 + 32 * 3 / 4) / (64 * 10 * 2)),
        # alone, in three updates, which would not divide the groups, with the reference of a KL
        (
            {
                "train.method": "sft",
                "data.only": True,
                "train.kl_weight": 0.1,
                "train.updates_per_epoch": 3,
            },
            3 * 32 * 4 / 4 / (64 * 10 * 2),
        ),
        # pairs of two, with the reference
        (
            {"train.method": "dpo", "data.only": True, "data.labels": "pairs.jsonl"},
            32 * 2 * 4 / 4 / (64 * 10 * 2),
        ),
    ],
)
def test_an_epoch_with_data_in_evaluations(values, cost, tmp_path):
    """Pictures of half of the width and the height."""
    write_data(tmp_path / "data", (1, 4, 8, 16), height=32, width=64)
    values = ROLLOUT | values | {"data.path": str(tmp_path / "data")}
    spec = specs.spec_of(quickstart, "wan2.1-1.3b", **values)
    assert epochs_in_evaluations(spec) == pytest.approx(cost)
    flops = data_flops(Functions(spec))
    alone = specs.spec_of(
        quickstart,
        "wan2.1-1.3b",
        **{"sample.height": 32, "sample.width": 64, "sample.guidance": 1.0},
    )
    step = Functions(alone).rollout_step()
    each = model_flops.count(step.jitted, *step.args) / alone.recipe.sample.batch_size
    rows = values.get("data.batch_size", 32) * values.get("train.updates_per_epoch", 1)
    passes = 8 if "data.labels" in values else 4 if "train.kl_weight" in values else 3
    assert flops == pytest.approx(rows * passes * each, rel=1e-6)
