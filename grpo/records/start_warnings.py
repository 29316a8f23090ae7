"""What a run and its plan print about settings that work against learning: videos below the size that
the model is published for, and trained steps without noise.
"""

from grpo.run import RunSpec
from grpo.settings.schema import TEXT_AREA, measured_rewards
from wan_jax.diffusion import sde
from wan_jax.models import presets

LEAST_LETTER = 10  # pixels: OCR engines do not read letters that are much smaller


def start_warnings(spec: RunSpec) -> list[str]:
    """Return all lines about a run."""
    return size_warnings(spec) + noise_warnings(spec)


def noise_warnings(spec: RunSpec) -> list[str]:
    """Return a line about the stochastic steps of a run to which its SDE adds no noise; [] without any,
    and for methods that do not train steps. CPS adds none to the last step.
    """
    if not spec.method.keeps_steps:
        return []
    noise = sde.diffusion_coefficient(spec.settings.sde, spec.schedule)
    steps = [step for part in spec.windows.ranges for step in part if not noise[step]]
    if not steps:
        return []
    low, high = spec.recipe.sample.sde_range
    shown = " and ".join(map(str, steps))
    return [
        f"warning: sample.sde={spec.settings.sde.kind} adds no noise in step {shown} of "
        f"sample.sde_range=({low}, {high}): where it is trained it has no likelihood and teaches nothing, "
        "but counts in the mean of an update; end the range before it"
    ]


def size_warnings(spec: RunSpec) -> list[str]:
    """Return a line about the sizes of a run that are below the smallest one that its model is
    published for; [] where there are none, or the model is no published one.
    """
    name = presets.name_of(spec.preset)
    if name is None:
        return []
    sampling = presets.PRESETS[name].sampling
    sizes = {(size.height, size.width): 0 for size in (*spec.trained_sizes, *spec.evaluated_sizes)}
    below = [(size, smallest) for size in sizes if (smallest := sampling.below(*size))]
    if not below:
        return []
    smallest = below[0][1]
    shown = ", ".join(f"{height} x {width}" for (height, width), _ in below)
    line = (
        f"warning: {shown}: {name} is published for {smallest[0]} x {smallest[1]} and more "
        f"({sampling.source})"
    )
    if sampling.breaks_below:
        line += f", and below that its videos are reported to break ({sampling.breaks_below})"
    measured = measured_rewards(spec.recipe)
    if "ocr" in measured and TEXT_AREA not in measured:
        line += (
            f". OCR does not read letters below some {LEAST_LETTER} pixels, so that small videos teach "
            f"larger letters: reward.panel with {TEXT_AREA} shows it (docs/howto/sizes.md)"
        )
    return [line]
