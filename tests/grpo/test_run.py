"""The description of a run: what follows from recipe, model and devices, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import wan22_a14b_ocr
from grpo.run import RunSpec
from grpo.settings import parse
from tests.grpo import tiny_run
from tests.grpo.specs import spec_of, tiny_spec
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.errors import UserError
from wan_jax.models import presets

A14B = {"sample.steps": 4, "sample.sde_range": (0, 4)}


def make(model="wan2.1-1.3b", *, training=True, devices=1, **values) -> RunSpec:
    """`RunSpec.make` of the tiny recipe."""
    config = tiny_run.config_of(tiny_run.recipe_text("model", "folder"), **values)
    recipe = parse.recipe_from_config(config)
    chosen = jax.devices()[:devices]
    settings, preset = parse.settings_of(recipe), presets.PRESETS[model]
    return RunSpec.make(recipe, settings, preset, training=training, devices=chosen)


def test_what_follows_from_the_tiny_recipe():
    spec = make()
    assert spec.shape == spec.eval_shape == (1, 2, 4, 16) and spec.tokens == 2
    assert [segment.steps for segment in spec.segments] == [range(3)]
    assert spec.trained == ("transformer",) and spec.trained_steps(0) == 2
    assert spec.update_batches(0).tolist() == [[0], [1]] and spec.eval_batches == 1
    assert spec.sampling_guidance == spec.eval_guidance == (1.0,)
    assert spec.remat == "none" and spec.backend == "chunked" and spec.mesh.size == 1
    assert spec.placed.startswith("mesh data 1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.backend = "xla"


def test_it_is_placed_on_all_devices_that_are_given():
    assert make(devices=4).mesh.size == 4
    assert make(devices=4, **{"mesh.fsdp": 2}).mesh.shape["fsdp"] == 2
    with pytest.raises(ValueError, match=r"batch_size=4 does not divide over 3"):
        make(devices=3)


@pytest.mark.parametrize(
    "model, values, found",
    [
        ("wan2.1-1.3b", {"train.experts": ("transformer_2",)}, r"train\.experts=.*transformer_2"),
        ("wan2.1-1.3b", {"sample.frames": 4}, "frames"),
        ("wan2.1-1.3b", {"sample.height": 56}, "56"),
        ("wan2.1-1.3b", {"eval.frames": 6}, "6"),
        ("wan2.1-1.3b", {"lora.rank": 2000}, r"lora\.rank=2000 .*1536"),
        ("wan2.2-a14b", A14B | {"sample.sde_range": (2, 4)}, "transformer would be trained"),
    ],
)
def test_what_does_not_go_together_is_refused(model, values, found):
    with pytest.raises((ValueError, UserError), match=found):
        make(model, **values)


def test_an_evaluation_needs_nothing_of_training():
    """Neither a step for every expert, nor a length that epochs have."""
    settings = A14B | {"sample.sde_range": (2, 4), "sample.frames": 4, "eval.frames": 5}
    spec = make("wan2.2-a14b", training=False, **settings)
    assert spec.eval_shape[0] == 2
    assert "gradients" not in spec.placed


def test_two_experts_share_the_steps():
    spec = spec_of(wan22_a14b_ocr, "wan2.2-a14b")
    first, second = spec.segments
    assert first.steps.stop == second.steps.start and second.steps.stop == spec.recipe.sample.steps
    assert sum(map(spec.trained_steps, (0, 1))) == sum(spec.windows.quotas)
    assert len(spec.sampling_guidance) == len(spec.eval_guidance) == 2


def test_the_schedule_is_that_of_the_recipe():
    """Legacy: sigma_0 of 20 steps with shift 3 is 2.997 / 2.998. Rollout, split between experts, and
    evaluation, which may have another one.
    """
    values = {"sample.steps": 20, "sample.schedule": "legacy", "eval.solver": "euler"}
    spec = tiny_spec("wan2.2-a14b", **values)
    first = np.float32(2.997 / 2.998)
    assert spec.schedule.sigmas[0] == spec.solver.schedule.sigmas[0] == first
    # of the newer list 7 timesteps are 875 or more
    assert [segment.steps for segment in spec.segments] == [range(6), range(6, 20)]
    assert tiny_spec("wan2.2-a14b", **{"sample.steps": 20}).segments[0].steps == range(7)
    other = spec.changed(eval={"schedule": "diffusers"})
    assert other.schedule.sigmas[0] == first
    assert other.solver.schedule.sigmas[0] == np.float32(1 - 1e-6)


def test_other_settings_make_another_run():
    """The settings follow the recipe, and the first run stays as it is."""
    spec = tiny_spec()
    other = spec.changed(train={"method": "nft", "timesteps": 2}, sample={"frames": 5})
    assert (spec.method.name, other.method.name) == ("grpo", "nft")
    assert other.windows.quotas == (2,) and other.shape[0] == 2
    assert other.settings == parse.settings_of(other.recipe)
    assert spec.shape[0] == 1 and other.mesh is spec.mesh


def test_lengths_of_a_run():
    spec = tiny_spec(
        **{"sample.frame_schedule": ((2, 5),), "eval.frames": 1, "eval.more_frames": (9,)}
    )
    assert [size.frames for size in spec.trained_sizes] == [1, 5]
    assert spec.evaluated_frames == (1, 9)
    long = spec.trained_sizes[1], spec.size_of(9)
    one = spec.of_sizes(*long)
    assert (one.trained_sizes, one.evaluated_sizes) == ((long[0],), (long[1],))
    assert (one.shape[0], one.eval_shape[0]) == (2, 3)
    assert one.of_sizes(*long) is one


def test_sizes_of_a_run():
    """The shift of a size is that of its noise levels; a series is named after its size."""
    spec = tiny_spec(
        **{
            "sample.height": 16,
            "sample.width": 32,
            "sample.size_schedule": ((3, 32, 32, 5.0),),
            "eval.height": 32,
            "eval.width": 32,
            "eval.shift": 4.0,
            "eval.more_sizes": ((16, 32, 1), (32, 64, 5, 7.0)),
        }
    )
    small, large = spec.trained_sizes
    assert (str(small), str(large)) == ("1 x 16 x 32", "1 x 32 x 32")
    assert spec.shape[1:3] == (2, 4) and spec.eval_shape[1:3] == (4, 4)
    names = ("16x32_1_frames", "32x64_5_frames_shift_7")
    assert spec.evaluations == (1, *names)
    assert [spec.size_of(series).shift for series in spec.evaluations] == [4, 4, 7]
    assert spec.label(names[0]) == ", 16x32 1 frame"
    late = spec.of_sizes(large, spec.size_of(names[1]))
    assert late.shape[1:3] == (4, 4) and late.eval_shape[:3] == (2, 4, 8)
    for shift, found in ((5, late.schedule), (7, late.solver.schedule), (4, spec.solver.schedule)):
        expected = flow_sigmas(len(found.timesteps), shift, spec.recipe.sample.schedule)
        np.testing.assert_array_equal(found.sigmas, expected.sigmas)


@pytest.mark.parametrize(
    "values",
    [
        {"eval.more_sizes": ((16, 40, 1),)},
        {"eval.more_sizes": ((16, 32, 4),)},
        {
            "sample.size_schedule": ((2, 24, 32, 3.0),),
            "eval.height": 16,
            "eval.width": 32,
            "eval.shift": 3.0,
        },
    ],
)
def test_sizes_that_the_model_cannot_make(values):
    with pytest.raises(UserError, match=r"40|frames=4|24"):
        make("wan2.1-1.3b", **values)
