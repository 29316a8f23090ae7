"""The settings that sampling uses: those given, else those that the model is published with."""

import dataclasses

from wan_jax.choices import WAN
from wan_jax.diffusion import experts
from wan_jax.diffusion.solvers import make_solver
from wan_jax.models.presets import GENERAL, PRESETS, WAN_NEGATIVE, published
from wan_jax.storage.model_dir import ModelDir

SCHEDULER = "the model's scheduler"


@dataclasses.dataclass(frozen=True)
class Given:
    """Settings as a user gives them; None: not given.

    Attributes:
        steps: of denoising.
        guidance, guidance_2: of the first and the second expert.
        shift: of the schedule.
        solver: one of `solvers.SOLVERS`.
        schedule: one of `choices.SCHEDULES`.
        fps: frames per second.
    """

    steps: int | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    shift: float | None = None
    solver: str | None = None
    schedule: str | None = None
    fps: float | None = None


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """The values in force.

    Attributes:
        steps, shift, solver, schedule, fps: as in `Given`.
        guidance: of each expert.
        order: of UniPC.
        name: of the published model; None: another one.
        sources: where each value comes from, by name.
    """

    steps: int
    guidance: tuple[float, ...]
    shift: float
    solver: str
    schedule: str
    fps: float
    order: int
    name: str | None
    sources: dict[str, str]

    def make_solver(self):
        """Return the solver. Raises ValueError where steps and shift do not fit."""
        return make_solver(
            self.solver, self.steps, self.shift, order=self.order, version=self.schedule
        )

    def unused(self, num_experts: int) -> dict[str, str]:
        """Return the options of sampling that these settings do not use, each with what it needs."""
        guided = self.guidance[0] > 1
        needs = (
            ("negative_prompt", "guidance above 1", guided),
            (
                "guidance_2",
                "guidance above 1 and a model with two experts",
                guided and num_experts > 1,
            ),
            ("schedule", "another solver", self.solver != "flow_match_euler"),
        )
        return {name: needed for name, needed, used in needs if not used}

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (name, value, source) of each setting, as text."""
        shown = {
            "steps": str(self.steps),
            "guidance": ", ".join(f"{scale:g}" for scale in self.guidance),
            "shift": f"{self.shift:g}",
            "solver": self.solver,
            "schedule": self.schedule,
            "fps": f"{self.fps:g}",
        }
        if self.solver == "flow_match_euler":
            del shown["schedule"]  # it has its own
        return [(name, value, self.sources[name]) for name, value in shown.items()]


def choose_settings(
    model: ModelDir, height: int, width: int, given: Given = Given()
) -> SamplingSettings:
    """Return the settings for videos of this size in pixels.

    A value that is not given is the one that the model is published with (`presets.PRESETS`), also
    where its weights were trained further. Its shift only holds for the scheduler that it is
    published with: another scheduler was made for this model, and its shift is used, as for models
    that are no published one.
    """
    name = published(model)
    preset = PRESETS[name] if name else None
    published_values = preset.sampling if preset else GENERAL
    scheduler = model.scheduler
    shift = published_values.shift_for(height, width)
    if preset and (scheduler.solver, scheduler.shift) != ("unipc", preset.flow_shift):
        shift = None
    first, *rest = published_values.guidance
    given_scales = [
        f"--{key}" for key in ("guidance", "guidance_2") if getattr(given, key) is not None
    ]
    if given.guidance is not None:
        first, rest = given.guidance, []  # Diffusers' second scale defaults to the first
    second = given.guidance_2 if given.guidance_2 is not None else next(iter(rest), None)
    guidance = experts.guidances(first, second, len(model.experts))

    defaults = {
        "steps": (published_values.steps, published_values.source),
        "guidance": (guidance, " and ".join(given_scales) or published_values.source),
        "shift": (scheduler.shift, SCHEDULER)
        if shift is None
        else (shift, published_values.source),
        "solver": (scheduler.solver, SCHEDULER),
        "schedule": ("diffusers", "timesteps of Diffusers 0.37 and later"),
        "fps": (published_values.fps, published_values.source),
    }
    for key in ("steps", "shift", "solver", "schedule", "fps"):
        if (value := getattr(given, key)) is not None:
            defaults[key] = value, f"--{key}"
    return SamplingSettings(
        **{key: value for key, (value, _) in defaults.items()},
        order=scheduler.order,
        name=name,
        sources={key: source for key, (_, source) in defaults.items()},
    )


def negative_prompt(text: str) -> str:
    """Return the negative prompt that a user's text stands for: `wan` is that of Wan's own code."""
    return WAN_NEGATIVE if text == WAN else text
