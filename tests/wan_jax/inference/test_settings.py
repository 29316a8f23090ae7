"""The settings of sampling that a user does not give."""

import dataclasses
import json
import shutil

import pytest

from wan_jax.inference.settings import Given, choose_settings, negative_prompt
from wan_jax.models.presets import PRESETS, WAN_NEGATIVE
from wan_jax.storage import model_dir

UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


@pytest.fixture
def like(folders, tmp_path):
    """Returns a function: (name of a preset, its scheduler's values) -> a model with its networks."""

    def make(name, **scheduler):
        preset = PRESETS[name]
        model = model_dir.open_model(shutil.copytree(folders[1], tmp_path / "model"))
        for component in ("transformer", "vae"):
            values = dataclasses.asdict(getattr(preset, component))
            (model.path / component / "config.json").write_text(json.dumps(values))
        values = UNIPC | {"flow_shift": preset.flow_shift} | scheduler
        (model.path / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
        return dataclasses.replace(
            model,
            manifest=model.manifest | {"components": preset.experts},
            index=model.index | {"boundary_ratio": preset.boundary},
        )

    return make


@pytest.mark.parametrize(
    "name, size, steps, guidance, shift, fps",
    [
        ("wan2.1-1.3b", (480, 832), 50, (6.0,), 8.0, 16),
        ("wan2.1-14b", (480, 832), 50, (5.0,), 3.0, 16),
        ("wan2.1-14b", (720, 1280), 50, (5.0,), 5.0, 16),
        ("wan2.2-a14b", (720, 1280), 40, (4.0, 3.0), 12.0, 16),
        ("wan2.2-ti2v-5b", (704, 1280), 50, (5.0,), 5.0, 24),
    ],
)
def test_a_published_model_has_its_published_settings(
    like, name, size, steps, guidance, shift, fps
):
    chosen = choose_settings(like(name), *size)
    assert chosen.name == name
    assert (chosen.steps, chosen.guidance) == (steps, guidance)
    assert (chosen.shift, chosen.fps) == (shift, fps)
    assert (chosen.solver, chosen.schedule) == ("unipc", "diffusers")
    assert chosen.sources["shift"] == chosen.sources["steps"] == PRESETS[name].sampling.source


def test_another_model_has_its_schedulers_shift(folders):
    model = model_dir.open_model(folders[1])
    chosen = choose_settings(model, 480, 832)
    assert chosen.name is None and chosen.shift == model.scheduler.shift
    assert (chosen.steps, chosen.guidance, chosen.fps) == (50, (5.0,), 16)
    assert chosen.sources["shift"] == "the model's scheduler"


@pytest.mark.parametrize(
    "scheduler, solver, shift",
    [
        ({"flow_shift": 7.0}, "unipc", 7.0),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0},
            "flow_match_euler",
            5.0,
        ),
    ],
)
def test_a_fine_tuned_model_with_another_scheduler_has_its_shift(like, scheduler, solver, shift):
    chosen = choose_settings(like("wan2.2-a14b", **scheduler), 480, 832)
    assert (chosen.solver, chosen.shift, chosen.guidance) == (solver, shift, (4.0, 3.0))
    assert ("schedule" in {name for name, *_ in chosen.rows()}) == (solver == "unipc")


@pytest.mark.parametrize(
    "given, guidance, source",
    [
        (Given(guidance=5.0), (5.0, 5.0), "--guidance"),  # the second follows, as in Diffusers
        (Given(guidance_2=2.0), (4.0, 2.0), "--guidance_2"),
        (Given(guidance=5.0, guidance_2=2.0), (5.0, 2.0), "--guidance and --guidance_2"),
        (Given(guidance=1.0), (1.0, 1.0), "--guidance"),
    ],
)
def test_guidance_of_two_experts(like, given, guidance, source):
    chosen = choose_settings(like("wan2.2-a14b"), 480, 832, given)
    assert chosen.guidance == guidance and chosen.sources["guidance"] == source


def test_given_values_win(like):
    given = Given(steps=4, shift=2.0, solver="euler", schedule="legacy", fps=8.0)
    chosen = choose_settings(like("wan2.2-ti2v-5b"), 704, 1280, given)
    for name in ("steps", "shift", "solver", "schedule", "fps"):
        assert getattr(chosen, name) == getattr(given, name)
        assert chosen.sources[name] == f"--{name}"
    # the first timestep of the official code's list, not of Diffusers' since 0.37
    assert chosen.make_solver().schedule.timesteps[0] == 999
    assert chosen.make_solver().schedule.sigmas[0] != pytest.approx(1 - 1e-6, abs=1e-9)


def test_negative_prompts():
    assert negative_prompt("wan") == WAN_NEGATIVE and negative_prompt("") == ""
    assert negative_prompt("Wan colours") == "Wan colours"
